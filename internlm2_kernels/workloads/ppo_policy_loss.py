"""Workload of `ppo_policy_loss`."""

import torch

from ..ops._losses import masked_mean
from ..ops.ppo_policy_loss import terms
from . import Case
from ._ppo import masked_workload


def _eager(logprobs, old_logprobs, advantages, mask, *, clip=0.2):
    x, free, clipped = terms(logprobs, old_logprobs, advantages, mask, clip)
    loss = -masked_mean(torch.minimum(free, clipped), mask)
    with torch.no_grad():
        return loss, masked_mean((clipped < free).to(x.dtype), mask), masked_mean(x.exp() - 1 - x, mask)


def _draw(normal):
    logprobs = normal(1) - 2
    return logprobs, logprobs + normal(0.3), normal(1)


def _magnitude(sample, upstream):
    """The size of the terms that cancel in each output, by name: the error ladder (testing.py) takes it as the scale of the
    allowed error where it is larger than the result itself. The loss is a mean of terms of both signs."""
    advantages = sample.inputs["advantages"]
    size = float(advantages.abs().max()) * 4 if advantages.numel() else 1.0
    return {"loss": size, "approx_kl": 1.0, "clip_fraction": 1.0}


WORKLOAD = masked_workload(
    ("logprobs", "old_logprobs", "advantages"),
    draw=_draw,
    cases=(
        Case("smoke", {"targets": 37}),
        Case("smoke", {"targets": 1031, "clip": 0.1}),
        Case("edge", {"targets": 0}),
        Case("edge", {"targets": 1, "counted": 1.0}),
        Case("edge", {"targets": 65, "counted": 0.0}),
        Case("model", {"targets": 16384}),
    ),
    eager={"exp, clamp, minimum": _eager},
    flops=lambda dims, direction: 20 * dims["targets"],
    magnitude=_magnitude,
)
