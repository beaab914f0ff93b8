"""Generalised advantage estimation over packed sequences."""

import torch

from .._autocast import promoted
from .._checks import (
    FLOAT_DTYPES,
    check_boundaries,
    check_cu_seqlens,
    check_device,
    check_float,
    check_mask,
    check_number,
    check_tensor,
    check_vector,
    fail,
)
from .._device_errors import Index
from .._native import native
from .._registry import Op
from ._losses import accumulator


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


GAE = Op(
    name="gae",
    source="arXiv:1506.02438 eq. 16",
    summary="generalised advantage estimation over packed sequences",
    reference=reference,
    schemas={"fwd": "(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, Tensor? bootstrap, float gamma,"
                    " float lam) -> (Tensor advantages, Tensor returns)"},
    fakes={"fwd": lambda rewards, values, cu, mask, bootstrap, gamma, lam: tuple(
        rewards.new_empty(rewards.shape, dtype=accumulator(rewards.dtype)) for _ in range(2))},
    outputs=("advantages", "returns"),
    directions=("forward",),
    indices={"cu_seqlens": Index(1 << 12, "values that start at 0, never fall and end at the tokens of rewards",
                                 "all results of the call are NaN")},
)
_FWD = GAE.overloads["fwd"]


def gae(rewards, values, cu_seqlens, *, mask=None, bootstrap=None, gamma=1.0, lam=0.99, backend=None):
    """Advantages A_t = delta_t + gamma lam A_(t+1) with delta_t = r_t + gamma V_(t+1) - V_t, and returns A_t + V_t.

    Shapes:   rewards, values [T] of n sequences end to end, cu_seqlens int32 [n + 1], mask [T], bootstrap [n] -> advantages,
              returns [T]. V after the end of a sequence is its bootstrap value, or 0
    Options:  mask marks the positions that count (bool, or numbers of which all but 0 count). The rewards and values at the
              other positions have no influence: such a position hands on the A and V of the next position unchanged, and
              its own result is that A
    Dtypes:   float32 | bfloat16 | float16 | float64, all equal (under autocast they are promoted); computed and returned in
              float32 (float64)
    Backward: none: advantages and returns are targets. Deterministic: yes, and a sequence's bits depend on that sequence only
    Errors:   ValueError and TypeError. On CUDA wrong cu_seqlens make all results NaN, and `check()` reports them
    Cost:     one launch, which reads two tensors and writes two.   Source: arXiv:1506.02438 eq. 16
    """
    rewards, values = promoted(rewards, values)
    check_float("gae", "rewards", rewards)
    if rewards.dim() != 1:
        fail(ValueError, "gae", "rewards", "shape [T]", list(rewards.shape))
    values = check_vector("gae", "values", values, rewards.shape, rewards, "rewards")
    cu = check_cu_seqlens("gae", "cu_seqlens", cu_seqlens, rewards, "rewards")
    mask = None if mask is None else check_mask("gae", mask, rewards, "rewards")
    if bootstrap is not None:
        check_tensor("gae", "bootstrap", bootstrap, "a floating-point tensor")
        if bootstrap.dtype not in FLOAT_DTYPES:
            fail(TypeError, "gae", "bootstrap", "a floating-point tensor", bootstrap.dtype)
        if bootstrap.shape != (cu.shape[0] - 1,):
            fail(ValueError, "gae", "bootstrap", f"shape [{cu.shape[0] - 1}] (sequences)", list(bootstrap.shape))
        check_device("gae", "bootstrap", bootstrap, rewards, "rewards")
        bootstrap = bootstrap.detach().to(accumulator(rewards.dtype)).contiguous()
    gamma = check_number("gae", "gamma", gamma, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    lam = check_number("gae", "lam", lam, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    chosen = GAE.select(rewards, backend)
    if chosen == "reference":
        check_boundaries("gae", "cu_seqlens", cu, rewards.shape[0])
        with torch.no_grad():
            return reference(rewards, values, cu, mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam)
    return native(_FWD[chosen], rewards.detach().contiguous(), values.detach(), cu, mask, bootstrap, gamma, lam)
