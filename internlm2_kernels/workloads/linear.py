"""Workload of `linear`."""

import torch
import torch.nn.functional as F

from ..ops._losses import accumulator
from . import Case, Sample, Workload


def _eager(x, weight, bias=None, *, residual=None, out_dtype=None, pieces=None):
    """PyTorch's product. It is rounded before a residual is added. Results that are not rounded need float32 operands."""
    wide = out_dtype is not None and out_dtype != x.dtype
    dtype = accumulator(x.dtype) if wide else x.dtype
    y = F.linear(x.to(dtype), weight.to(x.dtype).to(dtype), None if bias is None else bias.to(dtype))
    return y if residual is None else y + residual


def _sample(case, dtype, device, generator):
    rows, cols, out = (case.dims[name] for name in ("rows", "cols", "out"))
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    inputs = {"x": draw(rows, cols).to(dtype), "weight": (draw(out, cols) / cols**0.5).to(dtype)}
    if case.dims.get("bias"):
        inputs["bias"] = draw(out).to(dtype)
    if case.dims.get("residual"):
        inputs["residual"] = draw(rows, out).to(dtype)
    if "pieces" in case.dims:
        inputs["pieces"] = case.dims["pieces"]
    return Sample(inputs, tuple(name for name in ("x", "weight", "bias", "residual") if name in inputs))


def _magnitude(sample, upstream):
    """The size of the terms that cancel in the sums: those of y and dx in every element, those of dweight over the rows."""
    x, weight = sample.inputs["x"], sample.inputs["weight"]
    if not x.numel() or not weight.numel():
        return {}
    sizes = {"y": float((x.abs() @ weight.abs().T).max())}
    for dy in upstream.values():
        sizes |= {"d_x": float((dy.abs() @ weight.abs()).max()), "d_weight": float((dy.abs().T @ x.abs()).max()),
                  "d_bias": float(dy.abs().sum(0).max())}
    return sizes


def _bytes(dims, size, direction):
    rows, cols, out = dims["rows"], dims["cols"], dims["out"]
    forward = rows * cols + out * cols + rows * out * (2 if dims.get("residual") else 1)
    return size * (forward if direction == "forward" else 2 * rows * cols + 2 * out * cols + rows * out)


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 5, "cols": 64, "out": 40, "bias": True}),
        Case("smoke", {"rows": 33, "cols": 200, "out": 129, "residual": True}),
        Case("smoke", {"rows": 18, "cols": 96, "out": 70, "bias": True, "pieces": 2}),
        Case("edge", {"rows": 0, "cols": 8, "out": 5, "bias": True}),
        Case("edge", {"rows": 3, "cols": 1, "out": 1}),
        Case("edge", {"rows": 1, "cols": 65, "out": 17, "bias": True}),
        Case("edge", {"rows": 9, "cols": 513, "out": 31}),
        Case("edge", {"rows": 70, "cols": 33, "out": 3, "residual": True, "pieces": 1}),
        *(Case("model", {"rows": rows, "cols": cols, "out": out}, passes=("forward",))
          for rows in (1, 8, 64) for cols, out in ((2048, 8192), (4096, 4096), (14336, 4096))),
        *(Case("model", {"rows": rows, "cols": cols, "out": out}) for rows in (256, 2048)
          for cols, out in ((2048, 8192), (8192, 2048), (4096, 6144))),
        *(Case("gpu", {"rows": rows, "cols": cols, "out": out}) for rows in (1, 16, 8192)
          for cols, out in ((4096, 6144), (4096, 14336), (14336, 4096))),
    ),
    eager={"F.linear": _eager},
    batched=("x", "residual"),
    bytes=_bytes,
    flops=lambda dims, direction: (2 if direction == "forward" else 4) * dims["rows"] * dims["cols"] * dims["out"],
    magnitude=_magnitude,
    domain={"out": (1, 150, 1), "cols": (1, 300, 1)},
)
