"""Deterministic, batch-invariant operators for InternLM2-style language models, on CPU and GPU. See `OPS` and README."""

from . import nn
from ._device_errors import check, validate
from ._registry import OPS, use_backend
from .ops.apply_rope import apply_rope
from .ops.flash_attention import flash_attention
from .ops.paged_attention import paged_attention
from .ops.qkv_rope import KVCache, qkv_rope
from .ops.rms_norm import rms_norm
from .ops.rope_table import rope_table
from .ops.swiglu import swiglu

__version__ = "0.1.0"
__all__ = ["OPS", "KVCache", "apply_rope", "check", "flash_attention", "nn",
           "paged_attention", "qkv_rope", "rms_norm", "rope_table", "swiglu", "use_backend",
           "validate"]
