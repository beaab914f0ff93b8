"""Log-barrier penalty of rewards. Contract: ops/log_barrier_penalty.py. Elementwise: one kernel forward, one backward."""

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch_elements

BLOCK = 1024


@triton.jit
def _barrier(x, bound, margin, CLAMP: tl.constexpr):
    """(penalty, derivative). With edge = bound - margin, the penalty is -(log(bound + x) + log(bound - x)) where |x| <= edge.
    Beyond the edge it is the tangent at the edge or, with CLAMP, the value at the edge."""
    edge = bound - margin
    far = tl.abs(x)
    inside = far <= edge
    # At the edge, bound - |x| is margin exactly, but computed as a difference of two close numbers it may be smaller.
    near = tl.where(inside, tl.maximum(bound - far, margin), margin)
    a = tl.where(inside, far, edge)
    slope = tl.div_rn(1.0, near) - tl.div_rn(1.0, bound + a)
    value = -(tl.log(bound + a) + tl.log(near))
    if CLAMP:
        slope = tl.where(inside, slope, 0.0)
    else:
        value = tl.where(inside, value, value + slope * (far - edge))
    slope = tl.where(x < 0.0, -slope, slope)
    is_nan = x != x
    return tl.where(is_nan, x, value), tl.where(is_nan, x, slope)


@triton.jit
def log_barrier_penalty_fwd_kernel(rewards_ptr, penalty_ptr, size, bound, margin, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(rewards_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    penalty, _ = _barrier(x, bound, margin, CLAMP)
    tl.store(penalty_ptr + index, penalty, mask=index < size)


@triton.jit
def log_barrier_penalty_bwd_kernel(dpenalty_ptr, rewards_ptr, drewards_ptr, size, bound, margin, CLAMP: tl.constexpr,
                                   BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(rewards_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    _, slope = _barrier(x, bound, margin, CLAMP)
    d = tl.load(dpenalty_ptr + index, mask=index < size, other=0.0) * slope
    tl.store(drewards_ptr + index, d.to(drewards_ptr.dtype.element_ty), mask=index < size)


def _launch(kernel, rewards, bound, margin, clamp, **tensors):
    check_dtype("log_barrier_penalty", "rewards", rewards)
    launch_elements(kernel, rewards, BLOCK, dict(rewards_ptr=rewards, bound=bound, margin=margin, CLAMP=clamp, **tensors))


def log_barrier_penalty_fwd(rewards, bound, margin, clamp):
    penalty = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    _launch(log_barrier_penalty_fwd_kernel, rewards, bound, margin, clamp, penalty_ptr=penalty)
    return penalty


def log_barrier_penalty_bwd(dpenalty, rewards, bound, margin, clamp):
    drewards = torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device)
    _launch(log_barrier_penalty_bwd_kernel, rewards, bound, margin, clamp, dpenalty_ptr=dpenalty, drewards_ptr=drewards)
    return drewards
