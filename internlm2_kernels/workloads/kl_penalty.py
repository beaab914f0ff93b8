"""Workload of `kl_penalty`."""

import torch

from ..ops._losses import accumulator
from . import Case, Sample, Workload


def _eager(logprobs, ref_logprobs, *, mask=None, estimator="k1"):
    acc = accumulator(logprobs.dtype)
    x = logprobs.to(acc) - ref_logprobs.to(acc)
    if mask is not None:
        x = x.masked_fill(~mask, 0)
    return x if estimator == "k1" else 0.5 * x**2 if estimator == "k2" else torch.exp(-x) - 1 + x


def _sample(case, dtype, device, generator):
    draw = lambda size: size * torch.randn(case.dims["rows"], generator=generator, device=device)
    logprobs = draw(1) - 2
    inputs = {"logprobs": logprobs.to(dtype), "ref_logprobs": (logprobs + draw(0.5)).to(dtype)}
    if case.dims.get("mask"):
        inputs["mask"] = torch.rand(case.dims["rows"], generator=generator, device=device) > 0.3
    return Sample({**inputs, "estimator": case.dims.get("estimator", "k1")}, ("logprobs", "ref_logprobs"))


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 37, "estimator": "k3"}),
        Case("smoke", {"rows": 64, "estimator": "k1"}),
        Case("smoke", {"rows": 33, "estimator": "k2", "mask": 1}),
        Case("edge", {"rows": 0, "estimator": "k3"}),
        Case("edge", {"rows": 1031, "estimator": "k3"}),
        Case("model", {"rows": 16384, "estimator": "k3"}),
    ),
    eager={"exp(-x) - 1 + x": _eager},
    batched=("logprobs", "ref_logprobs", "mask"),
    bytes=lambda dims, size, direction: dims["rows"] * ((2 if direction == "forward" else 4) * size + 4),
    flops=lambda dims, direction: 10 * dims["rows"],
    magnitude=lambda sample, upstream: {"kl": 1.0, **{f"d_{name}": float(upstream["kl"].abs().max())
                                                      for name in sample.grad if upstream and upstream["kl"].numel()}},
)
