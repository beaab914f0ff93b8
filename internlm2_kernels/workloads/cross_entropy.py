"""Workload of `cross_entropy`."""

import torch
import torch.nn.functional as F

from ..ops._losses import accumulator, reduced_losses
from ..ops.cross_entropy import reference
from . import Case, Sample, Workload


def _eager(wide):
    """F.cross_entropy on the logits, which are converted to float32 first if `wide` is set."""
    def composition(logits, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean",
                    return_z_loss=False, inplace_backward=False):
        acc = accumulator(logits.dtype)
        if not labels.numel() or not wide and (z_loss or softcap):
            return reference(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                             softcap=softcap, reduction=reduction, return_z_loss=return_z_loss)
        x = logits.to(acc) if wide else logits
        x = softcap * torch.tanh(x / softcap) if softcap else x
        flat, flat_labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1).long()
        losses = F.cross_entropy(flat, flat_labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
                                 reduction="none" if z_loss or return_z_loss or reduction == "none" else reduction)
        if not (z_loss or return_z_loss):
            return losses.view(labels.shape if reduction == "none" else ()).to(acc).nan_to_num(0.0)
        valid = flat_labels != ignore_index
        z_losses = z_loss * flat.logsumexp(-1).square() * valid
        each, valid = (losses + z_losses).view(labels.shape), valid.view(labels.shape)
        return reduced_losses(each, z_losses.detach().view(labels.shape), valid, reduction, None, return_z_loss)

    return composition


def _sample(case, dtype, device, generator):
    dims = case.dims
    rows, cols = dims.get("rows", dims.get("targets")), dims["cols"]
    logits = (3 * torch.randn(rows, cols, generator=generator, device=device)).to(dtype)
    labels = torch.randint(cols, (rows,), generator=generator, device=device)
    if dims.get("ignored"):
        labels[:: 3] = -100
    options = {key: dims[key] for key in ("label_smoothing", "z_loss", "return_z_loss", "softcap") if dims.get(key)}
    reduction = dims.get("reduction", "mean" if "targets" in dims else "none")
    return Sample({"logits": logits, "labels": labels, "reduction": reduction, **options}, ("logits",))


def _magnitude(sample, upstream):
    """The size of the terms that cancel in the loss and in its gradient, by name: the error ladder (testing.py) takes it as
    the scale of the allowed error where it is larger than the result itself.

    The loss is the log-sum-exp less the label's logit; the label's entry of the gradient is p - 1, where p may be close to 1.
    """
    logits = sample.inputs["logits"]
    if not logits.numel():
        return {}
    mean = sample.inputs["reduction"] == "mean"
    rows = max(int((sample.inputs["labels"] != -100).sum()), 1) if mean else 1
    size = float(logits.abs().max())
    total = size * logits.shape[0] if sample.inputs["reduction"] == "sum" else size
    return {"loss": total, **({"d_logits": float(upstream["loss"].abs().max()) / rows} if upstream else {})}


def _bytes(dims, size, direction):
    """The size of the logits in bytes. The forward reads them once; the call with a gradient adds one write of that size."""
    return dims.get("rows", dims.get("targets")) * dims["cols"] * size


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 5, "cols": 64}),
        Case("smoke", {"rows": 33, "cols": 129, "ignored": True, "label_smoothing": 0.1, "z_loss": 1e-3,
                       "return_z_loss": True}),
        Case("smoke", {"targets": 17, "cols": 1000, "ignored": True, "label_smoothing": 0.1, "z_loss": 1e-3,
                       "return_z_loss": True}),
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
