"""Workload of `focal_ranking_loss`."""

import torch
import torch.nn.functional as F

from ..ops._losses import accumulator
from . import Case, Sample, Workload


def eager(chosen, rejected, *, gamma=2.0):
    d = chosen.to(accumulator(chosen.dtype)) - rejected.to(accumulator(rejected.dtype))
    p = torch.sigmoid(d)
    return -((1 - 2 * torch.clamp(p - 0.5, min=0)) ** gamma) * F.logsigmoid(d)


def _sample(case, dtype, device, generator):
    draw = lambda: 3 * torch.randn(case.dims["rows"], generator=generator, device=device)
    options = {"gamma": case.dims["gamma"]} if "gamma" in case.dims else {}
    return Sample({"chosen": draw().to(dtype), "rejected": draw().to(dtype), **options}, ("chosen", "rejected"))


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 37}),
        Case("smoke", {"rows": 64, "gamma": 0.5}),
        Case("edge", {"rows": 0}),
        Case("edge", {"rows": 1, "gamma": 0.0}),
        Case("edge", {"rows": 1031, "gamma": 3.0}),
        Case("model", {"rows": 65536}),
    ),
    eager={"sigmoid form": eager},
    batched=("chosen", "rejected"),
    bytes=lambda dims, size, direction: dims["rows"] * (2 * size + 4 if direction == "forward" else 4 * size + 4),
    flops=lambda dims, direction: 20 * dims["rows"],
    magnitude=lambda sample, upstream: {"loss": 1.0, **{f"d_{name}": float(upstream["loss"].abs().max())
                                                        for name in sample.grad if upstream and upstream["loss"].numel()}},
)
