"""Cross-entropy of given logits, which computes its gradient in the same pass."""

import torch

from .._autograd import is_one, may_return_saved, once_differentiable
from .._checks import check_flag, check_float, check_labels, check_values, fail, last_stride_1
from .._device_errors import Index
from .._native import native
from .._registry import Op
from ._losses import accumulator, check_loss_options, fake_losses, losses_of, reduced_losses, shaped_losses


def reference(logits, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean",
              return_z_loss=False, inplace_backward=False):
    parts = losses_of(logits.to(accumulator(logits.dtype)), labels, ignore_index, label_smoothing, z_loss, softcap)
    return reduced_losses(*parts, reduction, None, return_z_loss)


def _fake_fwd(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction, return_z_loss):
    lse = logits.new_empty((*labels.shape, 2), dtype=accumulator(logits.dtype))  # (max, log sum exp(logit - max))
    return *fake_losses(logits, labels, reduction, return_z_loss), lse


def _fake_grad_fwd(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction, return_z_loss):
    return *fake_losses(logits, labels, reduction, return_z_loss), logits.new_empty(logits.shape)


CROSS_ENTROPY = Op(
    name="cross_entropy",
    source="logits p = softmax(x), -log p[label]; z-loss: arXiv:2204.02311 section 5; soft-cap: arXiv:2408.00118 section 2",
    summary="cross-entropy of given logits, gradient in the same sweep",
    reference=reference,
    schemas={
        "fwd": "(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss, float softcap,"
               " int reduction, bool return_z_loss) -> (Tensor loss, Tensor z_loss, Tensor lse)",
        "grad_fwd": "(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss, float softcap,"
                    " int reduction, bool return_z_loss) -> (Tensor loss, Tensor z_loss, Tensor dlogits)",
        "bwd": "(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int ignore_index, float label_smoothing,"
               " float z_loss, float softcap, int reduction) -> Tensor",
        "bwd_": "(Tensor dloss, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index, float label_smoothing,"
                " float z_loss, float softcap, int reduction) -> ()",
        "scale_bwd": "(Tensor dloss, Tensor dlogits) -> Tensor",
    },
    fakes={"fwd": _fake_fwd, "grad_fwd": _fake_grad_fwd, "bwd_": lambda *args: None,
           "bwd": lambda dloss, logits, *rest: logits.new_empty(logits.shape),
           "scale_bwd": lambda dloss, dlogits: dlogits.new_empty(dlogits.shape)},
    outputs=("loss", "z_loss"),
    indices={"labels": Index(1 << 8, "values from 0 to V - 1 or ignore_index",
                             "the losses and gradients of those tokens are NaN")},
)
_FWD, _GRAD, _BWD, _BWD_, _SCALE = (CROSS_ENTROPY.overloads[name] for name in ("fwd", "grad_fwd", "bwd", "bwd_", "scale_bwd"))


class _OneSweep(torch.autograd.Function):
    """For the reductions mean and sum: the forward also computes the gradient, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx, logits, labels, options, return_z_loss, backend):
        loss, z_loss, dlogits = native(_GRAD[backend], logits, labels, *options, return_z_loss)
        link = logits.new_empty(0)  # an empty result that ties the saved gradient to the graph without keeping the logits
        ctx.save_for_backward(dlogits, link)
        ctx.backend = backend
        ctx.mark_non_differentiable(z_loss)
        ctx.set_materialize_grads(False)
        return loss, z_loss, link

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 5
        dlogits, _ = ctx.saved_tensors
        return dlogits if is_one(dloss) and may_return_saved() else _SCALE[ctx.backend](dloss, dlogits), *[None] * 4


class _TwoSweeps(torch.autograd.Function):
    """The backward computes the gradient from the saved logits and their lse, into new memory or over the logits.

    The lse of a row is saved as two numbers, the maximum and the log of the sum of exp(logit - maximum). Their sum would be
    rounded, which would be a relative error of the probabilities.
    """

    @staticmethod
    def forward(ctx, logits, labels, options, return_z_loss, inplace, backend):
        loss, z_loss, lse = native(_FWD[backend], logits, labels, *options, return_z_loss)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options, ctx.inplace, ctx.backend = options, inplace, backend
        ctx.mark_non_differentiable(z_loss)
        ctx.set_materialize_grads(False)
        return loss, z_loss

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * 6
        logits, labels, lse = ctx.saved_tensors
        dloss = dloss.contiguous()
        if ctx.inplace and not torch.compiler.is_compiling():
            _BWD_[ctx.backend](dloss, logits, labels, lse, *ctx.options)
            torch.autograd.graph.increment_version(logits)
            return logits, *[None] * 5
        return _BWD[ctx.backend](dloss, logits, labels, lse, *ctx.options), *[None] * 5


def cross_entropy(logits, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean",
                  return_z_loss=False, inplace_backward=False, backend=None):
    """Cross-entropy: loss_t = (1 - e) (lse_t - l_ty) + e (lse_t - mean_j l_tj) + z lse_t^2, with lse_t = log sum_j exp(l_tj).

    Shapes:   logits [..., V], labels [...] int64 or int32 -> loss [] ("mean", "sum") or [...] ("none"). With return_z_loss
              (loss, z_loss): z_loss is the weighted term z lse_t^2 of the loss, as Liger and flash-attention return it,
              reduced alike and detached, for logging
    Options:  e = label_smoothing, z = z_loss. softcap c > 0: l = c tanh(logits / c). Rows whose label is ignore_index have loss
              0 and gradient 0 and do not count in the mean; the mean of no rows is 0. inplace_backward writes the gradient
              over the logits (not in compiled code), and autograd then refuses a backward that needs them
    Dtypes:   logits float32 | bfloat16 | float16 | float64; computed and returned in float32 (float64)
    Backward: mean and sum compute the gradient in the forward and save it, in the logits' dtype. An upstream gradient other
              than 1 (on CUDA any) multiplies it into new memory; if it is infinite or NaN it reaches ignored rows too. "none",
              float16 and inplace_backward save logits and lse (8 bytes a row, 16 for float64) and read the logits again.
              Deterministic: yes, and batch-invariant
    Errors:   ValueError and TypeError. On CUDA a label outside [0, V) makes its row NaN, and `check()` reports it
    Cost:     memory-bound: one read forward; one read and one write with the gradient.
              Source: arXiv:2204.02311 section 5 (z-loss), arXiv:2408.00118 section 2 (soft-cap)
    """
    check_float("cross_entropy", "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        fail(ValueError, "cross_entropy", "logits", "a last dimension of at least 1", list(logits.shape))
    shape, classes = logits.shape[:-1], logits.shape[-1]
    labels = check_labels("cross_entropy", "labels", labels, shape, logits, "logits")
    options = check_loss_options("cross_entropy", ignore_index, label_smoothing, z_loss, softcap, reduction, return_z_loss)
    check_flag("cross_entropy", "inplace_backward", inplace_backward)
    chosen = CROSS_ENTROPY.select(logits, backend)
    if chosen == "reference":
        check_values("cross_entropy", "labels", labels, 0, classes, ignore_index)
        _, label_smoothing, z_loss, softcap, _ = options
        return reference(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                         softcap=softcap, reduction=reduction, return_z_loss=return_z_loss)
    flat = last_stride_1(logits if logits.dim() == 2 else logits.reshape(-1, classes))
    labels = labels.view(-1)
    if torch.is_grad_enabled() and logits.requires_grad:
        if inplace_backward and flat.shape[0] > 1 and flat.stride(0) < classes:
            flat = flat.contiguous()  # where rows overlap in memory (an expanded tensor), it cannot hold their gradients
        if reduction == "none" or inplace_backward or logits.dtype == torch.float16:
            loss, z = _TwoSweeps.apply(flat, labels, options, return_z_loss, inplace_backward, chosen)
        else:
            loss, z, _ = _OneSweep.apply(flat, labels, options, return_z_loss, chosen)
    else:
        loss, z, _ = native(_FWD[chosen], flat, labels, *options, return_z_loss)
    return shaped_losses(loss, z, shape, reduction, return_z_loss)
