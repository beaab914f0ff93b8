"""RewardModel: InternLM2 with one number for each token in place of logits, for a reward model and for the critic of PPO
(arXiv:2403.17297 section 4.2)."""

from typing import Any

import torch
from torch import Tensor

from internlm2.config import ModelConfig
from internlm2.model import Decoder
from internlm2_kernels import reward_loss


class RewardModel(Decoder):
    """v_head [1, D] on the hidden states after the final norm. Parameters are named as in the released reward checkpoints.

    It takes the arguments of `Decoder` except `outputs`. The reward of a sequence is the number at its last token; therefore a
    conversation ends with config.reward_token_id. In a critic, the number at a token is the value of the state after it.
    """

    head_name = "v_head"

    def __init__(self, config: ModelConfig, **options: Any):
        super().__init__(config, 1, **options)

    def values(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The number at every token, float32 [T] (float64 in float64); arguments and errors as in hidden_states."""
        return self._number(self.hidden_states(tokens, cu_seqlens, positions))

    def rewards(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The rewards, float32 [sequences]: the number at the last token of each sequence. No sequence may be empty."""
        _check_no_empty_sequence(cu_seqlens)
        packing = self._packing(tokens, cu_seqlens, positions)
        ends = packing.cu_seqlens[1:].to(torch.int64) - 1
        return self._number(self._hidden_states(tokens, packing)[ends])

    def _number(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the number to its dtype
            return self.operators.linear(hidden.to(wide), self.v_head.weight.to(wide))[:, 0]

    def loss(
        self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None, *, gamma: float = 2.0,
        penalty_weight: float = 0.02, bound: float = 5.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Focal ranking loss and log barrier of pairs; sequences alternate between chosen and rejected. Returns the loss [] and
        the rewards [sequences].

        Formulas, options and errors: `internlm2_kernels.reward_loss`.
        """
        packing = self._packing(tokens, cu_seqlens, positions)
        return reward_loss(self._hidden_states(tokens, packing), self.v_head.weight, packing.cu_seqlens, gamma=gamma,
                           penalty_weight=penalty_weight, bound=bound)


@torch.compiler.disable
def _check_no_empty_sequence(cu_seqlens: Tensor) -> None:
    if bool((cu_seqlens[1:] == cu_seqlens[:-1]).any()):
        raise ValueError(f"cu_seqlens must rise, since an empty sequence has no reward; got {cu_seqlens.tolist()[:8]}")
