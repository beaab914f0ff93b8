"""PPO's experience and its two losses, on packed sequences and the kernels (arXiv:2403.17297 section 4.2.3).

Index t of every vector [T] stands for the choice of the token that follows token t: the vectors hold the log-probability of
this choice, its reward, and the value of the state in which it was made. `mask` marks the choices of the actor: those where
the token that follows belongs to a response.
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
    """Sequences that an actor wrote, with the vectors from which PPO's losses are computed.

    tokens, next_tokens: int64 [T]; cu_seqlens: int32 [n + 1] on the CPU; mask: bool [T]
    logprobs, values, advantages, returns: float32 [T], from the models as they were at the rollout
    kl: [], the mean of log p_actor - log p_reference over the mask; 0 if no token is in the mask
    temperature: the one at which the actor drew the tokens; logprobs are those of softmax(logits / temperature)
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
    temperature: float = 1.0


@torch.no_grad()
def gather_experience(
    actor: InternLM2, reference: InternLM2, critic: RewardModel, tokens: Tensor, cu_seqlens: Tensor, mask: Tensor,
    scores: Tensor, *, temperature: float = 1.0, truncated: Tensor | None = None, kl_coef: float = 0.01, gamma: float = 1.0,
    lam: float = 0.99,
) -> Experience:  # fmt: skip
    """The `Experience` of one rollout: runs actor, reference model and critic on the sequences and computes the advantages.

    tokens:      int64 [T], prompts and responses end to end; cu_seqlens int32 [n + 1] on the CPU
    mask:        bool [T]: the actor chose the token after this one; False at the last token of a sequence
    scores:      float [n], the reward of each sequence from the reward model; it counts at the sequence's last choice
    temperature: the one at which the tokens were drawn. All log-probabilities (those here of the actor and of the reference
                 model, and those of `policy_loss`) are taken at it, since they must be those of the policy that drew the tokens
    truncated:   bool [n], default none: the response was cut at a length limit and would have gone on. The value of the state
                 after its last choice then stands for what would have followed; without it PPO would learn that a response
                 is worth nothing beyond the limit
    kl_coef:     the reward of a choice is -kl_coef (log p_actor - log p_reference), to which the last choice adds the score
    gamma, lam:  discount and decay of generalised advantage estimation. The report (arXiv:2403.17297) gives lam, but no gamma
    Errors: TypeError where an argument is not a tensor. ValueError where the mask holds the last token of a sequence, where a
            sequence has no choice, or where kl_coef, gamma, lam or temperature is not a finite number. Without sequences the
            vectors are empty and kl is 0.
    """
    vectors = {"tokens": tokens, "cu_seqlens": cu_seqlens, "mask": mask, "scores": scores, "truncated": truncated}
    for name, value in vectors.items():
        if not isinstance(value, Tensor) and (name != "truncated" or value is not None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if isinstance(kl_coef, bool) or not isinstance(kl_coef, int | float) or not math.isfinite(kl_coef):
        raise ValueError(f"kl_coef must be a finite number, got {kl_coef!r}")
    ends = cu_seqlens[1:].to(torch.int64) - 1
    _check_rollout(tokens, cu_seqlens, mask, scores, truncated)
    # At the last token of a sequence, next_tokens holds the first token of the next sequence. The mask excludes that position.
    next_tokens = torch.cat((tokens[1:], tokens[:1]))
    logprobs, ref_logprobs = (
        model.logprobs(tokens, next_tokens, cu_seqlens, temperature=temperature) for model in (actor, reference)
    )
    kl = kl_penalty(logprobs, ref_logprobs, mask=mask, estimator="k1")  # 0 outside the mask
    values = critic.values(tokens, cu_seqlens)
    rewards = -kl_coef * kl
    # The last choice of a sequence is the largest index in the mask before the sequence's end.
    last = torch.where(mask, torch.arange(len(tokens), device=mask.device), -1).cummax(0).values[ends.to(mask.device)]
    rewards[last] += scores.to(rewards)
    on_device = cu_seqlens.to(tokens.device, non_blocking=True)
    bootstrap = None if truncated is None else torch.where(truncated.to(last.device), values[last + 1], 0)
    advantages, returns = gae(rewards, values, on_device, mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam)
    mean_kl = kl.sum() / mask.sum().clamp(min=1)
    return Experience(tokens, next_tokens, cu_seqlens, mask, logprobs, values, advantages, returns, mean_kl, temperature)


def policy_loss(actor: InternLM2, experience: Experience, *, clip: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """The actor's clipped loss, at the experience's temperature, and its statistics (clip_fraction, approx_kl)."""
    e = experience
    logprobs = actor.logprobs(e.tokens, e.next_tokens, e.cu_seqlens, temperature=e.temperature)
    return ppo_policy_loss(logprobs, e.logprobs, e.advantages, e.mask, clip=clip)


def value_loss(critic: RewardModel, experience: Experience, *, clip: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's squared error and its statistics (clip_fraction, explained_variance). By default it is not clipped, as in
    the report (arXiv:2403.17297)."""
    e = experience
    return ppo_value_loss(critic.values(e.tokens, e.cu_seqlens), e.values, e.returns, e.mask, clip=clip)


def _check_rollout(
    tokens: Tensor, cu_seqlens: Tensor, mask: Tensor, scores: Tensor, truncated: Tensor | None
) -> None:  # fmt: skip
    bounds = cu_seqlens.tolist()
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {list(tokens.shape)}, got {mask.dtype} {list(mask.shape)}")
    if scores.shape != (len(bounds) - 1,):
        raise ValueError(f"scores must be [{len(bounds) - 1}], one for each sequence, got {list(scores.shape)}")
    if truncated is not None and (truncated.shape != scores.shape or truncated.dtype != torch.bool):
        raise ValueError(f"truncated must be bool {list(scores.shape)}, got {truncated.dtype} {list(truncated.shape)}")
    here = mask.cpu()
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > begin and here[end - 1]:
            raise ValueError(f"mask must be False at the last token of sequence {i}, after which nothing was chosen")
        if not here[begin:end].any():
            raise ValueError(f"mask must mark a choice in every sequence, got none in sequence {i}")
