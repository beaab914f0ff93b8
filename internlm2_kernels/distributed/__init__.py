"""Operators over several processes of a `torch.distributed` group; results equal the unsharded operator's."""

from .vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = ["vocab_parallel_linear_cross_entropy"]
