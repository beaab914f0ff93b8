"""What is special to rms_norm: the two options of `rounding`, the rounded residual, scale invariance, Llama's order of casts.
"""

import pytest
import torch

from internlm2_kernels import nn, rms_norm

BACKENDS = ("reference", "cpp", "triton")


def released_order(x, weight, eps):
    """The released model's order: normalise in float32, round, multiply in the activation's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_hf_rounding_is_the_released_models(backend, dtype, generator):
    x = torch.randn(40, 160, generator=generator).to(dtype)
    weight = torch.randn(160, generator=generator).to(dtype)
    want = released_order(x, weight, 1e-5)
    got = rms_norm(x, weight, 1e-5, rounding="hf", backend=backend)
    # The mean square may differ by an ulp of float32, which changes the rounded result only where it was close to a tie.
    assert (got != want).float().mean() < 0.005
    assert (rms_norm(x, weight, 1e-5, backend=backend) != want).float().mean() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_y_comes_from_the_rounded_sum(backend, generator):
    x, residual = (torch.randn(9, 64, generator=generator).bfloat16() for _ in range(2))
    weight = torch.ones(64).bfloat16()
    y, h = rms_norm(x, weight, 1e-5, residual, backend=backend)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, weight, 1e-5, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_and_huge_values_stay_finite(backend):
    x = torch.zeros(3, 32)
    x[1] = 1e15
    x[2, 0] = 1e-30
    y = rms_norm(x, torch.ones(32), 1e-5, backend=backend)
    assert y.isfinite().all() and (y[0] == 0).all() and torch.allclose(y[1], torch.ones(32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_head_norm_reads_a_packed_slice_in_place(backend, generator):
    """Queries that are a slice of a packed projection, [T, heads, d] with a gap between tokens, give the bits of a contiguous
    copy.
    """
    packed = torch.randn(6, 10, 32, generator=generator)
    weight = torch.randn(32, generator=generator)
    queries = packed[:, 2:8]
    assert torch.equal(rms_norm(queries, weight, backend=backend), rms_norm(queries.contiguous(), weight, backend=backend))


def test_a_frozen_weight_gets_no_work(generator):
    from shared import Recorder

    x = torch.randn(4, 16, generator=generator, requires_grad=True)
    with Recorder() as recorder:
        rms_norm(x, torch.ones(16), backend="cpp").sum().backward()
    (call,) = [args for func, args in recorder.calls if func._schema.name == "internlm2::rms_norm_bwd"]
    assert call[-1] is False


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_residual_alone_gives_the_weight_no_gradient(backend, generator):
    """The weight's gradient is None, because an optimizer would decay a weight whose gradient is zero."""
    x = torch.randn(4, 16, generator=generator, requires_grad=True)
    weight = torch.ones(16, requires_grad=True)
    _, h = rms_norm(x, weight, 1e-5, x.detach(), backend=backend)
    h.sum().backward()
    assert weight.grad is None and (x.grad == 1).all()


def test_module_is_a_drop_in(generator):
    ours, theirs = nn.RMSNorm(48), torch.nn.RMSNorm(48)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 48, generator=generator)
    torch.testing.assert_close(ours(x), theirs(x))
    y, h = ours(x, x)
    torch.testing.assert_close(y, theirs(2 * x))
    assert torch.equal(h, 2 * x) and "(48,), eps=None" in repr(ours)
