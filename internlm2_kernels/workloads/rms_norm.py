"""Workload of `rms_norm`."""

import torch
import torch.nn.functional as F

from . import Case, Sample, Workload


def _eager_functional(x, weight, eps=1e-5, residual=None, *, rounding="once"):
    if rounding == "hf":
        return _eager_explicit(x, weight, eps, residual, rounding=rounding)
    h = x if residual is None else x + residual
    if weight.dtype == h.dtype:
        y = F.rms_norm(h, weight.shape, weight, eps)
    else:
        y = F.rms_norm(h.to(weight.dtype), weight.shape, weight, eps).to(h.dtype)
    return y if residual is None else (y, h)


def _eager_explicit(x, weight, eps=1e-5, residual=None, *, rounding="once"):
    h = x if residual is None else x + residual
    x_hat = h.float() if h.dtype != torch.float64 else h
    x_hat = x_hat * torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    y = (weight * x_hat.to(h.dtype)).to(h.dtype)
    return y if residual is None else (y, h)


def _sample(case, dtype, device, generator):
    rows, cols = case.dims["rows"], case.dims["cols"]
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    weight_dtype = torch.float32 if case.dims.get("weight") == "float32" and dtype != torch.float64 else dtype
    inputs = {"x": draw(rows, cols).to(dtype), "weight": (1 + 0.1 * draw(cols)).to(weight_dtype)}
    if case.dims.get("residual"):
        inputs["residual"] = draw(rows, cols).to(dtype)
    if "rounding" in case.dims:
        inputs["rounding"] = case.dims["rounding"]
    return Sample(inputs, tuple(name for name in ("x", "weight", "residual") if name in inputs))


def _magnitude(sample, upstream):
    """The size of the terms that cancel in each gradient, by the argument's name: the error ladder (testing.py) takes it as
    the scale of the allowed error where it is larger than the gradient itself.

    dx is a difference of two terms of size rstd * |dy * weight|, which cancel when rows are short. dweight is a sum over rows
    with terms of both signs; its magnitude is the root of the sum of their squares.
    """
    x, weight = sample.inputs["x"], sample.inputs["weight"]
    h = x + sample.inputs["residual"] if "residual" in sample.inputs else x
    if h.numel() == 0:
        return {}
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    size = float((rstd * upstream["y"] * weight).abs().max())
    if "new_residual" in upstream:
        size += float(upstream["new_residual"].abs().max())
    terms = (upstream["y"] * h * rstd).flatten(0, -2)
    return {"x": size, "residual": size, "weight": float(terms.square().sum(0).sqrt().max())}


def _bytes(dims, size, direction):
    tensors = (2 if direction == "forward" else 3) + (2 * bool(dims.get("residual")) if direction == "forward" else 0)
    tensors += int(bool(dims.get("residual")) and direction == "backward")
    return tensors * dims["rows"] * dims["cols"] * size + 4 * dims["rows"]


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 4, "cols": 64}),
        Case("smoke", {"rows": 33, "cols": 129, "residual": True}),
        Case("smoke", {"rows": 9, "cols": 96, "rounding": "hf"}),
        Case("smoke", {"rows": 70, "cols": 256, "residual": True, "weight": "float32"}),
        Case("edge", {"rows": 0, "cols": 64, "residual": True}),
        Case("edge", {"rows": 1, "cols": 1}),
        Case("edge", {"rows": 13, "cols": 1, "residual": True, "rounding": "hf"}),
        Case("edge", {"rows": 1, "cols": 1023}),
        Case("edge", {"rows": 65, "cols": 17}),
        Case("edge", {"rows": 131, "cols": 31, "rounding": "hf", "weight": "float32"}),
        Case("edge", {"rows": 3, "cols": 2053}),
        *(Case(kind, {"rows": rows, "cols": cols, "residual": residual}) for kind, rows in (("model", 4096), ("gpu", 16384))
          for residual in (False, True) for cols in (2048, 4096, 6144)),
    ),
    eager={"F.rms_norm": _eager_functional, "explicit": _eager_explicit},
    batched=("x", "residual"),
    bytes=_bytes,
    flops=lambda dims, direction: (4 if direction == "forward" else 9) * dims["rows"] * dims["cols"],
    magnitude=_magnitude,
)
