"""The penalty that keeps rewards inside a bound; it is finite outside the bound too."""

import torch

from .._autograd import once_differentiable
from .._checks import check_choice, check_float, check_number
from .._registry import Op
from ._losses import accumulator


def reference(rewards, *, bound=5.0, margin=1e-3, outside="linear"):
    size = rewards.to(accumulator(rewards.dtype)).abs()
    edge = bound - margin
    beyond = size > edge
    # Beyond the edge the second logarithm is that of margin. The difference bound - edge would be the same number, but rounded.
    value = -(torch.log(bound + torch.where(beyond, edge, size)) + torch.log(torch.where(beyond, margin, bound - size)))
    if outside == "clamp":
        return value
    return value + (1 / margin - 1 / (bound + edge)) * torch.where(beyond, size - edge, 0)


LOG_BARRIER_PENALTY = Op(
    name="log_barrier_penalty",
    source="arXiv:2403.17297 section 4.2.1 eq. 2; its continuation outside the bound is this library's",
    summary="log barrier that keeps rewards inside a bound",
    reference=reference,
    schemas={
        "fwd": "(Tensor rewards, float bound, float margin, bool clamp) -> Tensor",
        "bwd": "(Tensor dpenalty, Tensor rewards, float bound, float margin, bool clamp) -> Tensor",
    },
    fakes={"fwd": lambda rewards, bound, margin, clamp: rewards.new_empty(rewards.shape, dtype=accumulator(rewards.dtype)),
           "bwd": lambda dpenalty, rewards, bound, margin, clamp: rewards.new_empty(rewards.shape)},
    outputs=("penalty",),
)
_FWD, _BWD = LOG_BARRIER_PENALTY.overloads["fwd"], LOG_BARRIER_PENALTY.overloads["bwd"]


class _LogBarrierPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rewards, options, backend):
        ctx.save_for_backward(rewards)
        ctx.options, ctx.backend = options, backend
        return _FWD[backend](rewards, *options)

    @staticmethod
    @once_differentiable("log_barrier_penalty")
    def backward(ctx, dpenalty):
        return _BWD[ctx.backend](dpenalty.contiguous(), *ctx.saved_tensors, *ctx.options), None, None


def check_barrier(op, bound, margin):
    bound = check_number(op, "bound", bound, "a number from 1e-6 to 1e6", lambda v: 1e-6 <= v <= 1e6)
    return bound, check_number(op, "margin", margin, "a number from 1e-6 to bound / 2", lambda v: 1e-6 <= v <= bound / 2)


def log_barrier_penalty(rewards, *, bound=5.0, margin=1e-3, outside="linear", backend=None):
    """Log barrier: penalty = -(log(x + bound) + log(bound - x)) up to |x| = edge = bound - margin.

    Shapes:   rewards [...] -> penalty [...]
    Options:  margin is absolute. Beyond the edge, "linear" continues with the value and the slope at the edge, so that a
              reward beyond the bound has a finite loss and is drawn back; "clamp" keeps the value at the edge and has no
              gradient there, as in XTuner
    Dtypes:   float32 | bfloat16 | float16 | float64; computed and returned in float32 (float64). At 0 the penalty is
              -2 log(bound), so a total loss may be negative
    Backward: saves rewards; slope 1 / (bound - x) - 1 / (bound + x). Deterministic: yes
    Errors:   ValueError for bound, margin or outside; TypeError for a dtype
    Cost:     one launch each way.   Source: arXiv:2403.17297 section 4.2.1 eq. 2
    """
    check_float("log_barrier_penalty", "rewards", rewards)
    bound, margin = check_barrier("log_barrier_penalty", bound, margin)
    check_choice("log_barrier_penalty", "outside", outside, ("linear", "clamp"))
    chosen = LOG_BARRIER_PENALTY.select(rewards, backend)
    if chosen == "reference":
        return reference(rewards, bound=bound, margin=margin, outside=outside)
    flat, options = rewards.contiguous().view(-1), (bound, margin, outside == "clamp")
    if torch.is_grad_enabled() and flat.requires_grad:
        return _LogBarrierPenalty.apply(flat, options, chosen).view(rewards.shape)
    return _FWD[chosen](flat, *options).view(rewards.shape)
