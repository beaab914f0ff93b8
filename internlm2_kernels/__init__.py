"""Deterministic, batch-invariant operators for InternLM2-style language models, on CPU and GPU. See `OPS` and README."""

from ._registry import OPS, use_backend
from .ops.rms_norm import rms_norm

__version__ = "0.1.0"
__all__ = ["OPS", "rms_norm", "use_backend"]
