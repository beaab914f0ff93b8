"""Cross-entropy of given logits, its gradient made in the same sweep."""

import torch
import torch.nn.functional as F

from .._autograd import once_differentiable
from .._checks import check_flag, check_float, fail, last_stride_1
from .._registry import Case, Op, Sample
from ._losses import (
    REDUCTIONS,
    accumulator,
    check_label_values,
    check_labels,
    check_number,
    check_reduction,
    losses_of,
    reduced,
)
from .apply_rope import native


def reference(logits, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean",
              inplace_backward=False):
    losses, valid = losses_of(logits.to(accumulator(logits.dtype)), labels, ignore_index, label_smoothing, z_loss, softcap)
    return reduced(losses, valid, reduction)


def _eager(wide):
    """F.cross_entropy on logits converted to float32, or as they are."""
    def composition(logits, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean",
                    inplace_backward=False):
        acc = accumulator(logits.dtype)
        if not labels.numel() or not wide and (z_loss or softcap):
            return reference(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                             softcap=softcap, reduction=reduction)
        x = logits.to(acc) if wide else logits
        x = softcap * torch.tanh(x / softcap) if softcap else x
        flat, flat_labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1).long()
        losses = F.cross_entropy(flat, flat_labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
                                 reduction="none" if z_loss or reduction == "none" else reduction)
        if not z_loss:
            return losses.view(labels.shape if reduction == "none" else ()).to(acc).nan_to_num(0.0)
        valid = flat_labels != ignore_index
        losses = (losses + z_loss * flat.logsumexp(-1).square()) * valid
        return reduced(losses.view(labels.shape), valid.view(labels.shape), reduction)

    return composition


def _fake_fwd(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction):
    acc = accumulator(logits.dtype)
    loss = logits.new_empty(labels.shape if reduction == 0 else (), dtype=acc)
    return loss, logits.new_empty((*labels.shape, 2), dtype=acc)  # lse, and what rounding cut off it


def _fake_grad_fwd(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction):
    return logits.new_empty((), dtype=accumulator(logits.dtype)), logits.new_empty(logits.shape)


def _sample(case, dtype, device, generator):
    dims = case.dims
    rows, cols = dims.get("rows", dims.get("targets")), dims["cols"]
    logits = (3 * torch.randn(rows, cols, generator=generator, device=device)).to(dtype)
    labels = torch.randint(cols, (rows,), generator=generator, device=device)
    if dims.get("ignored"):
        labels[:: 3] = -100
    options = {key: dims[key] for key in ("label_smoothing", "z_loss", "softcap") if dims.get(key)}
    reduction = dims.get("reduction", "mean" if "targets" in dims else "none")
    return Sample({"logits": logits, "labels": labels, "reduction": reduction, **options}, ("logits",))


def _magnitude(sample, upstream):
    """The loss is a difference of log-sum-exp and logit; a gradient near p = 1 is one of probabilities."""
    logits = sample.inputs["logits"]
    if not logits.numel():
        return {}
    mean = sample.inputs["reduction"] == "mean"
    rows = max(int((sample.inputs["labels"] != -100).sum()), 1) if mean else 1
    size = float(logits.abs().max())
    total = size * logits.shape[0] if sample.inputs["reduction"] == "sum" else size
    return {"loss": total, **({"d_logits": float(upstream["loss"].abs().max()) / rows} if upstream else {})}


def _bytes(dims, size, direction):
    """Forward reads the logits; both ways together read them once and write the gradient once."""
    return dims.get("rows", dims.get("targets")) * dims["cols"] * size


CROSS_ENTROPY = Op(
    name="cross_entropy",
    source="logits p = softmax(x), -log p[label]; z-loss: arXiv:2204.02311 section 5; soft-cap: arXiv:2408.00118 section 2",
    summary="cross-entropy of given logits, gradient in the same sweep",
    reference=reference,
    public=lambda *args, **kwargs: cross_entropy(*args, **kwargs),
    schemas={
        "fwd": "(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss, float softcap,"
               " int reduction) -> (Tensor loss, Tensor lse)",
        "grad_fwd": "(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss, float softcap,"
                    " int reduction) -> (Tensor loss, Tensor dlogits)",
        "bwd": "(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int ignore_index, float label_smoothing,"
               " float z_loss, float softcap, int reduction) -> Tensor",
        "bwd_": "(Tensor dloss, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index, float label_smoothing,"
                " float z_loss, float softcap, int reduction) -> ()",
        "scale_bwd": "(Tensor dloss, Tensor dlogits) -> Tensor",
    },
    fakes={"fwd": _fake_fwd, "grad_fwd": _fake_grad_fwd, "bwd_": lambda *args: None,
           "bwd": lambda dloss, logits, *rest: logits.new_empty(logits.shape),
           "scale_bwd": lambda dloss, dlogits: dlogits.new_empty(dlogits.shape)},
    outputs=("loss",),
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 5, "cols": 64}),
        Case("smoke", {"rows": 33, "cols": 129, "ignored": True, "label_smoothing": 0.1, "z_loss": 1e-3}),
        Case("smoke", {"targets": 17, "cols": 1000, "ignored": True, "label_smoothing": 0.1, "z_loss": 1e-3}),
        Case("smoke", {"targets": 9, "cols": 257, "softcap": 5.0, "reduction": "sum"}),
        Case("edge", {"rows": 0, "cols": 64}),
        Case("edge", {"targets": 0, "cols": 64}),
        Case("edge", {"rows": 1, "cols": 1}),
        Case("edge", {"targets": 1, "cols": 5, "ignored": True}),
        Case("edge", {"rows": 3, "cols": 4099, "softcap": 30.0}),
        Case("edge", {"targets": 65, "cols": 31, "softcap": 2.0, "z_loss": 0.01, "label_smoothing": 0.2}),
        Case("model", {"targets": 1024, "cols": 92544}),
        Case("gpu", {"targets": 16384, "cols": 92544}),
    ),
    eager={"F.cross_entropy(logits.float())": _eager(True), "F.cross_entropy(logits)": _eager(False)},
    batched=("logits", "labels"),
    bytes=_bytes,
    flops=lambda dims, direction: 6 * dims.get("rows", dims.get("targets")) * dims["cols"],
    magnitude=_magnitude,
    domain={"targets": (0, 40, 1)},
)
_FWD, _GRAD, _BWD, _BWD_, _SCALE = (CROSS_ENTROPY.overloads[name] for name in ("fwd", "grad_fwd", "bwd", "bwd_", "scale_bwd"))


def is_one(dloss):
    """Whether an upstream is known to be 1 without waiting for a device: gradients made for 1 are then right as they are."""
    if type(dloss) is not torch.Tensor or dloss.device.type != "cpu":  # fake and other tensors have no number to look at
        return False
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and dloss.item() == 1.0


def gives_away():
    """Whether saved gradients may leave as results, to be written by whoever gets them: no second backward will ask again."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class _OneSweep(torch.autograd.Function):
    """mean and sum: the gradient is made with the loss, up to the upstream's factor."""

    @staticmethod
    def forward(ctx, logits, labels, options, backend):
        loss, dlogits = native(_GRAD[backend], logits, labels, *options)
        link = logits.new_empty(0)  # an empty result: what ties the saved gradient to logits without keeping them
        ctx.save_for_backward(dlogits, link)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return loss, link

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * 4
        dlogits, _ = ctx.saved_tensors
        return dlogits if is_one(dloss) and gives_away() else _SCALE[ctx.backend](dloss, dlogits), None, None, None


class _TwoSweeps(torch.autograd.Function):
    """The gradient is computed from the logits and their lse, into fresh memory or over the logits.

    exp(l - lse) takes the rounding of lse, |lse| / 2 eps, as a relative error: so lse is kept with what rounding cut off it.
    """

    @staticmethod
    def forward(ctx, logits, labels, options, inplace, backend):
        loss, lse = native(_FWD[backend], logits, labels, *options)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options, ctx.inplace, ctx.backend = options, inplace, backend
        return loss

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(ctx, dloss):
        logits, labels, lse = ctx.saved_tensors
        dloss = dloss.contiguous()
        if ctx.inplace and not torch.compiler.is_compiling():
            _BWD_[ctx.backend](dloss, logits, labels, lse, *ctx.options)
            torch.autograd.graph.increment_version(logits)
            return logits, None, None, None, None
        return _BWD[ctx.backend](dloss, logits, labels, lse, *ctx.options), None, None, None, None


def check_loss_options(op, label_smoothing, z_loss, softcap):
    return (check_number(op, "label_smoothing", label_smoothing, "a number from 0 to 1", lambda v: 0 <= v <= 1),
            check_number(op, "z_loss", z_loss, "a finite number >= 0", lambda v: v >= 0),
            check_number(op, "softcap", softcap, "0 (none) or a finite number > 0", lambda v: v == 0 or 1e-30 < v < 1e30))


def check_ignore_index(op, ignore_index):
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool) or not -2**31 <= ignore_index < 2**31:
        fail(ValueError, op, "ignore_index", "an integer of 32 bits", repr(ignore_index))
    return ignore_index


def cross_entropy(logits, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean",
                  inplace_backward=False, backend=None):
    """Cross-entropy: loss_t = (1 - e) (lse_t - l_ty) + e (lse_t - mean_j l_tj) + z lse_t^2, lse_t = log sum_j exp(l_tj).

    Shapes:   logits [..., V], labels [...] int64 or int32 -> loss [] ("mean", "sum") or [...] ("none")
    Options:  e = label_smoothing, z = z_loss; softcap c > 0: l = c tanh(logits / c). Rows whose label is ignore_index have
              loss 0 and gradient 0 and do not count in the mean; if none counts, the loss is 0. inplace_backward: the
              gradient is written over the logits, whose later use by another backward autograd then refuses; compiled
              code plans its own memory and does not
    Dtypes:   logits float32 | bfloat16 | float16 | float64; computed in float32 (float64), which is the loss's dtype
    Backward: mean and sum make the gradient in the forward (one read, one write) and save it: the bytes of logits. An
              upstream other than 1 multiplies it, into memory of its own: one pass and the bytes of logits more (none on
              CPU for 1, unless the graph is kept), in which inf or NaN reaches ignored rows too. "none", float16 and
              inplace_backward save logits and lse in two parts (8 bytes a row; float64: 16) and read the logits again.
              Deterministic: yes, and batch-invariant
    Errors:   ValueError, TypeError; a label outside [0, V) that is not ignore_index raises on CPU before memory is touched;
              on CUDA its row becomes NaN and `internlm2_kernels.check()` reports it
    Cost:     memory-bound: one read forward, one read and one write with gradient.
              Source: arXiv:2204.02311 section 5 (z-loss), arXiv:2408.00118 section 2 (soft-cap)
    """
    check_float("cross_entropy", "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        fail(ValueError, "cross_entropy", "logits", "a last dimension of at least 1", list(logits.shape))
    shape, classes = logits.shape[:-1], logits.shape[-1]
    labels = check_labels("cross_entropy", "labels", labels, shape, logits, "logits")
    ignore_index = check_ignore_index("cross_entropy", ignore_index)
    smoothing, z_loss, softcap = check_loss_options("cross_entropy", label_smoothing, z_loss, softcap)
    check_flag("cross_entropy", "inplace_backward", inplace_backward)
    code = check_reduction("cross_entropy", reduction)
    chosen = CROSS_ENTROPY.select(logits, backend)
    if chosen == "reference":
        check_label_values("cross_entropy", "labels", labels, classes, ignore_index)
        return reference(logits, labels, ignore_index=ignore_index, label_smoothing=smoothing, z_loss=z_loss, softcap=softcap,
                         reduction=reduction)
    flat = last_stride_1(logits if logits.dim() == 2 else logits.reshape(-1, classes))
    labels = labels.view(-1)
    options = ignore_index, smoothing, z_loss, softcap, code
    if torch.is_grad_enabled() and logits.requires_grad:
        if inplace_backward and flat.shape[0] > 1 and flat.stride(0) < classes:
            flat = flat.contiguous()  # rows that share memory cannot each be given their gradient
        if code == REDUCTIONS["none"] or inplace_backward or logits.dtype == torch.float16:
            loss = _TwoSweeps.apply(flat, labels, options, inplace_backward, chosen)
        else:
            loss, _ = _OneSweep.apply(flat, labels, options, chosen)
    else:
        loss = native(_FWD[chosen], flat, labels, *options)[0]
    return loss.view(shape) if code == REDUCTIONS["none"] else loss
