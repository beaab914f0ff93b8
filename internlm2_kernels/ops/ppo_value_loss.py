"""PPO's value loss, clipped or not, with the statistics that a trainer logs."""

import torch

from .._checks import check_number
from ._losses import accumulator, masked_mean
from ._ppo import checked, masked_loss, passes, run


def reference(values, old_values, returns, mask, *, clip=None):
    acc = accumulator(values.dtype)
    v, old, r = (t.to(acc).masked_fill(~mask, 0) for t in (values, old_values, returns))
    free = (v - r).square()
    # v - old is clamped, and where it is inside the bounds the unclipped term is used itself: computed from old + (v - old),
    # the clipped term would differ from it in the last bit.
    clipped = free if clip is None else torch.where((v - old).abs() <= clip, free,
                                                    (old + (v - old).clamp(-clip, clip) - r).square())
    loss = 0.5 * masked_mean(torch.where(clipped > free, clipped, free), mask)
    with torch.no_grad():
        mean = masked_mean(r, mask)
        spread = lambda x, mean: masked_mean((x - mean).square(), mask)
        variance, noise = spread(r, mean), 8 * torch.finfo(acc).eps * mean
        unexplained = spread(r - v, masked_mean(r - v, mask))
        explained = torch.where(variance <= noise.square(), 0, 1 - unexplained / variance)
        return loss, masked_mean((clipped > free).to(acc), mask), explained


PPO_VALUE_LOSS = masked_loss(
    ("values", "old_values", "returns"),
    statistic="explained_variance",
    name="ppo_value_loss",
    source="arXiv:1707.06347 eq. 9; clipped form: arXiv:2005.12729 section 3",
    summary="PPO's value loss with explained variance and clip fraction",
    reference=reference,
)


class _PPOValueLoss(torch.autograd.Function):
    forward, backward = passes(PPO_VALUE_LOSS)


def ppo_value_loss(values, old_values, returns, mask, *, clip=None, backend=None):
    """loss = 0.5 mean over the mask of (v - R)^2; with clip c, of max((v - R)^2, (old + clamp(v - old, -c, c) - R)^2).

    Shapes:   values, old_values, returns, mask [...] -> loss [], stats: clip_fraction [] (the share of unmasked tokens
              that take the clipped term), explained_variance [] (1 - Var(R - v) / Var(R) over the mask, 0 where Var(R) is
              0 in float32 (float64) or within the rounding of the mean of R)
    Dtypes:   float32 | bfloat16 | float16 | float64, all equal; mask bool, or numbers of which all but 0 count; loss and
              statistics are computed and returned in float32 (float64)
    Backward: saves its inputs and the count. The gradient is that of values; old_values and returns are targets. It is 0
              where the clipped term is the larger one. Masked tokens may be NaN and have no influence; if all are masked, loss
              and gradients are 0. Deterministic: yes
    Errors:   ValueError for a shape, a device or clip; TypeError for a dtype
    Cost:     one call of a registered function each way, with the statistics.
              Source: arXiv:1707.06347 eq. 9, arXiv:2005.12729 section 3
    """
    tensors = checked(PPO_VALUE_LOSS, {"values": values, "old_values": old_values, "returns": returns}, mask)
    if clip is not None:
        clip = check_number("ppo_value_loss", "clip", clip, "None or a finite number >= 0", lambda v: v >= 0)
    return run(PPO_VALUE_LOSS, _PPOValueLoss, tensors, clip, backend)
