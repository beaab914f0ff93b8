"""PPO's experience and its two losses, on packed sequences and the kernels (arXiv:2403.17297 section 4.2.3).

Index t of all vectors [T] is the choice of the token after token t: its log-probability, its reward, the value of the state
before it. `mask` marks the choices that the actor made: those whose next token is part of a response.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm2.model import InternLM2
from internlm2.reward import RewardModel
from internlm2_kernels import gae, kl_penalty, ppo_policy_loss, ppo_value_loss


@dataclass(frozen=True)
class Experience:
    """Sequences that an actor wrote, and what PPO learns from them.

    tokens, next_tokens: int64 [T]; cu_seqlens: int32 [n + 1] on the CPU; mask: bool [T]
    logprobs, values, advantages, returns: float32 [T], of the models that wrote and judged them
    kl: [], the mean of log p_actor - log p_reference over the mask; 0 where that is empty
    """

    tokens: Tensor
    next_tokens: Tensor
    cu_seqlens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl: Tensor


@torch.no_grad()
def gather_experience(
    actor: InternLM2, reference: InternLM2, critic: RewardModel, tokens: Tensor, cu_seqlens: Tensor, mask: Tensor,
    scores: Tensor, *, kl_coef: float = 0.01, gamma: float = 1.0, lam: float = 0.99,
) -> Experience:  # fmt: skip
    """What one rollout of the actor teaches.

    tokens:     int64 [T], prompts and responses end to end; cu_seqlens int32 [n + 1] on the CPU
    mask:       bool [T]: the token after this one was chosen by the actor; False at a sequence's last token
    scores:     float [n], what the reward model gives each sequence; it counts at the sequence's last choice
    kl_coef:    a choice's reward is -kl_coef (log p_actor - log p_reference), besides the score
    gamma, lam: discount and decay of generalised advantage estimation. The report gives lam, not gamma
    Errors: ValueError where a mask reaches over a sequence's end, a sequence has a score and no choice, or kl_coef, gamma or
            lam is no finite number. No sequences: empty vectors and a kl of 0.
    """
    if isinstance(kl_coef, bool) or not isinstance(kl_coef, int | float) or not math.isfinite(kl_coef):
        raise ValueError(f"kl_coef must be a finite number, got {kl_coef!r}")
    ends = cu_seqlens[1:].to(torch.int64) - 1
    _check_rollout(tokens, cu_seqlens, mask, scores)
    next_tokens = torch.cat((tokens[1:], tokens[:1]))  # at a sequence's end its neighbour's first: not in the mask
    logprobs = actor.logprobs(tokens, next_tokens, cu_seqlens)
    kl = kl_penalty(logprobs, reference.logprobs(tokens, next_tokens, cu_seqlens), estimator="k1")
    values = critic.values(tokens, cu_seqlens)
    rewards = torch.where(mask, -kl_coef * kl, 0)
    # A sequence's last choice: the largest index in the mask up to its end.
    last = torch.where(mask, torch.arange(len(tokens), device=mask.device), -1).cummax(0).values[ends.to(mask.device)]
    rewards[last] += scores.to(rewards)
    on_device = cu_seqlens.to(tokens.device, non_blocking=True)
    advantages, returns = gae(rewards, values, on_device, mask=mask, gamma=gamma, lam=lam)
    mean_kl = torch.where(mask, kl, 0).sum() / mask.sum().clamp(min=1)
    return Experience(tokens, next_tokens, cu_seqlens, mask, logprobs, values, advantages, returns, mean_kl)


def policy_loss(actor: InternLM2, experience: Experience, *, clip: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """The actor's clipped loss and its statistics (clip_fraction, approx_kl)."""
    e = experience
    logprobs = actor.logprobs(e.tokens, e.next_tokens, e.cu_seqlens)
    return ppo_policy_loss(logprobs, e.logprobs, e.advantages, e.mask, clip=clip)


def value_loss(critic: RewardModel, experience: Experience, *, clip: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's squared error and its statistics (clip_fraction, explained_variance); the report clips nothing."""
    e = experience
    return ppo_value_loss(critic.values(e.tokens, e.cu_seqlens), e.values, e.returns, e.mask, clip=clip)


def _check_rollout(tokens: Tensor, cu_seqlens: Tensor, mask: Tensor, scores: Tensor) -> None:
    bounds = cu_seqlens.tolist()
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {list(tokens.shape)}, got {mask.dtype} {list(mask.shape)}")
    if scores.shape != (len(bounds) - 1,):
        raise ValueError(f"scores must be [{len(bounds) - 1}], one a sequence, got {list(scores.shape)}")
    here = mask.cpu()
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > begin and here[end - 1]:
            raise ValueError(f"mask must be False at the last token of sequence {i}: no choice follows it")
        if not here[begin:end].any():
            raise ValueError(f"mask must mark a choice in every sequence, got none in sequence {i}")
