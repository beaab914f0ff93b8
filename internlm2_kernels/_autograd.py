"""What the operators' autograd.Functions share: gradients that say by name that they cannot be differentiated again.

`torch.autograd.function.once_differentiable` ties such a gradient to nothing, or to a tensor of its own making: where it is
asked for by input (`torch.autograd.grad(..., allow_unused=True)`), or added to a loss, its part is missing without a word.
Here it is tied to what it was computed from, so that every way back to an input meets the error. Such a gradient keeps the
forward's graph alive until it is freed. In compiled code torch decides: its own backward refuses a second derivative for most
graphs, and where it does not, it is missing for PyTorch's operators as for these.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(op: str) -> Callable:
    """Decorates the backward of an `autograd.Function` of the operator `op`; it returns a tuple."""
    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *upstream: torch.Tensor | None) -> tuple:
            if not torch.is_grad_enabled():  # without create_graph; compiled code comes here too: see below
                return backward(ctx, *upstream)
            unpacked = _Unpacked(ctx)
            with torch.no_grad():
                gradients = backward(unpacked, *upstream)
            sources = [t for t in (*upstream, *unpacked.saved_tensors) if t is not None and t.requires_grad]
            if not sources:
                return gradients
            try:
                return _Refusal.apply(op, len(gradients), *gradients, *sources)
            except RuntimeError as error:  # vmap over the upstream (is_grads_batched) has no rule for a Function's outputs
                raise RuntimeError(f"{op}: batched gradients with create_graph=True: use backend='reference'") from error

        return wrapper

    return decorate


def distinct(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors; while torch.compile traces, one that is there twice is another time a view of itself.

    The compiler refuses an `autograd.Function` that takes a tensor twice. Autograd adds the gradients up either way.
    """
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(t.view_as(t) if any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors))


def is_one(dloss):
    """Whether an upstream is known to be 1 without waiting for a device: gradients made for 1 are then right as they are."""
    if type(dloss) is not torch.Tensor or dloss.device.type != "cpu":  # fake and other tensors have no number to look at
        return False
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and dloss.item() == 1.0


def may_return_saved():
    """Whether a backward may return saved buffers without copying: without retain_graph no second one will read them."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class _Unpacked:
    """A context whose saved tensors are fetched once: activation checkpointing hands them out no second time."""

    def __init__(self, ctx: Any):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


class _Refusal(torch.autograd.Function):
    """The first `count` tensors, as functions of the others."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tuple(None if t is None else t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: its gradient cannot be differentiated again; for that use backend='reference'")
