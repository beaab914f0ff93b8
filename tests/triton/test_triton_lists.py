"""What the shared checks do not cover of Triton's operators over lists of tensors: squared_norm and adamw."""

import math

import pytest
import torch

import internlm2_kernels as ik
from internlm2_kernels._registry import OPS
from internlm2_kernels.ops.adamw import reference_step

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
tables = __import__("internlm2_kernels._triton.tables", fromlist=["tables"])


def raw(op, name):
    return OPS[op].overloads[name]["triton"]


@pytest.fixture
def randn(device, generator):
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator, device=device).to(dtype)



def assert_near(got, want, dtype, times=8):
    """Asserts that no error exceeds `times` * eps of dtype * the largest magnitude in `want`."""
    assert got.shape == want.shape
    scale = float(want.abs().max()) if want.numel() else 0.0
    assert float((got.double() - want.double()).abs().max() if want.numel() else 0) <= times * torch.finfo(dtype).eps * scale


@triton.jit
def find_kernel(table_ptr, out_ptr, tensors):
    tensor, chunk = tables._find_chunk(table_ptr, tensors, tl.program_id(0).to(tl.int64))
    tl.store(out_ptr + 2 * tl.program_id(0), tensor)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, chunk)


def test_every_chunk_is_found(device):
    sizes = [0, 5, 0, 0, 17, 8, 0, 1, 0]
    table, count = tables.table(8, sizes, [sizes], device)
    out = torch.empty(count, 2, dtype=torch.int64, device=device)
    find_kernel[(count,)](table, out, len(sizes))
    assert out.tolist() == [[i, c] for i, size in enumerate(sizes) for c in range(-(-size // 8))]


def test_squared_norm_of_a_list(device, randn):
    """Several dtypes and chunks, tensors at unaligned addresses, empty tensors; chunks are summed in float64."""
    chunk = __import__("internlm2_kernels._triton.squared_norm", fromlist=["x"]).CHUNK
    tensors = [randn(chunk + 5), randn(0), randn(7, 9, dtype=torch.bfloat16), randn(33)[1:], randn(3, dtype=torch.float16),
               randn(1001, dtype=torch.bfloat16)[3:], 1e-3 * randn(2 * chunk)]
    got = ik.squared_norm(tensors, backend="triton")
    assert math.isclose(float(got), float(ik.squared_norm(tensors, backend="reference")), rel_tol=1e-6)
    assert torch.equal(got, ik.squared_norm(tensors, backend="triton"))
    tensors[2][0, 0] = float("nan")
    assert ik.squared_norm(tensors, backend="triton").isnan()


SIZES = (1, 70, 0, 1000, 8192 + 13)


def state(randn, dtype, moments, masters):
    params = [randn(size + 1, dtype=dtype)[1:] for size in SIZES]
    moment = lambda: [0.1 * randn(size) for size in SIZES]
    return {"params": params, "grads": [0.1 * randn(size, dtype=dtype) for size in SIZES],
            "masters": [p.float() + 1e-4 for p in params] if masters else [],
            "exp_avgs": [t.to(moments) for t in moment()], "exp_avg_sqs": [t.square().to(moments) for t in moment()],
            "steps": [torch.full((), 2.0 + i, device=params[0].device) for i in range(len(SIZES))]}


def copied(lists):
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def step(call, lists, skipped, device, total=None, scale=None, found=None, *, max_norm=0.0, stochastic=False, maximize=False):
    settings = torch.tensor(1e-2, device=device), 0.9, 0.99, 1e-8, 0.1, max_norm, stochastic, maximize, 2**40 + 9
    call(*lists.values(), skipped, total, scale, found, *settings, list(range(3, 3 + len(lists["params"]))))


@pytest.mark.parametrize("dtype, moments, masters, stochastic",
                         ((torch.bfloat16, torch.float32, True, False), (torch.bfloat16, torch.bfloat16, False, True),
                          (torch.float32, torch.bfloat16, False, False), (torch.float16, torch.float32, True, False)), ids=str)
def test_adamw_over_a_list(dtype, moments, masters, stochastic, device, randn):
    """One call over a list takes the reference's steps, with clipping and unscaling of the gradients. Every tensor has its own
    step count and random bits, and its address need not be aligned.
    """
    mine = state(randn, dtype, moments, masters)
    before, right = copied(mine), copied(mine)
    scale, total = torch.tensor(4.0, device=device), torch.tensor(900.0, device=device)
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    for call, lists in ((raw("adamw", "step_"), mine), (reference_step, right)):
        step(call, lists, skipped, device, total, scale, max_norm=2.0, stochastic=stochastic, maximize=stochastic)
    assert int(skipped) == 0 and [float(s) for s in mine["steps"]] == [3.0, 4.0, 5.0, 6.0, 7.0]
    for name in ("params", "masters", "exp_avgs", "exp_avg_sqs"):
        for i, (old, got, want) in enumerate(zip(before[name], mine[name], right[name], strict=True)):
            different = got != want
            if got.dtype == torch.float32 and name in ("params", "masters"):
                # Weight minus update may cancel, and so may the average of gradients of both signs: the error is compared with
                # the size of the terms instead of the result.
                average, new = before["exp_avgs"][i].float().abs(), right["exp_avgs"][i].float().abs()
                terms = old.abs() + (old - want).abs() * (1 + average / new.clamp(min=1e-30))
                assert ((got - want).abs() <= 2 * torch.finfo(torch.float32).eps * terms).all()
            elif got.dtype == torch.float32:
                torch.testing.assert_close(got, want, rtol=4e-6, atol=1e-8)
            else:  # the same bits, except where the value is close to half-way between two
                assert float(different.float().mean() if got.numel() else 0) < 0.01
                torch.testing.assert_close(got, want, rtol=2 * torch.finfo(got.dtype).eps, atol=0)


@pytest.mark.parametrize("why", ("infinite norm", "NaN norm", "found_inf"))
def test_adamw_skips(why, device, randn):
    """A step with a norm that is not finite, or with found_inf set, changes nothing except the counter `skipped`."""
    mine = state(randn, torch.bfloat16, torch.float32, True)
    before = copied(mine)
    skipped = torch.full((), 5, dtype=torch.int64, device=device)
    total = torch.tensor({"infinite norm": math.inf, "NaN norm": math.nan}.get(why, 1.0), device=device)
    found = torch.tensor(float(why == "found_inf"), device=device)
    step(raw("adamw", "step_"), mine, skipped, device, total, None, found, max_norm=1.0)
    assert int(skipped) == 6
    assert all(torch.equal(a, b) for name in mine for a, b in zip(mine[name], before[name], strict=True))


def test_adamw_over_several_dtypes(device, randn):
    """bfloat16 and float32 parameters in one list: each is updated as if it were alone, with random bits by its place in the
    list.
    """
    low, full = (state(randn, dtype, torch.bfloat16, False) for dtype in (torch.bfloat16, torch.float32))
    mixed = {name: [x for pair in zip(low[name], full[name], strict=True) for x in pair] for name in low}
    right = copied(mixed)
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    step(raw("adamw", "step_"), mixed, skipped, device, stochastic=True)
    step(reference_step, right, skipped, device, stochastic=True)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for got, want in zip(mixed[name], right[name], strict=True):
            torch.testing.assert_close(got, want, rtol=max(4e-6, 2 * torch.finfo(got.dtype).eps), atol=1e-8)


def test_stochastic_rounding_keeps_the_mean_and_finite_numbers(device):
    """An update of 1/16 ulp changes one parameter in sixteen; the largest finite number, infinity and NaN stay as they are."""
    size = 4096
    param = torch.ones(size, dtype=torch.bfloat16, device=device)
    param[:3] = torch.tensor([float("inf"), float("nan"), torch.finfo(torch.bfloat16).max])
    lists = {"params": [param], "grads": [torch.zeros_like(param)], "masters": [],
             "exp_avgs": [torch.zeros(size, device=device)], "exp_avg_sqs": [torch.ones(size, device=device)],
             "steps": [torch.zeros((), device=device)]}
    skipped, rate = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(-2.0**-11, device=device)
    raw("adamw", "step_")(*lists.values(), skipped, None, None, None, rate, 0.9, 0.99, 1e-8, 1.0, 0.0, True, False, 7, [0])
    assert param[0].isinf() and param[1].isnan() and param[2] == torch.finfo(torch.bfloat16).max
    moved = float((param[3:] == 1 + 2.0**-7).float().mean())
    assert 0.04 < moved < 0.09 and set(param[3:].tolist()) == {1.0, 1 + 2.0**-7}
