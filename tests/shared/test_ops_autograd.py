"""The shared checks of autograd's other uses, functorch, autocast and meta tensors: every operator x backend."""

import parameters
import pytest
import torch
from shared import OPS, assert_bitwise, replaced, sample_of, smoke_cases

from internlm2_kernels.testing import draw_upstream, flat, run, with_leaves

backend, native, pytest_generate_tests = parameters.backend, parameters.native, parameters.pytest_generate_tests


def _first(op, device, generator):
    return sample_of(op, smoke_cases(op)[0], torch.float32, device, generator)


def test_activation_checkpointing(op, backend, native, device, generator):
    if "backward" not in op.directions:
        pytest.skip("no backward")
    sample = _first(op, device, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    again = lambda **inputs: torch.utils.checkpoint.checkpoint(
        lambda: op.public(**inputs, backend=backend), use_reentrant=False)
    assert_bitwise(run(op, sample, again, upstream), run(op, sample, backend, upstream))


def test_only_wanted_gradients(op, backend, native, device, generator):
    """Where only one argument requires a gradient, it gets the same gradient as where all arguments do."""
    if "backward" not in op.directions:
        pytest.skip("no backward")
    for case in smoke_cases(op)[:2]:
        sample = sample_of(op, case, torch.float32, device, generator)
        upstream = draw_upstream(op, sample, 1.0, generator)
        want = run(op, sample, backend, upstream)
        for argument in sample.grad:
            got = run(op, type(sample)(sample.inputs, (argument,)), backend, upstream)
            assert_bitwise({f"d_{argument}": got[f"d_{argument}"]}, {f"d_{argument}": want[f"d_{argument}"]}, argument)


def test_each_output_alone(op, backend, native, device, generator):
    """A loss that uses one output only: the gradients of the other outputs count as zero and are not read."""
    if "backward" not in op.directions:
        pytest.skip("no backward")
    for case in smoke_cases(op)[:2]:
        sample = sample_of(op, case, torch.float32, device, generator)
        for output, gradient in draw_upstream(op, sample, 1.0, generator).items():
            got, want = (run(op, sample, b, {output: gradient}) for b in (backend, "reference"))
            for name in want:
                if name.startswith("d_"):
                    torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


def _outputs(op, sample, backend, **changes):
    return flat(op.public(**{**sample.inputs, **changes}, backend=backend))


def _floating(outputs):
    return [o for o in outputs if o.requires_grad]


def _upstream(op, sample, scale, generator):
    """Upstream gradients of the differentiable outputs, in their order."""
    takes = [o.requires_grad for o in _outputs(op, sample, "reference")]
    drawn = draw_upstream(op, sample, scale, generator)
    return [drawn[name] for name, one in zip(op.outputs, takes, strict=False) if one]


def test_double_backward_says_no(op, backend, native, device, generator):
    """Every way of asking for a gradient's own gradient raises an error, because a missing part would be a wrong derivative."""
    if "backward" not in op.directions:
        pytest.skip("no backward")
    sample = with_leaves(_first(op, device, generator))
    leaves = [sample.inputs[name] for name in sample.grad]
    upstream = _upstream(op, sample, 1.0, generator)

    def gradient(upstream, chosen=backend, again=None):
        outputs = again() if again else _outputs(op, sample, chosen)
        return torch.autograd.grad(_floating(outputs), leaves, upstream, create_graph=True, materialize_grads=True,
                                   allow_unused=True)

    said = lambda: pytest.raises(RuntimeError, match=f"^{op.name}: its gradient cannot be differentiated again")
    plain = torch.autograd.grad(_floating(_outputs(op, sample, backend)), leaves, upstream, allow_unused=True,
                                materialize_grads=True)
    taking = [g.clone().requires_grad_() for g in upstream]
    checkpointed = lambda: torch.utils.checkpoint.checkpoint(lambda: _outputs(op, sample, backend), use_reentrant=False)
    for again in (None, checkpointed):
        grads = gradient(taking, again=again)
        assert_bitwise(dict(enumerate(g.detach() for g in grads)), dict(enumerate(plain)), "create_graph")
        with said():
            torch.autograd.grad(sum(g.sum() for g in grads), taking, allow_unused=True)
    with said():
        sum(g.sum() for g in gradient(taking)).backward()
    for leaf in leaves:
        for mine, theirs in zip(gradient(upstream), gradient(upstream, "reference"), strict=True):
            if not theirs.requires_grad or torch.autograd.grad(
                    theirs.sum(), leaf, allow_unused=True, retain_graph=True)[0] is None:
                continue  # the gradient does not depend on this argument: there is no second derivative
            with said():
                torch.autograd.grad(mine.sum(), leaf, allow_unused=True, retain_graph=True)
            with said():
                torch.autograd.grad(leaf.square().sum() + mine.square().sum(), leaf, retain_graph=True)


def test_functorch_transforms_say_no(op, backend, native, device, generator):
    """Inside a functorch transform an operator cannot see that its input requires a gradient: so kernels raise an
    error there, whether they are chosen by name or automatically.
    """
    sample = _first(op, device, generator)
    name = (*sample.grad, next(n for n, v in sample.inputs.items() if isinstance(v, torch.Tensor)))[0]
    x = sample.inputs[name]
    both = torch.stack((x, x.flip(0)))
    call = lambda chosen: torch.func.vmap(lambda one: _outputs(op, sample, chosen, **{name: one}))(both)
    for chosen, who in ((backend, backend), (None, r"\w+")):
        with pytest.raises(RuntimeError, match=f"^{op.name}: backend='{who}' does not take part in functorch transforms"):
            call(chosen)
    each = [_outputs(op, sample, "reference", **{name: one}) for one in both]
    for got, *want in zip(call("reference"), *each, strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    if not sample.grad:
        return
    loss = lambda chosen: lambda one: sum(o.sum() for o in _outputs(op, sample, chosen, **{name: one}))
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(loss(backend))(x)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss("reference")(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss("reference"))(x), want)
    assert not torch._C._are_functorch_transforms_active()
    _outputs(op, sample, backend)  # outside the transform the operator works as before


def test_batched_upstream_gradients(op, backend, native, device, generator):
    """torch.autograd.grad with is_grads_batched=True, which runs only the backward under vmap (vectorised Jacobians), gives for
    each upstream gradient of the batch the gradient that it gives alone.
    """
    if "backward" not in op.directions:
        pytest.skip("no backward")
    sample = with_leaves(_first(op, device, generator))
    leaves = [sample.inputs[name] for name in sample.grad]
    upstream = [_upstream(op, sample, scale, generator) for scale in (1.0, 2.0)]
    outputs = _floating(_outputs(op, sample, backend))
    got = torch.autograd.grad(outputs, leaves, [torch.stack(pair) for pair in zip(*upstream, strict=True)],
                              is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(upstream):
        want = torch.autograd.grad(outputs, leaves, one, retain_graph=True)
        assert_bitwise({n: g[index] for n, g in zip(sample.grad, got, strict=True)}, dict(zip(sample.grad, want, strict=True)))


def test_functorch_transforms_inside_a_compiled_function(device):
    """The transform is seen while the function is traced, and raises an error instead of giving gradients of zero."""
    from internlm2_kernels import swiglu

    gradient = torch.func.grad(lambda x: swiglu(x).sum())
    with pytest.raises(RuntimeError, match="swiglu: backend='.*' does not take part in functorch transforms"):
        torch.compile(gradient, backend="aot_eager")(torch.randn(4, 8, device=device))


def test_forward_mode_says_no(op, backend, native, device, generator):
    """Forward-mode derivatives raise an error, because a dropped tangent would be a wrong derivative."""
    if not (sample := _first(op, device, generator)).grad:
        pytest.skip("nothing to differentiate")
    name = sample.grad[0]
    tangent_in = torch.randn(sample.inputs[name].shape, generator=generator, device=device)
    call = lambda chosen: torch.func.jvp(lambda x: flat(op.public(**{**sample.inputs, name: x}, backend=chosen)),
                                         (sample.inputs[name],), (tangent_in,))
    with pytest.raises(RuntimeError, match=f"{op.name}: backend='{backend}' has no forward-mode derivative"):
        call(backend)
    _, tangent = call("reference")
    assert tangent[0].any()


def test_autocast_keeps_the_dtype(op, backend, device, generator):
    """Under autocast an operator that casts returns the result for inputs in autocast's dtype, and any other operator the
    result that it returns without autocast, on every backend.
    """
    sample = _first(op, device, generator)
    low = sample.to(torch.bfloat16) if op.autocast else sample
    mixed = replaced(sample, **{name: low.inputs[name] for name in low.inputs if name.endswith("_cache")})
    upstream = draw_upstream(op, low, 1.0, generator)

    def inside(**inputs):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return op.public(**inputs, backend=backend)

    want = run(op, low, backend, upstream)
    rounded_inputs = {f"d_{name}": mixed.inputs[name].dtype for name in sample.grad}
    assert_bitwise(run(op, mixed, inside, upstream), {n: v.to(rounded_inputs.get(n, v.dtype)) for n, v in want.items()})
    for name, other in run(op, low, None if backend == "reference" else "reference", upstream).items():
        bound = 1e-4 if want[name].dtype == torch.float32 else 2e-2
        torch.testing.assert_close(want[name], other, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ("reward_loss_from_last", "linear_cross_entropy", "linear_logprobs", "flash_attention"))
def test_a_compiled_reference_under_autocast(name, device, generator):
    op = OPS[name]
    sample = _first(op, device, generator)
    torch._dynamo.reset()
    public = op.public
    function = lambda **inputs: public(**inputs, backend="reference")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = draw_upstream(op, sample, 1.0, generator)
    for enabled in (True, False):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            got, want = (run(op, sample, f) for f in (compiled, function))
        assert_bitwise(got, want)
    assert all(run(op, sample, compiled, upstream)[n].isfinite().all() for n in want)


def test_meta_tensors(op, device, generator):
    """Meta tensors give the shapes and dtypes of results and gradients, in and out of autocast, on every backend."""
    for case in smoke_cases(op):
        sample = sample_of(op, case, torch.float32, device, generator)
        want = _outputs(op, sample, None)
        shapes = replaced(sample, **{n: v.to("meta") for n, v in sample.inputs.items() if isinstance(v, torch.Tensor)})
        shapes = with_leaves(shapes)
        for backend in (None, "reference"):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                got = _outputs(op, shapes, backend)
            assert [(o.shape, o.dtype, o.device.type) for o in got] == [(o.shape, o.dtype, "meta") for o in want]
            if sample.grad:
                sum(o.float().sum() for o in got).backward()
                assert all(shapes.inputs[n].grad.shape == sample.inputs[n].shape for n in sample.grad)
