"""Generalised advantage estimation over packed sequences."""

import torch

from .._checks import FLOAT_DTYPES, check_device, check_float, fail
from .._registry import Case, Op, Sample
from ._attention import check_cu_seqlens
from ._losses import accumulator, check_lengths, check_mask, check_number, check_vector
from .apply_rope import native


def reference(rewards, values, cu_seqlens, *, mask=None, bootstrap=None, gamma=1.0, lam=0.99):
    acc = accumulator(rewards.dtype)
    rewards, values = rewards.to(acc), values.to(acc)
    if not rewards.numel() or rewards.is_meta:
        return torch.empty_like(values), values.clone()
    bounds, advantages = cu_seqlens.tolist(), []
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        carried, passed = values.new_zeros(()), []
        following = carried if bootstrap is None else bootstrap[i].to(acc)
        for t in reversed(range(begin, end)):
            if mask is None or mask[t]:
                carried = rewards[t] + gamma * following - values[t] + gamma * lam * carried
                following = values[t]
            passed.append(carried)
        advantages += reversed(passed)
    advantages = torch.stack(advantages)
    return advantages, advantages + values


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
    """The loop over time steps that trainers write, on sequences padded to the longest."""
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


GAE = Op(
    name="gae",
    source="arXiv:1506.02438 eq. 16",
    summary="generalised advantage estimation over packed sequences",
    reference=reference,
    public=lambda *args, **kwargs: gae(*args, **kwargs),
    schemas={"fwd": "(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, Tensor? bootstrap, float gamma,"
                    " float lam) -> (Tensor advantages, Tensor returns)"},
    fakes={"fwd": lambda rewards, values, cu, mask, bootstrap, gamma, lam: tuple(
        rewards.new_empty(rewards.shape, dtype=accumulator(rewards.dtype)) for _ in range(2))},
    outputs=("advantages", "returns"),
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
    directions=("forward",),
    rowwise=False,
    # Sums of as many terms as a sequence has tokens, of both signs.
    magnitude=lambda sample, upstream: {name: 10.0 * (1 + float(sample.inputs["values"].abs().max()))
                                        for name in ("advantages", "returns") if sample.inputs["values"].numel()},
    domain={"sequences": (0, 20, 1), "length": (0, 40, 1)},
)
_FWD = GAE.overloads["fwd"]


def gae(rewards, values, cu_seqlens, *, mask=None, bootstrap=None, gamma=1.0, lam=0.99, backend=None):
    """Advantages: delta_t = r_t + gamma V_(t+1) - V_t, A_t = delta_t + gamma lam A_(t+1), returns_t = A_t + V_t.

    Shapes:   rewards, values [T] of n sequences laid end to end, cu_seqlens int32 [n + 1], mask [T], bootstrap [n]
              -> advantages, returns [T]. V past a sequence's end is its bootstrap, or 0
    Options:  mask: positions that count (bool; of numbers, all but 0). The others pass A and V of their successor on, get the
              A that they pass, and their rewards and values have no influence
    Dtypes:   float32 | bfloat16 | float16 | float64, all equal; computed and returned in float32 (float64)
    Backward: none: advantages and returns are targets. Deterministic: yes; a sequence's bits do not change with the others
    Errors:   ValueError, TypeError; cu_seqlens that do not rise from 0 to T raise on CPU before memory is touched; on CUDA
              results are NaN and `internlm2_kernels.check()` reports it
    Cost:     one launch; reads two, writes two.   Source: arXiv:1506.02438 eq. 16
    """
    check_float("gae", "rewards", rewards)
    if rewards.dim() != 1:
        fail(ValueError, "gae", "rewards", "shape [T]", list(rewards.shape))
    values = check_vector("gae", "values", values, rewards.shape, rewards, "rewards")
    cu = check_cu_seqlens("gae", "cu_seqlens", cu_seqlens, rewards, "rewards")
    mask = None if mask is None else check_mask("gae", mask, rewards, "rewards")
    if bootstrap is not None:
        if not isinstance(bootstrap, torch.Tensor) or bootstrap.dtype not in FLOAT_DTYPES:
            got = getattr(bootstrap, "dtype", type(bootstrap).__name__)
            fail(TypeError, "gae", "bootstrap", "a floating-point tensor", got)
        if bootstrap.shape != (cu.shape[0] - 1,):
            fail(ValueError, "gae", "bootstrap", f"shape [{cu.shape[0] - 1}] (sequences)", list(bootstrap.shape))
        check_device("gae", "bootstrap", bootstrap, rewards, "rewards")
        bootstrap = bootstrap.detach().to(accumulator(rewards.dtype)).contiguous()
    gamma = check_number("gae", "gamma", gamma, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    lam = check_number("gae", "lam", lam, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    chosen = GAE.select(rewards, backend)
    if chosen == "reference":
        check_lengths("gae", cu, rewards.shape[0], 0)
        with torch.no_grad():
            return reference(rewards, values, cu, mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam)
    return native(_FWD[chosen], rewards.detach().contiguous(), values.detach(), cu, mask, bootstrap, gamma, lam)
