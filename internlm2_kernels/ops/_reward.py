"""What reward_loss and reward_loss_from_last share: the loss of rewards, argument checks, autograd."""

import torch

from .._autocast import promoted
from .._autograd import once_differentiable
from .._checks import check_device, check_float, check_number, check_same, fail, last_stride_1
from .._native import native
from . import focal_ranking_loss as focal
from . import log_barrier_penalty as barrier
from ._losses import accumulator, flattened

MARGIN = 1e-3
OPTIONS = "float gamma, float penalty_weight, float bound, float margin"
SOURCE = "arXiv:2403.17297 section 4.2.1 eq. 1 to 3"


def loss_of(rewards, gamma, penalty_weight, bound, ranking=focal.reference, penalty=barrier.reference):
    """The loss of rewards [n], which alternate between chosen and rejected. `ranking` and `penalty` are the functions that
    compute its two parts, by default the references of focal_ranking_loss and log_barrier_penalty."""
    if not rewards.numel():
        return rewards.sum()
    return (ranking(rewards[0::2], rewards[1::2], gamma=gamma).mean()
            + penalty_weight * penalty(rewards, bound=bound, margin=MARGIN).mean())


def reward_shapes(hidden, sequences):
    """The fake implementation of the forward: tensors of the shapes and dtypes of loss, rewards and slopes (the derivatives of
    the loss with respect to the rewards)."""
    acc = accumulator(hidden.dtype)
    each = lambda: hidden.new_empty((sequences,), dtype=acc)
    return hidden.new_empty((), dtype=acc), each(), each()


def gradient_shapes(hidden, head_weight, needs_dhidden, needs_dweight):
    return (hidden.new_empty((hidden.shape[0] if needs_dhidden else 0, hidden.shape[1])),
            head_weight.new_empty((head_weight.shape[0] if needs_dweight else 0,)))


def passes(op):
    """(forward, backward) for the autograd.Function of the operator. cu_seqlens is None where the rows of `hidden` are already
    the last tokens."""
    fwd, bwd = op.overloads["fwd"], op.overloads["bwd"]

    def forward(ctx, hidden, head_weight, cu, options, backend):
        where = () if cu is None else (cu,)
        loss, rewards, slopes = native(fwd[backend], hidden, head_weight, *where, *options)
        ctx.save_for_backward(hidden, head_weight, slopes, *where)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return loss, rewards

    @once_differentiable(op.name)
    def backward(ctx, dloss, drewards):
        if dloss is None and drewards is None:
            return None, None, None, None, None
        hidden, head_weight, slopes, *where = ctx.saved_tensors
        needs = ctx.needs_input_grad
        drewards = None if drewards is None else drewards.contiguous()
        dhidden, dweight = bwd[ctx.backend](dloss, drewards, hidden, head_weight, *where, slopes, needs[0], needs[1])
        return dhidden if needs[0] else None, dweight if needs[1] else None, None, None, None

    return staticmethod(forward), staticmethod(backward)


def run(op, function, hidden, head_weight, cu, options, backend):
    """(loss, rewards) of tensors that `checked` returned, on any backend but the reference."""
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        return function.apply(hidden, head_weight, cu, options, backend)
    where = () if cu is None else (cu,)
    return native(op.overloads["fwd"][backend], hidden, head_weight, *where, *options)[:2]


def checked(op, name, hidden, head_weight, gamma, penalty_weight, bound):
    check_float(op, name, hidden)
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        fail(ValueError, op, name, "shape [rows, D]", list(hidden.shape))
    check_float(op, "head_weight", head_weight)
    if head_weight.dtype != torch.float32 or hidden.dtype == torch.float64:
        hidden, head_weight = promoted(hidden, head_weight)
        check_same(op, "head_weight", head_weight, hidden, name)
    check_device(op, "head_weight", head_weight, hidden, name)
    if head_weight.dim() not in (1, 2) or head_weight.numel() != hidden.shape[1] or head_weight.shape[-1] != hidden.shape[1]:
        fail(ValueError, op, "head_weight", f"shape [{hidden.shape[1]}] or [1, {hidden.shape[1]}]", list(head_weight.shape))
    bound = check_number(op, "bound", bound, "a number from 0.01 to 1e6", lambda v: 0.01 <= v <= 1e6)
    weight = check_number(op, "penalty_weight", penalty_weight, "a finite number >= 0", lambda v: v >= 0)
    return last_stride_1(hidden), flattened(head_weight), (focal.check_gamma(op, gamma), weight, bound, MARGIN)
