"""Workload of `ppo_value_loss`."""

import torch

from ..ops._losses import accumulator
from . import Case
from ._ppo import masked_workload


def _eager(values, old_values, returns, mask, *, clip=None):
    acc = accumulator(values.dtype)
    v, old, r = (t.to(acc) for t in (values, old_values, returns))
    free = (v - r).square()
    clipped = free if clip is None else (torch.clamp(v, old - clip, old + clip) - r).square()
    count = mask.sum().clamp(min=1)
    loss = 0.5 * (torch.maximum(free, clipped) * mask).sum() / count
    with torch.no_grad():
        fraction = ((clipped > free) & mask).sum() / count
        if not mask.any():
            return loss, fraction.to(acc), torch.zeros_like(loss)
        error, target = (r - v)[mask], r[mask]
        variance = target.var(correction=0)
        explained = torch.where(variance > 0, 1 - error.var(correction=0) / variance, 0)
        return loss, fraction.to(acc), explained


def _draw(normal):
    values = normal(1)
    return values, values + normal(0.3), values + normal(1)


WORKLOAD = masked_workload(
    ("values", "old_values", "returns"),
    draw=_draw,
    cases=(
        Case("smoke", {"targets": 37}),
        Case("smoke", {"targets": 1031, "clip": 0.2}),
        Case("edge", {"targets": 0}),
        Case("edge", {"targets": 1, "counted": 1.0}),
        Case("edge", {"targets": 65, "counted": 0.0, "clip": 0.1}),
        Case("model", {"targets": 16384, "clip": 0.2}),
    ),
    eager={"square, clamp, maximum": _eager},
    flops=lambda dims, direction: 15 * dims["targets"],
    magnitude=lambda sample, upstream: {"explained_variance": 4.0, "clip_fraction": 1.0, "loss": 1.0},
)
