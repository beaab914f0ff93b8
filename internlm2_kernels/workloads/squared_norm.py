"""Workload of `squared_norm`."""

import torch

from ..ops.squared_norm import _listed
from . import Case, Sample, Workload


def _eager(tensors):
    tensors = _listed(tensors)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack([torch.linalg.vector_norm(t.detach().to(wide)).square() for t in tensors]).sum()


WORKLOAD = Workload(
    sample=lambda case, dtype, device, generator: Sample(
        {"tensors": torch.randn(case.dims["elements"], generator=generator, device=device).to(dtype)}),
    cases=(
        Case("smoke", {"elements": 1000}),
        Case("edge", {"elements": 0}),
        Case("edge", {"elements": 1}),
        Case("edge", {"elements": 70001}),
        Case("model", {"elements": 2**26}),
    ),
    eager={"vector_norm": _eager},
    batched=("tensors",),
    bytes=lambda dims, size, direction: dims["elements"] * size,
    flops=lambda dims, direction: 2 * dims["elements"],
    rowwise=False,
    domain={"elements": (0, 3000, 1)},
)
