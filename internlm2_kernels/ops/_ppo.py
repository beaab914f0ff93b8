"""What PPO's two losses share. Both take three vectors, a mask and a clip, and return a loss and two statistics."""

import torch

from .._autocast import promoted
from .._autograd import distinct, once_differentiable
from .._checks import check_float, check_mask, check_vector
from .._registry import Op
from ._losses import accumulator, flattened, target


def masked_loss(vectors, statistic, **own):
    """The `Op` of a loss of the named `vectors`, of which only the first receives a gradient. `own` are the other fields of
    `Op`."""
    tensors = ", ".join(f"Tensor {name}" for name in (*vectors, "mask"))
    return Op(
        schemas={"fwd": f"({tensors}, float clip) -> (Tensor loss, Tensor clip_fraction, Tensor {statistic}, Tensor count)",
                 "bwd": f"(Tensor dloss, {tensors}, Tensor count, float clip) -> Tensor"},
        fakes={"fwd": lambda x, *rest: tuple(x.new_empty((), dtype=accumulator(x.dtype)) for _ in range(4)),
               "bwd": lambda dloss, x, *rest: x.new_empty(x.shape)},
        outputs=("loss", "clip_fraction", statistic),
        **own,
    )


def passes(op):
    """(forward, backward) for the autograd.Function of the operator."""
    fwd, bwd = op.overloads["fwd"], op.overloads["bwd"]

    def forward(ctx, x, old, other, mask, clip, backend):
        loss, clip_fraction, statistic, count = fwd[backend](x, old, other, mask, clip)
        ctx.save_for_backward(x, old, other, mask, count)
        ctx.clip, ctx.backend = clip, backend
        ctx.mark_non_differentiable(clip_fraction, statistic)
        ctx.set_materialize_grads(False)
        return loss, clip_fraction, statistic

    @once_differentiable(op.name)
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 6
        return bwd[ctx.backend](dloss, *ctx.saved_tensors, ctx.clip), *[None] * 5

    return staticmethod(forward), staticmethod(backward)


def checked(op, vectors, mask):
    """Checks the vectors, given by name, and the mask. Returns them all with one dimension. All vectors but the first are
    detached, because they are targets."""
    (name, x), *others = zip(vectors, promoted(*vectors.values()), strict=True)
    check_float(op.name, name, x)
    targets = [target(check_vector(op.name, other, tensor, x.shape, x, name)) for other, tensor in others]
    return flattened(x), *targets, flattened(check_mask(op.name, mask, x, name))


def run(op, function, tensors, clip, backend):
    """(loss, statistics by name) of the tensors that `checked` returned. The registered functions take clip None as -1."""
    x, old, other, mask = tensors
    chosen, limit = op.select(x, backend), -1.0 if clip is None else clip
    if chosen == "reference":
        loss, clip_fraction, statistic = op.reference(x, old, other, mask, clip=clip)
    elif torch.is_grad_enabled() and x.requires_grad:
        loss, clip_fraction, statistic = function.apply(*distinct(x, old, other), mask, limit, chosen)
    else:
        loss, clip_fraction, statistic, _ = op.overloads["fwd"][chosen](x, old, other, mask, limit)
    return loss, {"clip_fraction": clip_fraction, op.outputs[2]: statistic}
