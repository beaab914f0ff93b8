"""Workload of `linear_cross_entropy`."""

import torch
import torch.nn.functional as F

from ..ops._losses import accumulator, losses_of, reduced_losses
from . import Case, Sample, Workload


def _eager(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, token_weights=None,
           reduction="mean", return_z_loss=False):
    logits = F.linear(hidden, weight).to(accumulator(hidden.dtype))
    if token_weights is None and not (z_loss or return_z_loss or softcap) and labels.numel():
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1).long(), ignore_index=ignore_index,
                               label_smoothing=label_smoothing, reduction=reduction)
        return loss.view(labels.shape if reduction == "none" else ()).nan_to_num(0.0)
    parts = losses_of(logits, labels, ignore_index, label_smoothing, z_loss, softcap)
    return reduced_losses(*parts, reduction, token_weights, return_z_loss)


def _torch_linear(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
                  token_weights=None, reduction="mean", return_z_loss=False):
    """F.linear_cross_entropy, PyTorch's own chunked form, which exists from torch 2.13 on."""
    more = token_weights is not None or z_loss or return_z_loss or softcap  # PyTorch's form does not offer these
    if not hasattr(F, "linear_cross_entropy") or more or not labels.numel():
        return _eager(hidden, weight, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                      softcap=softcap, token_weights=token_weights, reduction=reduction, return_z_loss=return_z_loss)
    loss = F.linear_cross_entropy(hidden.view(-1, hidden.shape[-1]), weight, labels.view(-1).long(), ignore_index=ignore_index,
                                  label_smoothing=label_smoothing, reduction=reduction)
    return loss.view(labels.shape if reduction == "none" else ()).to(accumulator(hidden.dtype)).nan_to_num(0.0)


def head_sample(case, dtype, device, generator):
    """hidden, weight and labels whose logits are as large as those of trained models."""
    dims = case.dims
    rows, cols, vocab = dims.get("rows", dims.get("targets")), dims["cols"], dims["vocab"]
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    hidden, weight = draw(rows, cols).to(dtype), (2 * draw(vocab, cols) * cols**-0.5).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    # The largest entries of dweight are in the rows of labels. With these two labels the first and the last row are among them.
    if rows > 2:
        labels[0], labels[2] = vocab - 1, 0
    return hidden, weight, labels


def _sample(case, dtype, device, generator):
    dims = case.dims
    hidden, weight, labels = head_sample(case, dtype, device, generator)
    options = {key: dims[key] for key in ("label_smoothing", "z_loss", "return_z_loss", "softcap") if dims.get(key)}
    if dims.get("ignored"):
        labels[1:: 3] = -100
    if dims.get("weighted"):
        weights = torch.rand(labels.shape, generator=generator, device=device)
        options["token_weights"] = weights.to(accumulator(dtype))
    reduction = dims.get("reduction", "mean" if "targets" in dims else "none")
    return Sample({"hidden": hidden, "weight": weight, "labels": labels, "reduction": reduction, **options},
                  ("hidden", "weight"))


def logit_error(hidden, weight):
    """The typical error of the largest logit, in units of eps: the root of the sum of its squared terms. It is also the
    relative error of a probability, and so of a gradient that is computed from it."""
    return float((hidden.square() @ weight.square().T).max().sqrt())


def _magnitude(sample, upstream):
    """The size of the terms that cancel in the loss and in the gradients, by name: the error ladder (testing.py) takes it as
    the scale of the allowed error where it is larger than the result itself.

    Logits are sums over the hidden size, gradients are sums over the vocabulary or the tokens, all with terms of both signs.
    """
    hidden, weight, labels = (sample.inputs[name] for name in ("hidden", "weight", "labels"))
    if not labels.numel():
        return {}
    size = float((hidden.abs() @ weight.abs().T).max())
    mean = sample.inputs["reduction"] == "mean"
    rows = max(int((labels != -100).sum()), 1) if mean else 1
    total = labels.numel() if sample.inputs["reduction"] == "sum" else 1
    sizes = {"loss": size * total}
    if upstream:
        each = float(upstream["loss"].abs().max()) / rows * (1 + logit_error(hidden, weight))
        sizes |= {"d_hidden": each * float(weight.abs().max()), "d_weight": each * float(hidden.abs().max())}
    return sizes


def head_bytes(dims, size, direction):
    rows, cols, vocab = dims.get("rows", dims.get("targets")), dims["cols"], dims["vocab"]
    return (rows * cols + vocab * cols) * size * (1 if direction == "forward" else 2)


def head_flops(dims, direction):
    products = 1 if direction == "forward" else 2
    return 2 * products * dims.get("rows", dims.get("targets")) * dims["cols"] * dims["vocab"]


HEAD_CASES = (
    Case("edge", {"rows": 0, "cols": 16, "vocab": 40}),
    Case("edge", {"rows": 1, "cols": 1, "vocab": 1}),
    Case("edge", {"rows": 7, "cols": 33, "vocab": 1031}),
    Case("edge", {"rows": 3, "cols": 130, "vocab": 17}),
)


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 5, "cols": 64, "vocab": 100}),
        Case("smoke", {"targets": 33, "cols": 48, "vocab": 517, "ignored": True, "label_smoothing": 0.1, "z_loss": 1e-3,
                       "return_z_loss": True}),
        Case("smoke", {"rows": 20, "cols": 32, "vocab": 129, "softcap": 3.0, "ignored": True, "weighted": True, "z_loss": 1e-3,
                       "return_z_loss": True}),
        Case("smoke", {"targets": 9, "cols": 40, "vocab": 257, "weighted": True, "softcap": 20.0}),
        *HEAD_CASES,
        Case("edge", {"targets": 1, "cols": 5, "vocab": 9, "weighted": True, "reduction": "sum"}),
        Case("edge", {"targets": 0, "cols": 8, "vocab": 9}),
        Case("model", {"targets": 2048, "cols": 2048, "vocab": 92544}, ("training",), (torch.bfloat16,)),
        Case("model", {"targets": 512, "cols": 2048, "vocab": 92544}, ("training",), (torch.float32,)),
        Case("gpu", {"targets": 8192, "cols": 4096, "vocab": 92544}, ("training",), (torch.bfloat16,)),
    ),
    eager={"F.cross_entropy(F.linear)": _eager, "F.linear_cross_entropy": _torch_linear},
    batched=("hidden", "labels", "token_weights"),
    bytes=head_bytes,
    flops=head_flops,
    magnitude=_magnitude,
    domain={"targets": (0, 40, 1), "vocab": (1, 300, 1)},
)
