"""What is special to swiglu: extreme gates, gate and up packed in one tensor, saved inputs that are never overwritten."""

import pytest
import torch

from internlm2_kernels import nn, swiglu

BACKENDS = ("reference", "cpp", "triton")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gates(backend, dtype):
    """silu(g) tends to g for large g and to 0 for small g, without NaN in the forward or backward."""
    gate = torch.tensor([-30000.0, -200.0, -88.0, -87.0, -20.0, 0.0, 20.0, 88.0, 89.0, 200.0, 30000.0], dtype=dtype)
    gate.requires_grad_()
    up = torch.ones_like(gate).requires_grad_()
    y = swiglu(gate, up, backend=backend)
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert y.isfinite().all() and dgate.isfinite().all()
    torch.testing.assert_close(dup, y, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(y[7:], gate[7:]) and (y[:2] == 0).all() and (dgate[7:] == 1).all() and (dgate[:2] == 0).all()
    assert y[5] == 0 and dgate[5] == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_and_nan_pass(backend):
    gate = torch.tensor([float("inf"), float("nan"), 1.0])
    y = swiglu(gate, torch.ones(3), backend=backend)
    assert y[0] == float("inf") and y[1].isnan() and y[2].isfinite()


@pytest.mark.parametrize("backend", BACKENDS[1:])  # PyTorch's sigmoid rounds differently depending on the place in the tensor
def test_packed_equals_two_tensors(backend, generator):
    packed = torch.randn(3, 2, 2, 40, generator=generator, requires_grad=True)
    gate, up = (half.detach().clone().requires_grad_() for half in packed.chunk(2, -1))
    y, y2 = swiglu(packed, backend=backend), swiglu(gate, up, backend=backend)
    dy = torch.randn(y.shape, generator=generator)
    (dpacked,) = torch.autograd.grad(y, packed, dy)
    pair = torch.autograd.grad(y2, (gate, up), dy)
    assert torch.equal(y, y2) and torch.equal(dpacked, torch.cat(pair, -1))


def test_exp_is_accurate_over_its_whole_range():
    """silu(g) / g = sigmoid(g): the vectorised exp is within 2 units in the last place of float32."""
    gate = torch.cat((torch.linspace(-87, 87, 200_001), torch.logspace(-30, 1, 20_000), -torch.logspace(-30, 1, 20_000)))
    got = swiglu(gate, torch.ones_like(gate), backend="cpp").double()
    gold = gate.double() * torch.sigmoid(gate.double())
    relative = ((got - gold) / gold).abs()
    assert float(relative[gate != 0].max()) < 4 * torch.finfo(torch.float32).eps


def test_module(generator):
    block = nn.SwiGLU(16, 40)
    x = torch.randn(3, 16, generator=generator)
    want = block.w2(torch.nn.functional.silu(block.w1(x)) * block.w3(x))
    torch.testing.assert_close(block(x), want)
