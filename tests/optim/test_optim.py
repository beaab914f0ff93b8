"""FusedAdamW: against PyTorch's AdamW, random bits, memory layouts, compiled steps, long runs of small updates."""

import copy
import math

import pytest
import torch
from optim_runs import BACKENDS, close, draw_gradients, in_groups, parameters, state_of, steps
from shared import Recorder, assert_bitwise

import internlm2_kernels as ik
from internlm2_kernels.ops._philox import bits16, philox


# ------------------------------------------------------------------------------------------------- PyTorch's sequence
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"maximize": True, "weight_decay": 0.0}, {"betas": (0.0, 0.5), "eps": 1e-3},
                                     {"lr": torch.tensor(0.02)}, {"lr": torch.tensor([0.02], dtype=torch.float64)}), ids=str)
def test_float32_is_torchs(backend, options):
    """FusedAdamW on float32 parameters takes the steps of torch.optim.AdamW, over groups with different learning rates and
    weight decays.
    """
    ours, theirs = parameters(), parameters()
    second = {"lr": 0.003, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}
    wanted = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, **options}
    plain = copy.deepcopy(wanted) | ({"lr": float(wanted["lr"])} if "lr" in options else {})
    wanted = copy.deepcopy(wanted)
    a = ik.FusedAdamW(in_groups(ours, **second), backend=backend, **wanted)
    b = torch.optim.AdamW(in_groups(theirs, **second), **plain)
    for count in range(3 if backend == "triton" else 8):
        steps(a, ours, 1, count)
        steps(b, theirs, 1, count)
        for group in (*a.param_groups, *b.param_groups):  # as a learning-rate schedule does
            group["lr"] *= 0.9  # changes the rate in place where it is a tensor
    close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_masters_are_torchs_float32_parameters(backend, dtype):
    ours = parameters(dtype)
    theirs = [torch.nn.Parameter(p.detach().float()) for p in ours]
    a = ik.FusedAdamW(ours, lr=0.01, backend=backend)
    b = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(3 if backend == "triton" else 8):
        draw_gradients(ours, seed)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    close([a.state[p]["master"] for p in ours], theirs)
    for p in ours:
        assert torch.equal(p, a.state[p]["master"].to(dtype))
        assert {v.dtype for v in a.state[p].values()} == {torch.float32}


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_float64(backend):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    a = ik.FusedAdamW(ours, lr=2**-7, max_grad_norm=1.0, backend=backend)
    b = torch.optim.AdamW(theirs, lr=2**-7, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(5):
        draw_gradients(ours, seed)
        draw_gradients(theirs, seed)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        a.step()
        b.step()
    close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_is_clip_grad_norm(backend):
    """max_grad_norm clips by one norm over all groups and dtypes, as clip_grad_norm_ does, but leaves the gradients
    unchanged.
    """
    ours, theirs = parameters(), parameters()
    ours[3], theirs[3] = (torch.nn.Parameter(p[3].detach().bfloat16()) for p in (ours, theirs))
    a = ik.FusedAdamW(in_groups(ours, weight_decay=0.0), lr=0.01, max_grad_norm=0.5, backend=backend)
    b = ik.FusedAdamW(in_groups(theirs, weight_decay=0.0), lr=0.01, backend="reference")
    for seed, scale in ((0, 1.0), (1, 1e-3), (2, 30.0)):
        draw_gradients(ours, seed, scale)
        draw_gradients(theirs, seed, scale)
        kept = [p.grad.clone() for p in ours]
        theirs[3].grad_dtype = None
        theirs[3].grad = theirs[3].grad.float()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm, rtol=1e-6, atol=0)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, kept, strict=True))
    close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_random_bits_are_philox():
    """The random bits are Philox's: the reference gives the test vectors published with Random123, and elements use the 16-bit
    halves of its 32-bit words in the prescribed order.
    """
    ones, words = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    one = lambda numbers: tuple(torch.tensor([n]) for n in numbers)
    for counter, key, want in (((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
                               ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
                               (words, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))):
        assert tuple(int(word) for word in philox(one(counter), key)) == want
    got = bits16(19, seed=(7 << 32) + 5, tensor_index=3, stream=2, step=9)
    for i in range(19):
        word = int(philox(one((i // 8, 0, 14, 9)), (5, 7))[i % 8 // 2])
        assert int(got[i]) == (word >> 16 * (i % 2)) & 0xFFFF


@pytest.mark.parametrize("backend", ("cpp", "triton"))
def test_stored_random_bits_are_the_references(backend):
    """The kernels round with the reference's random bits. With betas of 0 the moments are exactly g and g^2, so that what is
    stored depends on the rounding alone and can be compared bit for bit.
    """
    generator = torch.Generator().manual_seed(4)
    g, moment = torch.randn(1003, generator=generator), torch.zeros(1003, dtype=torch.bfloat16)
    g[:4] = torch.tensor([math.inf, -math.inf, 3.4e38, -3.4e38])
    step = lambda chosen: ik.adamw(torch.zeros(1003), g, moment, moment, step=70001, betas=(0.0, 0.0), seed=2**62 + 12345,
                                   index=6, backend=chosen)[1:]
    assert_bitwise(*(dict(enumerate(step(chosen))) for chosen in (backend, "reference")))
    assert step(backend)[0][2:4].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_tensor_have_its_bits(backend):
    """Parts of a tensor, each updated in a call of its own that names the index of its first element, get the random bits of
    the whole tensor. They begin inside and between groups of eight elements that share a Philox counter, beyond a kernel's
    chunk, and at large indices.
    """
    generator = torch.Generator().manual_seed(6)
    size = 9001 if backend == "triton" else 70_001
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()
    tensors = draw(size), draw(size), draw(size), draw(size).square()
    for first in (0, 2**35 - 24):
        step = lambda begin, end, first=first: ik.adamw(*(t[begin:end] for t in tensors), step=3, lr=0.1, seed=5, index=2,
                                                        stochastic_rounding=True, offset=first + begin, backend=backend)
        cuts = (0, 13, 16, 20, 29, size - 1, size)
        parts = [step(*cut) for cut in zip(cuts, cuts[1:], strict=False)]
        assert_bitwise(dict(enumerate(map(torch.cat, zip(*parts, strict=True)))), dict(enumerate(step(0, size))))


def test_wrong_offsets_are_refused_before_any_write():
    step = ik.OPS["adamw"].overloads["step_"]["cpp"]
    tensors = [torch.ones(9) for _ in range(4)]
    for offsets, message in (([1, 2], "expected 1 numbers, as many as params, or none, got 2"), ([-1], ">= 0, got -1")):
        count, skipped = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        with pytest.raises(RuntimeError, match=f"ValueError: adamw: offsets: .*{message}"):
            step([tensors[0]], [tensors[1]], [], [tensors[2]], [tensors[3]], [count], skipped, None, None, None,
                 torch.tensor(0.1), 0.9, 0.95, 1e-8, 0.1, 0.0, False, False, 0, [0], offsets)
        assert not count and not skipped and all((t == 1).all() for t in tensors)


def test_backends_have_the_same_bits():
    """All backends take the same steps, with the same random bits for weights and both moments, also for parameters whose order
    in memory is not that of their indices.
    """
    results = []
    for backend in BACKENDS:
        params = parameters(torch.bfloat16)
        params[3] = torch.nn.Parameter(params[3].detach().permute(2, 0, 1))
        optimizer = ik.FusedAdamW(params, lr=0.5, master_weights=False, stochastic_rounding=True,
                                  moment_dtype=torch.bfloat16, seed=2**41 + 5, backend=backend)
        steps(optimizer, params, 2)
        results.append([p.detach().float() for p in params])
    for same in zip(*results, strict=True):
        for other in same[1:]:
            assert (same[0] != other).sum() <= 1  # an ulp of difference in float32 may rarely change the rounding to bfloat16
            torch.testing.assert_close(same[0], other, rtol=2**-7, atol=0)


# ------------------------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_any_memory_layout(backend, dtype):
    """Parameters that are transposed, permuted or have gaps in memory take the steps of contiguous ones. Gradients may have
    another layout or be expanded, and a parameter's layout may change between steps.
    """
    base = parameters(dtype, shapes=((6, 10), (4, 8, 3), (5, 12), (9, 2)))
    plain = [torch.nn.Parameter(p.detach().clone()) for p in base]
    gaps = torch.full((5, 20), 7.0, dtype=dtype)
    gaps[:, 3:15] = base[2].detach()
    odd = [base[0].detach().t().contiguous().t(), base[1].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0),
           gaps[:, 3:15], base[3].detach().clone()]
    odd = [torch.nn.Parameter(p) for p in odd]
    assert not any(p.is_contiguous() for p in odd[:3])
    pair = [ik.FusedAdamW(params, lr=0.02, max_grad_norm=1.0, backend=backend) for params in (plain, odd)]
    for seed in range(3):
        draw_gradients(plain, seed)
        plain[3].grad = plain[3].grad[:1].expand(9, 2)
        for p, q in zip(plain, odd, strict=True):
            q.grad = p.grad.t().contiguous().t() if p.dim() == 2 and seed else p.grad.clone()
        odd[3].grad = plain[3].grad
        for optimizer in pair:
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(plain, odd, strict=True))
        odd[0].data = odd[0].data.contiguous()  # as .to(memory_format=...) does
    assert (gaps[:, :3] == 7).all() and (gaps[:, 15:] == 7).all()
    saved = copy.deepcopy(pair[0].state_dict())
    pair[1].load_state_dict(saved)  # the state of the contiguous parameters
    for optimizer, params in zip(pair, (plain, odd), strict=True):
        steps(optimizer, params, 2, 5)
    assert all(torch.equal(p, q) for p, q in zip(plain, odd, strict=True))


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_missing_gradients_closure_and_nothing_at_all(backend):
    ours, theirs = parameters(), parameters()
    pair = [(ours, ik.FusedAdamW(ours, lr=0.01, max_grad_norm=100.0, backend=backend)),
            (theirs, torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1))]
    for params, optimizer in pair:
        assert optimizer.step() is None  # no parameter has a gradient
        for seed in range(4):
            draw_gradients(params, seed)
            params[seed % 3].grad = None
            loss = optimizer.step(lambda params=params: (sum(p.sum() for p in params) * 2).detach())
            assert loss.ndim == 0
    close(ours, theirs)
    assert float(pair[0][1].state[ours[0]]["step"]) == float(pair[1][1].state[theirs[0]]["step"]) == 2

    (p,) = parameters(shapes=((4,),))
    optimizer = ik.FusedAdamW([p], lr=0.1, backend=backend)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.05 * losses[0]


def test_one_registered_call_a_group_and_one_for_the_norm():
    params = parameters()
    optimizer = ik.FusedAdamW(in_groups(params, lr=0.1), max_grad_norm=1.0, backend="cpp")
    steps(optimizer, params, 1)
    draw_gradients(params, 1)
    with Recorder() as recorder:
        optimizer.step()
    names = [f._schema.name for f, _ in recorder.calls]
    assert [n for n in names if n.startswith("internlm2::")] == ["internlm2::squared_norm_fwd"] + ["internlm2::adamw_step_"] * 2
    assert not {n for n in names if "local_scalar" in n or "item" in n}  # no value is read, which would wait for the device


# ------------------------------------------------------------------------------------------------------------- masters
def test_what_is_written_to_parameters_from_outside():
    """A step starts from the float32 master, so it overwrites what was written to the parameter from outside. refresh_masters
    copies the parameter to its master, and so does a step after a change of the parameter's dtype.
    """
    params = parameters(torch.bfloat16)
    optimizer = ik.FusedAdamW(params, lr=0.01, weight_decay=0.0)
    steps(optimizer, params, 1)
    fill = lambda value: [p.data.fill_(value) for p in params]
    fill(5.0)
    steps(optimizer, params, 1, 1)
    assert all((p < 4.5).all() for p in params)  # the step started from the masters
    fill(5.0)
    optimizer.refresh_masters()
    steps(optimizer, params, 1, 2)
    assert all((p > 4.5).all() for p in params)
    for dtype in (torch.float32, torch.bfloat16):
        for p in params:
            p.data = p.data.to(dtype)
            p.grad_dtype = None
        fill(-3.0)
        steps(optimizer, params, 1, 3)
        assert all((p < -2.5).all() for p in params)
        assert all(("master" in optimizer.state[p]) == (dtype == torch.bfloat16) for p in params)


# ------------------------------------------------------------------------------------------------------------ compiled
@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_a_compiled_step(compiler):
    """A compiled step has no graph break, neither the first, which creates the state, nor later ones. The learning rate may
    change between steps, and the bits are those of the eager step.
    """
    torch._dynamo.reset()
    results, graphs = [], []
    for compiled in (False, True):
        params = parameters(torch.bfloat16, shapes=((7, 5), (33,)))
        optimizer = ik.FusedAdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], lr=0.02, max_grad_norm=1.0,
                                  backend="cpp")
        step = torch.compile(optimizer.step, fullgraph=True, backend=compiler) if compiled else optimizer.step
        for seed in range(4):
            draw_gradients(params, seed)
            if seed == 3:
                params[0].grad[0, 0] = math.nan
                optimizer.param_groups[1]["lr"] = 0.05
            step()
            graphs.append(int(optimizer.skipped))
        results.append({**state_of(optimizer), **{f"p{i}": p.detach().clone() for i, p in enumerate(params)}})
    assert_bitwise(results[1], results[0])
    assert graphs == [0, 0, 0, 1] * 2


def test_a_compiled_step_with_a_tensor_for_its_learning_rate_is_compiled_once():
    torch._dynamo.reset()
    (p,) = params = parameters(shapes=((7, 5),))
    lr = torch.tensor(0.0)
    optimizer = ik.FusedAdamW(params, lr=lr, weight_decay=0.0, backend="cpp")
    frames = torch._dynamo.testing.CompileCounter()
    step = torch.compile(optimizer.step, fullgraph=True, backend=frames)
    for count in range(12):
        before, counted = p.detach().clone(), frames.frame_count
        lr.fill_(0.01 * count)
        draw_gradients(params, count)
        step()
        assert torch.equal(p, before) == (count == 0)
        assert frames.frame_count == counted or count < 2  # compiled once without state and once with it


# ----------------------------------------------------------------------------------------------------- many small steps
def test_small_updates_are_not_lost():
    """10,000 updates of 1e-5 at |w| = 1 add up, although each is 0.0013 of bfloat16's spacing there: in float32 masters, and on
    average with stochastic rounding. Rounding to nearest loses all of them.
    """
    count, lr, size = 10_000, 1e-5, 8192
    weights = torch.ones(size)
    weights[1::2] = -1
    moved = {}
    for name, options in {"masters": {}, "stochastic": {"master_weights": False, "stochastic_rounding": True, "seed": 7},
                          "nearest": {"master_weights": False}}.items():
        p = torch.nn.Parameter(weights.bfloat16())
        p.grad = weights.bfloat16()  # towards 0
        optimizer = ik.FusedAdamW([p], lr=lr, eps=1e-30, weight_decay=0.0, betas=(0.9, 0.95), backend="cpp", **options)
        for _ in range(count if name != "nearest" else 100):
            optimizer.step()
        moved[name] = ((weights - optimizer.state[p].get("master", p.detach()).float()) * weights).double()
    want = count * lr
    assert ((moved["masters"] - want).abs() < 0.005 * want).all()
    mean, error = moved["stochastic"].mean(), moved["stochastic"].std() / size**0.5
    assert abs(mean - want) < 0.02 * want
    assert abs(mean - want) < 3 * error, (float(mean), float(error))
    assert not moved["nearest"].any()  # rounding to nearest loses every update


@pytest.mark.parametrize("beta2", (0.95, 0.999))
def test_bfloat16_second_moments_reach_their_steady_state(beta2):
    p = torch.nn.Parameter(torch.zeros(16384, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.3)
    square = float(p.grad[0]) ** 2
    optimizer = ik.FusedAdamW([p], lr=0.0, betas=(0.9, beta2), moment_dtype=torch.bfloat16, backend="cpp")
    for _ in range(round(8 / (1 - beta2))):
        optimizer.step()
    second, first = (optimizer.state[p][name].double() for name in ("exp_avg_sq", "exp_avg"))
    assert abs(second.mean() / square - 1) < 0.01 and abs(first.mean() / float(p.grad[0]) - 1) < 0.01
