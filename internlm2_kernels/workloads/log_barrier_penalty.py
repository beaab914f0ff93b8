"""Workload of `log_barrier_penalty`."""

import math

import torch

from . import Case, Sample, Workload


def eager(rewards, *, bound=5.0, margin=1e-3, outside="linear"):
    x = rewards.float() if rewards.dtype != torch.float64 else rewards
    edge = bound - margin
    barrier = lambda v: -(torch.log(v + bound) + torch.log(bound - v))
    clamped = barrier(x.clamp(-edge, edge))
    slope = 1 / (bound - edge) - 1 / (bound + edge)
    return clamped if outside == "clamp" else torch.where(x.abs() <= edge, clamped, clamped + slope * (x.abs() - edge))


def _sample(case, dtype, device, generator):
    rewards = (case.dims.get("spread", 2) * torch.randn(case.dims["rows"], generator=generator, device=device)).to(dtype)
    options = {key: case.dims[key] for key in ("bound", "outside") if key in case.dims}
    return Sample({"rewards": rewards, **options}, ("rewards",))


def _magnitude(sample, upstream):
    """The size of the terms that cancel in the penalty: the error ladder (testing.py) takes it as the scale of the allowed
    error where it is larger than the result itself.

    Up to the edge, bound - margin, the penalty is a sum of two logarithms, which may have opposite signs. Beyond the edge it
    contains slope * |x| - slope * edge, which nearly cancel close to the edge.
    """
    x, bound, margin = sample.inputs["rewards"], sample.inputs.get("bound", 5.0), 1e-3
    if not x.numel():
        return {}
    beyond = sample.inputs.get("outside") != "clamp" and bool((x.abs() > bound - margin).any())
    return {"penalty": 2 * abs(math.log(margin)) + bound / margin * beyond}


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 37, "spread": 4}),
        Case("smoke", {"rows": 64, "spread": 4, "outside": "clamp"}),
        Case("edge", {"rows": 0, "spread": 1}),
        Case("edge", {"rows": 1, "spread": 1, "bound": 2.0}),
        Case("edge", {"rows": 1031, "spread": 40}),
        Case("model", {"rows": 65536, "spread": 2}),
    ),
    eager={"torch.log": eager},
    batched=("rewards",),
    bytes=lambda dims, size, direction: dims["rows"] * (size + 4 if direction == "forward" else 2 * size + 4),
    flops=lambda dims, direction: 20 * dims["rows"],
    magnitude=_magnitude,
)
