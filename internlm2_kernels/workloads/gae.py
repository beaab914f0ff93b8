"""Workload of `gae`."""

import torch

from ..ops._losses import accumulator
from . import Case, Sample, Workload


def _sample(case, dtype, device, generator):
    dims = case.dims
    count, longest = dims["sequences"], dims["length"]
    lengths = (torch.full((count,), longest) if dims.get("equal") else
               torch.randint(0, longest + 1, (count,), generator=generator, device=device))
    cu = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32).to(device)
    draw = lambda n: torch.randn(n, generator=generator, device=device)
    tokens = int(cu[-1])
    inputs = {"rewards": draw(tokens).to(dtype), "values": draw(tokens).to(dtype), "cu_seqlens": cu}
    if dims.get("masked"):
        inputs["mask"] = torch.rand(tokens, generator=generator, device=device) > 0.3
    if dims.get("bootstrap"):
        inputs["bootstrap"] = draw(count).to(dtype)
    return Sample(inputs | {key: dims[key] for key in ("gamma", "lam") if key in dims})


def _tokens(dims):
    return dims["sequences"] * dims["length"]


def _by_time(rewards, values, cu_seqlens, *, mask=None, bootstrap=None, gamma=1.0, lam=0.99):
    """The loop over time steps that trainers usually write, on sequences padded to the longest one."""
    acc = accumulator(rewards.dtype)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    count, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    if not rewards.numel():
        return torch.zeros_like(values, dtype=acc), values.to(acc)
    at = torch.arange(longest, device=rewards.device)
    inside = at < lengths[:, None]
    pad = lambda x: torch.zeros(count, longest, dtype=acc, device=rewards.device).masked_scatter_(inside, x.to(acc))
    r, v = pad(rewards), pad(values)
    counts = inside if mask is None else torch.zeros_like(inside).masked_scatter_(inside, mask)
    carried = r.new_zeros(count)
    following = carried if bootstrap is None else bootstrap.to(acc)
    advantages = []
    for t in reversed(range(longest)):
        new = r[:, t] + gamma * following - v[:, t] + gamma * lam * carried
        carried = torch.where(counts[:, t], new, carried)
        following = torch.where(counts[:, t], v[:, t], following)
        advantages.append(carried)
    advantages = torch.stack(advantages[::-1], 1)[inside]
    return advantages, advantages + values.to(acc)


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"sequences": 5, "length": 17}),
        Case("smoke", {"sequences": 9, "length": 40, "masked": True, "bootstrap": True, "gamma": 0.99, "lam": 0.95}),
        Case("edge", {"sequences": 0, "length": 4}),
        Case("edge", {"sequences": 3, "length": 0}),
        Case("edge", {"sequences": 1, "length": 300, "equal": True}),
        Case("edge", {"sequences": 70, "length": 3, "masked": True}),
        Case("model", {"sequences": 256, "length": 1024, "equal": True}),
    ),
    eager={"loop over time steps": _by_time},
    batched=("rewards", "values", "mask"),
    bytes=lambda dims, size, direction: _tokens(dims) * (2 * size + 8),
    flops=lambda dims, direction: 6 * _tokens(dims),
    # Advantages are sums over a sequence's tokens, with terms of both signs. 10 times the largest value is the size of these
    # terms, which the error ladder (testing.py) takes as scale where it is larger than the result.
    magnitude=lambda sample, upstream: {name: 10.0 * (1 + float(sample.inputs["values"].abs().max()))
                                        for name in ("advantages", "returns") if sample.inputs["values"].numel()},
    rowwise=False,
    domain={"sequences": (0, 20, 1), "length": (0, 40, 1)},
)
