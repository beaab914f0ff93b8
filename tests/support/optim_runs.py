"""Small parameters and steps for the tests of FusedAdamW."""

import torch

BACKENDS = "reference", "cpp", "triton"
SHAPES = ((7, 5), (33,), (), (2, 3, 4), (0, 6))


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def draw_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def in_groups(params, **second):
    return [{"params": params[:2]}, {"params": params[2:], **second}]


def steps(optimizer, params, count, first=0, scale=1.0):
    for seed in range(first, first + count):
        draw_gradients(params, seed, scale)
        optimizer.step()


def state_of(optimizer):
    return {f"{i}.{name}": value.clone() for i, state in enumerate(optimizer.state.values()) for name, value in state.items()}


def close(params, others, rtol=2e-6, atol=2e-7):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach().to(q.dtype), q.detach(), rtol=rtol, atol=atol)
