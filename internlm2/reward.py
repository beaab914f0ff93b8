"""RewardModel: InternLM2's blocks under one number a token, as a reward model and as PPO's critic (arXiv:2403.17297 4.2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm2.config import ModelConfig
from internlm2.model import Decoder
from internlm2_kernels import reward_loss


class RewardModel(Decoder):
    """v_head [1, D] on the final norm's hidden states; parameters are named as in the released reward checkpoints.

    Arguments as `Decoder`'s, without `outputs`. A sequence's reward is the number at its last token, which a conversation
    ends with the config's reward token for. As a critic, the number at a token is the value of the state after it.
    """

    head_name = "v_head"

    def __init__(self, config: ModelConfig, **options: Any):
        super().__init__(config, 1, **options)

    def values(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The number at every token, float32 [T] (float64 in float64); arguments and errors as in hidden_states."""
        return self._number(self.hidden_states(tokens, cu_seqlens, positions))

    def rewards(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None) -> Tensor:
        """[sequences], none of which is empty: each one's number at its last token."""
        ends = cu_seqlens[1:].to(tokens.device, torch.int64) - 1
        if bool((cu_seqlens[1:] == cu_seqlens[:-1]).any()):
            raise ValueError("cu_seqlens must rise: an empty sequence has no reward")
        return self._number(self.hidden_states(tokens, cu_seqlens, positions)[ends])

    def _number(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.v_head.weight.to(wide))[:, 0]

    def loss(
        self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None, *, gamma: float = 2.0,
        penalty_weight: float = 0.02, bound: float = 5.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Focal ranking loss and log barrier of pairs: sequences alternate chosen and rejected -> loss [], rewards [n].

        Formulas, options and errors: `internlm2_kernels.reward_loss`.
        """
        hidden = self.hidden_states(tokens, cu_seqlens, positions)
        on_device = cu_seqlens.to(tokens.device, non_blocking=True)
        return reward_loss(hidden, self.v_head.weight, on_device, gamma=gamma, penalty_weight=penalty_weight, bound=bound)
