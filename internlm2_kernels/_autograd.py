"""What the operators' autograd.Functions share, above all the error for a second derivative.

A gradient of these operators cannot be differentiated again. With `torch.autograd.function.once_differentiable` of PyTorch, a
second derivative could silently lack the part that goes through the operator, for example in
`torch.autograd.grad(..., allow_unused=True)`. The decorator here connects the gradient in the graph to the tensors it was
computed from, so that every path back to an input raises an error that names the operator. Such a gradient keeps the graph of
the forward alive until the gradient is freed. In compiled code torch decides: it refuses second derivatives of most graphs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(op: str) -> Callable:
    """Decorates the backward of an `autograd.Function` of the operator `op`. The backward must return a tuple."""
    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *upstream: torch.Tensor | None) -> tuple:
            if not torch.is_grad_enabled():  # the call has no create_graph=True, or is in compiled code
                return backward(ctx, *upstream)
            unpacked = _Unpacked(ctx)
            with torch.no_grad():
                gradients = backward(unpacked, *upstream)
            sources = [t for t in (*upstream, *unpacked.saved_tensors) if t is not None and t.requires_grad]
            if not sources:
                return gradients
            try:
                return _Refusal.apply(op, len(gradients), *gradients, *sources)
            except RuntimeError as error:  # the call has is_grads_batched=True, and vmap has no rule for _Refusal
                raise RuntimeError(f"{op}: batched gradients with create_graph=True: use backend='reference'") from error

        return wrapper

    return decorate


def distinct(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns `tensors`. While torch.compile traces, a tensor that occurs a second time is replaced by a view of itself.

    The compiler refuses an `autograd.Function` that takes a tensor twice. Autograd adds the gradients of a tensor and its view.
    """
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(t.view_as(t) if any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors))


def is_one(dloss):
    """Whether the upstream gradient `dloss` is known to be 1 without waiting for a device. If so, gradients that the forward
    has computed for an upstream gradient of 1 are returned as they are."""
    if type(dloss) is not torch.Tensor or dloss.device.type != "cpu":  # fake tensors and other subclasses hold no number
        return False
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and dloss.item() == 1.0


def may_return_saved():
    """Whether a backward may return saved buffers without copying them: without retain_graph no second backward will read
    them."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class _Unpacked:
    """A wrapper of an autograd context that fetches the saved tensors and keeps them, because with activation checkpointing
    they can be fetched only once."""

    def __init__(self, ctx: Any):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


class _Refusal(torch.autograd.Function):
    """Returns the first `count` tensors, connected in the graph to the other tensors. Its backward raises the error for a
    second derivative."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tuple(None if t is None else t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: its gradient cannot be differentiated again; for that use backend='reference'")
