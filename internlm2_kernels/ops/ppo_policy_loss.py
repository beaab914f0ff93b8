"""PPO's clipped policy loss with the statistics that a trainer logs."""

import torch

from .._checks import check_number
from ._losses import accumulator, masked_mean
from ._ppo import checked, masked_loss, passes, run

LOG_RATIO = 20.0  # the log-ratio is clamped to +- this number, so that its exponential stays finite


def terms(logprobs, old_logprobs, advantages, mask, clip):
    acc = accumulator(logprobs.dtype)
    x = (logprobs.to(acc) - old_logprobs.to(acc)).masked_fill(~mask, 0).clamp(-LOG_RATIO, LOG_RATIO)
    advantages = advantages.to(acc).masked_fill(~mask, 0)
    return x, x.exp() * advantages, x.exp().clamp(1 - clip, 1 + clip) * advantages


def reference(logprobs, old_logprobs, advantages, mask, *, clip=0.2):
    x, free, clipped = terms(logprobs, old_logprobs, advantages, mask, clip)
    loss = -masked_mean(torch.where(clipped < free, clipped, free), mask)
    with torch.no_grad():
        return loss, masked_mean((clipped < free).to(x.dtype), mask), masked_mean(torch.expm1(x) - x, mask)


PPO_POLICY_LOSS = masked_loss(
    ("logprobs", "old_logprobs", "advantages"),
    statistic="approx_kl",
    name="ppo_policy_loss",
    source="arXiv:1707.06347 eq. 7",
    summary="PPO's clipped policy loss with clip fraction and approximate KL",
    reference=reference,
)


class _PPOPolicyLoss(torch.autograd.Function):
    forward, backward = passes(PPO_POLICY_LOSS)


def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, *, clip=0.2, backend=None):
    """loss = -mean over the mask of min(r A, clamp(r, 1 - clip, 1 + clip) A), r = exp(clamp(logp - old_logp, -20, 20)).

    Shapes:   logprobs, old_logprobs, advantages, mask [...] -> loss [], stats: clip_fraction [] (the share of unmasked
              tokens that take the clipped term), approx_kl [] (mean of r - 1 - log r)
    Dtypes:   float32 | bfloat16 | float16 | float64, all equal; mask bool, or numbers of which all but 0 count; loss and
              statistics are computed and returned in float32 (float64)
    Backward: saves its inputs and the count. The gradient is that of logprobs; old_logprobs and advantages are targets. It is
              0 where the clipped term is the smaller one or the log-ratio is beyond 20. Masked tokens may be NaN and have no
              influence; if all are masked, loss and gradients are 0. Deterministic: yes
    Errors:   ValueError for a shape, a device or clip; TypeError for a dtype
    Cost:     one call of a registered function each way, with the statistics.   Source: arXiv:1707.06347 eq. 7
    """
    tensors = checked(PPO_POLICY_LOSS, {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages}, mask)
    clip = check_number("ppo_policy_loss", "clip", clip, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    return run(PPO_POLICY_LOSS, _PPOPolicyLoss, tensors, clip, backend)
