"""Deterministic, batch-invariant operators for InternLM2-style language models, on CPU and GPU. See `OPS` and README.

The backends cpp, triton and cuda keep the promises of docstrings to be deterministic and batch-invariant, bit for bit. The
backend `reference` is plain PyTorch, and the only one on macOS, Windows and aarch64. Its values are right, but the last bits of
a row may depend on the other rows of the batch.
"""

from . import memory, nn
from ._device_errors import check, validate
from ._registry import OPS, use_backend
from .ops.adamw import adamw
from .ops.apply_rope import apply_rope
from .ops.cross_entropy import cross_entropy
from .ops.flash_attention import flash_attention
from .ops.focal_ranking_loss import focal_ranking_loss
from .ops.gae import gae
from .ops.kl_penalty import kl_penalty
from .ops.linear import linear
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_logprobs import linear_logprobs
from .ops.log_barrier_penalty import log_barrier_penalty
from .ops.paged_attention import paged_attention
from .ops.ppo_policy_loss import ppo_policy_loss
from .ops.ppo_value_loss import ppo_value_loss
from .ops.qkv_rope import KVCache, qkv_rope
from .ops.reward_loss import reward_loss
from .ops.reward_loss_from_last import reward_loss_from_last
from .ops.rms_norm import rms_norm
from .ops.rope_table import rope_table
from .ops.sample import sample
from .ops.squared_norm import squared_norm
from .ops.swiglu import swiglu
from .optim import FusedAdamW

__version__ = "0.1.0"
__all__ = ["FusedAdamW", "KVCache", "OPS", "adamw", "apply_rope", "check", "cross_entropy", "flash_attention",
           "focal_ranking_loss", "gae", "kl_penalty", "linear", "linear_cross_entropy", "linear_logprobs",
           "log_barrier_penalty", "memory", "nn", "paged_attention", "ppo_policy_loss", "ppo_value_loss", "qkv_rope",
           "reward_loss", "reward_loss_from_last", "rms_norm", "rope_table", "sample", "squared_norm", "swiglu",
           "use_backend", "validate"]
