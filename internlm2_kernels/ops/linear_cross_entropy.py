"""Cross-entropy of a linear head without its logits in memory."""

import torch

from .._autocast import without_autocast
from .._autograd import distinct, is_one, may_return_saved, once_differentiable
from .._checks import check_labels, check_values, last_stride_1
from .._device_errors import Index
from .._native import native
from .._registry import Op
from ._head import as_matrix, check_head, check_weights, gradient_shapes
from ._losses import accumulator, check_loss_options, fake_losses, losses_of, reduced_losses, shaped_losses


@without_autocast
def reference(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
              token_weights=None, reduction="mean", return_z_loss=False):
    acc = accumulator(hidden.dtype)
    logits = hidden.to(acc) @ weight.to(acc).T
    if token_weights is not None:  # a token of weight 0 has no influence, whatever its logits are
        labels = labels.masked_fill(token_weights == 0, ignore_index)
    parts = losses_of(logits, labels, ignore_index, label_smoothing, z_loss, softcap)
    return reduced_losses(*parts, reduction, token_weights, return_z_loss)


def _fake_fwd(hidden, weight, labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, reduction, return_z_loss):
    lse = hidden.new_empty((*labels.shape, 2), dtype=accumulator(hidden.dtype))  # maximum, log of sum exp(l - maximum)
    return *fake_losses(hidden, labels, reduction, return_z_loss), lse


def _fake_grad_fwd(hidden, weight, labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, reduction,
                   return_z_loss, needs_dhidden, needs_dweight):
    acc = accumulator(hidden.dtype)
    shape_h, shape_w = gradient_shapes(hidden, weight, needs_dhidden, needs_dweight)
    losses = fake_losses(hidden, labels, reduction, return_z_loss)
    return *losses, hidden.new_empty(shape_h, dtype=acc), weight.new_empty(shape_w, dtype=acc)


def _fake_bwd(dloss, hidden, weight, labels, token_weights, lse, ignore_index, label_smoothing, z_loss, softcap, reduction,
              needs_dhidden, needs_dweight):
    shape_h, shape_w = gradient_shapes(hidden, weight, needs_dhidden, needs_dweight)
    return hidden.new_empty(shape_h), weight.new_empty(shape_w)


def _fake_scale_bwd(dloss, dhidden, dweight, hidden, weight):
    return hidden.new_empty(dhidden.shape), weight.new_empty(dweight.shape)


LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    source="logits in chunks, gradients in the same sweep: arXiv:2410.10989 section 3.2; arXiv:2411.09009",
    summary="cross-entropy of a linear head, logits never in memory",
    reference=reference,
    schemas={
        "fwd": "(Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights, int ignore_index, float label_smoothing,"
               " float z_loss, float softcap, int reduction, bool return_z_loss) -> (Tensor loss, Tensor z_loss, Tensor lse)",
        "grad_fwd": "(Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights, int ignore_index,"
                    " float label_smoothing, float z_loss, float softcap, int reduction, bool return_z_loss,"
                    " bool needs_dhidden, bool needs_dweight)"
                    " -> (Tensor loss, Tensor z_loss, Tensor dhidden, Tensor dweight)",
        "bwd": "(Tensor dloss, Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights, Tensor lse,"
               " int ignore_index, float label_smoothing, float z_loss, float softcap, int reduction, bool needs_dhidden,"
               " bool needs_dweight) -> (Tensor dhidden, Tensor dweight)",
        "scale_bwd": "(Tensor dloss, Tensor dhidden, Tensor dweight, Tensor hidden, Tensor weight)"
                     " -> (Tensor dhidden, Tensor dweight)",
    },
    fakes={"fwd": _fake_fwd, "grad_fwd": _fake_grad_fwd, "bwd": _fake_bwd, "scale_bwd": _fake_scale_bwd},
    outputs=("loss", "z_loss"),
    autocast=True,
    isas=("avx2", "avx512", "avx512_bf16", "amx"),
    indices={"labels": Index(1 << 9, "values from 0 to V - 1 or ignore_index",
                             "the losses and gradients of those tokens are NaN")},
)
_FWD, _GRAD, _BWD, _SCALE = (LINEAR_CROSS_ENTROPY.overloads[name] for name in ("fwd", "grad_fwd", "bwd", "scale_bwd"))


class _OneSweep(torch.autograd.Function):
    """For the reductions mean and sum: the forward also computes the gradients of hidden and weight, for an upstream gradient
    of 1. That takes three matrix products in all."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, options, return_z_loss, backend):
        loss, z_loss, dhidden, dweight = native(_GRAD[backend], hidden, weight, labels, token_weights, *options, return_z_loss,
                                                ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        link = hidden.new_empty((0, 1))  # an empty result that ties the gradients to the graph without keeping the inputs
        ctx.save_for_backward(dhidden, dweight, link)
        ctx.backend = backend
        ctx.mark_non_differentiable(z_loss)
        ctx.set_materialize_grads(False)
        return loss, z_loss, link

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 7
        dhidden, dweight, like = ctx.saved_tensors
        if like.dtype != dhidden.dtype or not is_one(dloss) or not may_return_saved():
            dhidden, dweight = _SCALE[ctx.backend](dloss, dhidden, dweight, like, like)
        needs = ctx.needs_input_grad
        return dhidden if needs[0] else None, dweight if needs[1] else None, *[None] * 5


class _TwoSweeps(torch.autograd.Function):
    """For the reduction none: each token has its own upstream gradient, which is known only in the backward, so the backward
    computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, options, return_z_loss, backend):
        loss, z_loss, lse = native(_FWD[backend], hidden, weight, labels, token_weights, *options, return_z_loss)
        ctx.save_for_backward(hidden, weight, labels, token_weights, lse)
        ctx.options, ctx.backend = options, backend
        ctx.mark_non_differentiable(z_loss)
        ctx.set_materialize_grads(False)
        return loss, z_loss

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * 7
        hidden, weight, labels, token_weights, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dhidden, dweight = _BWD[ctx.backend](dloss.contiguous(), hidden, weight, labels, token_weights, lse, *ctx.options,
                                             needs[0], needs[1])
        return dhidden if needs[0] else None, dweight if needs[1] else None, *[None] * 5


def linear_cross_entropy(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
                         token_weights=None, reduction="mean", return_z_loss=False, backend=None):
    """The loss of `cross_entropy` for the logits hidden weight^T, without holding the logits in memory.

    Shapes:   hidden [..., D], weight [V, D], labels [...] int64 or int32, token_weights [...] -> loss [] ("mean", "sum") or
              [...] ("none"); with return_z_loss (loss, z_loss)
    Options:  those of `cross_entropy`. token_weights multiply the losses of the tokens, and "mean" divides by the sum of the
              weights of the tokens that count (0 if none counts). token_weights receive no gradient
    Dtypes:   hidden and weight float32 | bfloat16 | float16 | float64, both equal; autocast casts them. Logits, loss and the
              gradient of weight are summed in float32 (float64), and the loss is returned in it
    Backward: mean and sum compute both gradients in the forward, three products in all, and hold them in float32: 4 T D and
              4 V D bytes. The backward multiplies them by the upstream gradient and rounds them once (an infinite or NaN
              upstream reaches ignored rows too). A hidden that is not finite reaches dweight even if its label is ignored.
              "none" saves hidden, weight, labels and lse (8 bytes a token) and recomputes the logits: four products. A frozen
              hidden or weight costs no product and no memory. Deterministic: yes; the forward is batch-invariant
    Errors:   ValueError and TypeError. On CUDA a label outside [0, V) has NaN as loss and gradients, and `check()` reports it
    Cost:     2 T D V flops for each product. Scratch: one chunk of scores, independent of T.
              Source: arXiv:2410.10989 section 3.2
    """
    hidden, weight = check_head("linear_cross_entropy", hidden, weight)
    shape = hidden.shape[:-1]
    labels = check_labels("linear_cross_entropy", "labels", labels, shape, hidden, "hidden")
    options = check_loss_options("linear_cross_entropy", ignore_index, label_smoothing, z_loss, softcap, reduction,
                                 return_z_loss)
    token_weights = check_weights("linear_cross_entropy", token_weights, labels, hidden)
    chosen = LINEAR_CROSS_ENTROPY.select(hidden, backend)
    if chosen == "reference":
        check_values("linear_cross_entropy", "labels", labels, 0, weight.shape[0], ignore_index)
        _, label_smoothing, z_loss, softcap, _ = options
        return reference(hidden, weight, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                         softcap=softcap, token_weights=token_weights, reduction=reduction, return_z_loss=return_z_loss)
    flat, weight, labels = as_matrix(hidden), last_stride_1(weight), labels.view(-1)
    token_weights = None if token_weights is None else token_weights.view(-1)
    if torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad):
        if reduction == "none":
            loss, z = _TwoSweeps.apply(*distinct(flat, weight), labels, token_weights, options, return_z_loss, chosen)
        else:
            loss, z, _ = _OneSweep.apply(*distinct(flat, weight), labels, token_weights, options, return_z_loss, chosen)
    else:
        loss, z, _ = native(_FWD[chosen], flat, weight, labels, token_weights, *options, return_z_loss)
    return shaped_losses(loss, z, shape, reduction, return_z_loss)
