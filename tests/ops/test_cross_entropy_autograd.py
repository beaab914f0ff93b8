"""The cross-entropies and log-probabilities under autograd: which calls a step takes, what is kept, gradients in place."""

import pytest
import torch
import torch.nn.functional as F
from head_inputs import BACKENDS, NATIVE, draw, head
from shared import OPS, Recorder, assert_bitwise

import internlm2_kernels as ik


def raw_calls(recorder):
    return [(func._schema.name.removeprefix("internlm2::"), args) for func, args in recorder.calls
            if func.namespace == "internlm2"]


# -------------------------------------------------------------------------------------------- only the work that is needed
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("frozen", ("hidden", "weight"))
def test_a_frozen_side_costs_no_product(backend, frozen, generator):
    hidden, weight, labels = head(generator)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    want = {"hidden": (False, True), "weight": (True, False)}[frozen]
    calls = {"linear_cross_entropy_grad_fwd": lambda: ik.linear_cross_entropy(hidden, weight, labels, backend=backend),
             "linear_cross_entropy_bwd": lambda: ik.linear_cross_entropy(hidden, weight, labels, reduction="none",
                                                                         backend=backend),
             "linear_logprobs_bwd": lambda: ik.linear_logprobs(hidden, weight, labels, backend=backend)}
    for name, call in calls.items():
        hidden.grad = weight.grad = None
        with Recorder() as recorder:
            call().sum().backward()
        ((func, args),) = [(func, args) for func, args in recorder.calls if func._schema.name == f"internlm2::{name}"]
        assert args[-2:] == want, name
        sizes = dict(zip(("hidden", "weight"), (o.numel() for o in func(*args)[-2:]), strict=True))
        assert sizes[frozen] == 0 and sum(sizes.values()) > 0
        assert {"hidden": hidden, "weight": weight}[frozen].grad is None


@pytest.mark.parametrize("backend", NATIVE)
def test_one_registered_call_each_way(backend, generator):
    hidden, weight, labels = head(generator)
    logits = draw(generator, 7, 40).requires_grad_()
    upstream = torch.tensor(0.5)
    calls = {"cross_entropy": lambda **o: ik.cross_entropy(logits, labels % 40, backend=backend, **o),
             "linear_cross_entropy": lambda **o: ik.linear_cross_entropy(hidden, weight, labels, backend=backend, **o)}
    for op, call in calls.items():
        for options, names in (({}, ("grad_fwd", "scale_bwd")), ({"reduction": "sum"}, ("grad_fwd", "scale_bwd")),
                               ({"reduction": "none"}, ("fwd", "bwd"))):
            with Recorder() as recorder:
                loss = call(**options)
                loss.backward(upstream.expand(loss.shape))
            assert [name for name, _ in raw_calls(recorder)] == [f"{op}_{name}" for name in names], options
        with torch.no_grad(), Recorder() as recorder:  # without gradients only the plain forward pass runs
            call()
        assert [name for name, _ in raw_calls(recorder)] == [f"{op}_fwd"]
    with Recorder() as recorder:  # on CPU an upstream gradient of 1 needs no second pass
        ik.cross_entropy(logits, labels % 40, backend=backend).backward()
    assert [name for name, _ in raw_calls(recorder)] == ["cross_entropy_grad_fwd"]
    with Recorder() as recorder:
        logprobs, entropy = ik.linear_logprobs(hidden, weight, labels, return_entropy=True, backend=backend)
        (logprobs.sum() + entropy.sum()).backward()
    assert [name for name, _ in raw_calls(recorder)] == ["linear_logprobs_fwd", "linear_logprobs_bwd"]


def test_an_upstream_of_1_copies_no_gradient(generator):
    """On the CPU the value of the upstream gradient can be read: where it is 1, float32 gradients are returned as the forward
    computed them, without a pass that scales and copies them.
    """
    hidden, weight, labels = head(generator)
    with Recorder() as recorder:
        ik.linear_cross_entropy(hidden, weight, labels, backend="cpp").backward()
    assert [name for name, _ in raw_calls(recorder)] == ["linear_cross_entropy_grad_fwd"]
    got = {"hidden": hidden.grad, "weight": weight.grad}
    hidden.grad = weight.grad = None
    loss = ik.linear_cross_entropy(hidden, weight, labels, backend="cpp")
    loss.backward(torch.ones(()), retain_graph=True)  # the graph is kept, so copies must be returned
    assert_bitwise({"hidden": hidden.grad, "weight": weight.grad}, got)


@pytest.mark.parametrize("upstream", (1.0, 1 / 3))
@pytest.mark.parametrize("backend", NATIVE)
def test_16_bit_gradients_are_rounded_once(backend, upstream, generator):
    """The float32 gradients are multiplied by the upstream gradient (such as a loss scale) first and rounded to 16 bits
    once.
    """
    hidden, weight, labels = head(generator)
    hidden, weight = (t.detach().to(torch.bfloat16).requires_grad_() for t in (hidden, weight))
    with Recorder() as recorder:
        loss = ik.linear_cross_entropy(hidden, weight, labels, backend=backend)
        loss.backward(torch.tensor(upstream))
    (made,) = (args[1:3] for name, args in raw_calls(recorder) if name == "linear_cross_entropy_scale_bwd")
    for exact, got in zip(made, (hidden.grad, weight.grad), strict=True):
        assert exact.dtype == torch.float32 and torch.equal((exact * upstream).bfloat16(), got)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("upstream", (1.0, 0.5))
def test_results_of_a_kept_graph_may_be_written(backend, upstream, generator):
    """A hook or the caller may change the gradients in place: another backward through the same graph gives the same result."""
    hidden, weight, labels = head(generator)
    logits = draw(generator, 7, 40).requires_grad_()
    for leaves, loss in (((logits,), ik.cross_entropy(logits, labels % 40, backend=backend)),
                         ((hidden, weight), ik.linear_cross_entropy(hidden, weight, labels, backend=backend))):
        once = torch.autograd.grad(loss, leaves, torch.tensor(upstream), retain_graph=True)
        want = [g.clone() for g in once]
        for g in once:
            g.zero_()
        hooks = [leaf.register_hook(lambda g: g.mul_(2)) for leaf in leaves]
        twice = torch.autograd.grad(loss, leaves, torch.tensor(upstream), retain_graph=True)
        for hook in hooks:
            hook.remove()
        last = torch.autograd.grad(loss, leaves, torch.tensor(upstream))
        for g, doubled, again in zip(want, twice, last, strict=True):
            assert torch.equal(doubled, 2 * g) and torch.equal(again, g)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_graph_can_be_walked_again(backend, generator):
    """With retain_graph=True a backward returns copies of its saved buffers: a caller who changes the gradients in place must
    not change the result of a later backward.
    """
    hidden, weight, labels = head(generator)
    logits = draw(generator, 7, 40).requires_grad_()
    loss = (ik.cross_entropy(logits, labels % 40, backend=backend)
            + ik.linear_cross_entropy(hidden, weight, labels, backend=backend)
            + ik.linear_cross_entropy(hidden, weight, labels, reduction="none", backend=backend).sum())
    leaves = {"logits": logits, "hidden": hidden, "weight": weight}
    loss.backward(retain_graph=True)
    want = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for again in (True, False):
        for leaf in leaves.values():
            leaf.grad.mul_(0)  # an in-place clipping by the caller
        loss.backward(retain_graph=again)
        assert_bitwise({name: leaf.grad for name, leaf in leaves.items()}, want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_sizes_without_numbers(generator):
    """Under a fake tensor mode, as in memory estimates: shapes of losses and gradients without reading any value."""
    from torch._subclasses import FakeTensorMode

    hidden, weight, labels = (t.detach() for t in head(generator))
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(t).requires_grad_() for t in (hidden, weight)]
        loss = ik.linear_cross_entropy(*leaves, mode.from_tensor(labels), backend="cpp")
        (loss + ik.cross_entropy(leaves[0], mode.from_tensor(labels), backend="cpp")).backward()
    assert loss.shape == () and [leaf.grad.shape for leaf in leaves] == [hidden.shape, weight.shape]


@pytest.mark.parametrize("backend", NATIVE)
def test_upstream_scales(backend, generator):
    hidden, weight, labels = head(generator)
    gradients = lambda factor: torch.autograd.grad(
        factor * ik.linear_cross_entropy(hidden, weight, labels, backend=backend), (hidden, weight))
    for one, quarter in zip(gradients(1.0), gradients(0.25), strict=True):
        assert torch.equal(one / 4, quarter)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_head_may_be_the_embedding(backend, generator):
    """Where embedding and head share one weight, its two gradients add up."""
    _, weight, tokens = head(generator)
    ik.linear_cross_entropy(F.embedding(tokens, weight), weight, tokens.roll(-1), backend=backend).backward()
    got, weight.grad = weight.grad, None
    F.cross_entropy(F.embedding(tokens, weight) @ weight.T, tokens.roll(-1)).backward()
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", NATIVE)
def test_float16_gradients_of_a_mean_do_not_underflow(backend, generator):
    """The loss scale must be applied to dhidden before dhidden is rounded to float16, where it would otherwise become 0."""
    hidden, weight, labels = head(generator, tokens=64, dtype=torch.float16)
    loss = 2.0**13 * ik.linear_cross_entropy(1e-3 * hidden, 1e-2 * weight, labels, backend=backend)
    (got,) = torch.autograd.grad(loss, hidden)
    wide = hidden.detach().double().requires_grad_()
    small = (1e-2 * weight).detach().double()
    (want,) = torch.autograd.grad(2.0**13 * F.cross_entropy((1e-3 * wide) @ small.T, labels), wide)
    assert (got.double() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("backend", NATIVE)
def test_autocast_is_the_cast_written_out(backend, generator):
    hidden, weight, labels = head(generator)
    ops = ik.linear_cross_entropy, ik.linear_logprobs
    want = [op(hidden.bfloat16(), weight.bfloat16(), labels, backend=backend) for op in ops]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [op(hidden, weight, labels, backend=backend) for op in ops]
        logits = ik.cross_entropy(hidden, labels % 24, backend=backend)
    assert_bitwise(dict(enumerate(got)), dict(enumerate(want)))
    assert_bitwise({"loss": logits}, {"loss": ik.cross_entropy(hidden, labels % 24, backend=backend)})
    grads = [torch.autograd.grad(loss[0] + loss[1].sum(), (hidden, weight)) for loss in (got, want)]
    assert all(g.dtype == torch.float32 for g in grads[0])
    assert_bitwise(dict(enumerate(grads[0])), dict(enumerate(grads[1])))


# ------------------------------------------------------------------------------------------------------ in place
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_the_gradient_over_the_logits(backend, reduction, generator):
    leaf, labels = draw(generator, 7, 40).requires_grad_(), torch.randint(40, (7,), generator=generator)
    labels[2] = -100
    (want,) = torch.autograd.grad(ik.cross_entropy(leaf, labels, reduction=reduction, backend=backend).sum(), leaf)
    logits = leaf * 1.0
    loss = ik.cross_entropy(logits, labels, reduction=reduction, inplace_backward=True, backend=backend)
    loss.sum().backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-9)
    assert torch.equal(logits, leaf.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("backend", NATIVE)
def test_the_gradient_over_logits_whose_rows_share_memory(backend, generator):
    row, labels = draw(generator, 1, 40).requires_grad_(), torch.tensor([1, 5, 5])
    losses = [ik.cross_entropy(row.expand(3, 40), labels, inplace_backward=i, backend=backend) for i in (False, True)]
    grads = [torch.autograd.grad(loss, row)[0] for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", NATIVE)
def test_opcheck_of_the_form_in_place(backend, generator):
    logits, labels = draw(generator, 5, 33), torch.tensor([1, -100, 32, 0, 7])
    overloads = {name: OPS["cross_entropy"].overloads[name][backend] for name in ("fwd", "bwd", "bwd_")}
    options = -100, 0.1, 1e-3, 4.0, 1
    loss, _, lse = overloads["fwd"](logits, labels, *options, False)
    args = torch.ones_like(loss), logits, labels, lse, *options
    torch.library.opcheck(overloads["bwd_"], args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    want, over = overloads["bwd"](*args), logits.clone()
    overloads["bwd_"](args[0], over, *args[2:])
    assert_bitwise({"d": over}, {"d": want})
