"""What PPO's two losses share: three vectors under a mask, a clip, a loss and two statistics that take no gradient."""

import torch

from .._autograd import distinct, once_differentiable
from .._checks import check_float
from .._registry import Op, Sample
from ._losses import accumulator, check_mask, check_vector, flattened, target


def masked_loss(vectors, statistic, draw, **own):
    """The operator on the named `vectors`, of which the first takes a gradient: loss, clip_fraction and `statistic`.

    draw(normal) gives a sample's vectors, normal(size) being random numbers of that size; `own`: the rest of `Op`'s fields.
    """
    tensors = ", ".join(f"Tensor {name}" for name in (*vectors, "mask"))

    def sample(case, dtype, device, generator):
        targets, options = case.dims["targets"], {"clip": case.dims["clip"]} if "clip" in case.dims else {}
        drawn = draw(lambda size: size * torch.randn(targets, generator=generator, device=device))
        mask = torch.rand(targets, generator=generator, device=device) < case.dims.get("counted", 0.7)
        inputs = {name: x.to(dtype) for name, x in zip(vectors, drawn, strict=True)}
        return Sample({**inputs, "mask": mask, **options}, vectors[:1])

    return Op(
        schemas={"fwd": f"({tensors}, float clip) -> (Tensor loss, Tensor clip_fraction, Tensor {statistic}, Tensor count)",
                 "bwd": f"(Tensor dloss, {tensors}, Tensor count, float clip) -> Tensor"},
        fakes={"fwd": lambda x, *rest: tuple(x.new_empty((), dtype=accumulator(x.dtype)) for _ in range(4)),
               "bwd": lambda dloss, x, *rest: x.new_empty(x.shape)},
        outputs=("loss", "clip_fraction", statistic),
        sample=sample,
        batched=(*vectors, "mask"),
        bytes=lambda dims, size, direction: dims["targets"] * ((3 if direction == "forward" else 4) * size + 1),
        rowwise=False,
        domain={"targets": (0, 300, 1)},
        **own,
    )


def flat(result):
    """(loss, statistics by name) as a tuple."""
    return result[0], *result[1].values()


def passes(op):
    """Forward and backward of the operator's autograd.Function."""
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
            return None, None, None, None, None, None
        return bwd[ctx.backend](dloss, *ctx.saved_tensors, ctx.clip), None, None, None, None, None

    return staticmethod(forward), staticmethod(backward)


def checked(op, x, old, other, mask):
    """The operator's tensors, flat; no gradient goes to the second and third."""
    name, *targets = op.batched[:3]
    check_float(op.name, name, x)
    vectors = [target(check_vector(op.name, argument, tensor, x.shape, x, name))
               for argument, tensor in zip(targets, (old, other), strict=True)]
    mask = flattened(check_mask(op.name, mask, x, name))
    return flattened(x), *vectors, mask


def run(op, function, tensors, clip, backend):
    """(loss, statistics by name) of `checked` tensors; clip None: nothing is clipped, which the raw operators know as -1."""
    x, old, other, mask = tensors
    chosen, limit = op.select(x, backend), -1.0 if clip is None else clip
    if chosen == "reference":
        loss, clip_fraction, statistic = op.reference(x, old, other, mask, clip=clip)
    elif torch.is_grad_enabled() and x.requires_grad:
        loss, clip_fraction, statistic = function.apply(*distinct(x, old, other), mask, limit, chosen)
    else:
        loss, clip_fraction, statistic, _ = op.overloads["fwd"][chosen](x, old, other, mask, limit)
    return loss, {"clip_fraction": clip_fraction, op.outputs[2]: statistic}
