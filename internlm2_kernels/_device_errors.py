"""Index errors found on a device: one int32 word a device, a bit for every operator and argument.

A kernel that meets an index outside its range touches no memory with it, writes NaN to that row and sets its bit. Nothing
waits for the device until `check()` or `validate()` asks.
"""

import contextlib
from collections.abc import Iterator

import torch

# The bit of each argument is part of the contract with csrc/cuda: append, never renumber.
CODES = {
    ("apply_rope", "positions"): 1 << 0,
    ("qkv_rope", "positions"): 1 << 1,
    ("qkv_rope", "cache.slots"): 1 << 2,
    ("flash_attention", "cu_seqlens_q"): 1 << 3,
    ("flash_attention", "cu_seqlens_k"): 1 << 4,
    ("paged_attention", "cu_seqlens_q"): 1 << 5,
    ("paged_attention", "seq_lens"): 1 << 6,
    ("paged_attention", "block_table"): 1 << 7,
    ("cross_entropy", "labels"): 1 << 8,
    ("linear_cross_entropy", "labels"): 1 << 9,
    ("linear_logprobs", "tokens"): 1 << 10,
    ("reward_loss", "cu_seqlens"): 1 << 11,
    ("gae", "cu_seqlens"): 1 << 12,
    ("vocab_parallel_linear_cross_entropy", "vocab_start"): 1 << 13,
}
_EXPECTED = {
    ("apply_rope", "positions"): "values from 0 to the rows of cos minus 1",
    ("qkv_rope", "positions"): "values from 0 to the rows of cos minus 1",
    ("qkv_rope", "cache.slots"): "values from -1 to blocks * block_size - 1",
    ("flash_attention", "cu_seqlens_q"): "values that start at 0, never fall and end at the tokens of q",
    ("flash_attention", "cu_seqlens_k"): "values that start at 0, never fall and end at the tokens of k",
    ("paged_attention", "cu_seqlens_q"): "values that start at 0, never fall and end at the tokens of q",
    ("paged_attention", "seq_lens"): "values from the new tokens of a sequence to max_blocks * block_size",
    ("paged_attention", "block_table"): "values from 0 to the blocks of the cache minus 1 in the blocks in use",
    ("cross_entropy", "labels"): "values from 0 to V - 1 or ignore_index",
    ("linear_cross_entropy", "labels"): "values from 0 to V - 1 or ignore_index",
    ("linear_logprobs", "tokens"): "values from 0 to V - 1",
    ("reward_loss", "cu_seqlens"): "values that start at 0, rise by at least 1 and end at the tokens of hidden",
    ("gae", "cu_seqlens"): "values that start at 0, never fall and end at the tokens of rewards",
    ("vocab_parallel_linear_cross_entropy", "vocab_start"): "the ranks' rows to follow each other from 0 to vocab_size",
}
_CONSEQUENCE = {
    "positions": "the outputs of those tokens are NaN and were not cached",
    "cache.slots": "those tokens were not cached",
    "cu_seqlens_q": "all results of the call are NaN",
    "cu_seqlens_k": "all results of the call are NaN",
    "seq_lens": "the outputs of those sequences are NaN",
    "block_table": "the outputs of those sequences are NaN",
    "labels": "the losses and gradients of those tokens are NaN",
    "tokens": "the results of those tokens are NaN",
    "cu_seqlens": "all results of the call are NaN",
    "vocab_start": "all results of the call are NaN",
}
_words: dict[torch.device, torch.Tensor] = {}


def error_word(device: torch.device) -> torch.Tensor:
    """The word that kernels on `device` set; it lives as long as the process, since recorded CUDA graphs keep its address."""
    if device.type == "meta":
        return torch.empty(1, dtype=torch.int32, device=device)
    word = _words.get(device)
    if word is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first call of an operator that takes indices allocates the device's error word and waits "
                               "for it: make one call before capturing a CUDA graph")
        with torch.inference_mode(False):  # an inference tensor could not be reset outside inference mode
            word = _words[device] = torch.zeros(1, dtype=torch.int32, device=device)
        if device.type == "cuda":
            _tell_compiled_library(device, word)
    return word


def _tell_compiled_library(device: torch.device, word: torch.Tensor) -> None:
    from ._registry import _C  # here, because the registry imports this module

    if hasattr(_C, "set_error_word"):
        torch.cuda.synchronize(device)  # the compiled kernels may run on a stream that knows nothing of the zeroing
        _C.set_error_word(device.index, word.data_ptr())


def check() -> None:
    """Raises `ValueError` if a kernel has met an index out of range since the last check, naming operator and argument.

    Waits for every CUDA device that ran such a kernel, and forgets what it reports. CPU tensors are checked at the call.
    """
    found = []
    for device, word in _words.items():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        bits = int(word)
        if bits:
            word.zero_()
            found += [(device, key) for key, code in CODES.items() if bits & code]
    if found:
        raise ValueError("; ".join(
            f"{op}: {argument}: expected {_EXPECTED[op, argument]}, got others on {device} ({_CONSEQUENCE[argument]})"
            for device, (op, argument) in found))


@contextlib.contextmanager
def validate() -> Iterator[None]:
    """Raises at its end what kernels inside the block found, as `check()` does; at its start, what came before it.

    An exception of the block itself passes unchanged. Costs one synchronisation a device at either end.
    """
    check()
    yield
    check()
