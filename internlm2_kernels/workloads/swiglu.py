"""Workload of `swiglu`."""

import torch
import torch.nn.functional as F

from . import Case, Sample, Workload


def _eager(gate, up=None):
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.silu(gate) * up


def _sample(case, dtype, device, generator):
    rows, cols = case.dims["rows"], case.dims["cols"]
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)
    if case.dims.get("packed"):
        return Sample({"gate": 3 * draw(rows, 2 * cols)}, ("gate",))
    return Sample({"gate": 3 * draw(rows, cols), "up": draw(rows, cols)}, ("gate", "up"))


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 5, "cols": 64}),
        Case("smoke", {"rows": 33, "cols": 129, "packed": True}),
        Case("edge", {"rows": 0, "cols": 64}),
        Case("edge", {"rows": 0, "cols": 8, "packed": True}),
        Case("edge", {"rows": 1, "cols": 1, "packed": True}),
        Case("edge", {"rows": 65, "cols": 31}),
        Case("edge", {"rows": 3, "cols": 1025, "packed": True}),
        *(Case("model", {"rows": 4096, "cols": cols}) for cols in (8192, 14336)),
        *(Case("gpu", {"rows": 16384, "cols": cols}) for cols in (8192, 14336, 16384)),
        Case("model", {"rows": 4096, "cols": 8192, "packed": True}),
    ),
    eager={"F.silu(gate) * up": _eager},
    batched=("gate", "up"),
    bytes=lambda dims, size, direction: (3 if direction == "forward" else 5) * dims["rows"] * dims["cols"] * size,
    flops=lambda dims, direction: (5 if direction == "forward" else 12) * dims["rows"] * dims["cols"],
)
