"""Index errors found on a device: an int32 error word for each device, with one bit for each index argument of each operator.

A kernel that finds an index outside its range does not use it to access memory. It writes NaN to the results of that row and
sets the bit of the argument. Nothing waits for the device until the user calls `check()` or `validate()`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ._native import _C


@dataclass(frozen=True)
class Index:
    """An argument that holds indices. `bit` is its bit in the error word; kernels in csrc/cuda and _triton set it by number, so
    new arguments take new bits and existing bits never change."""

    bit: int
    expected: str  # the values that are accepted, for the error message
    consequence: str  # what a wrong index has done to the results, for the error message


INDICES: dict[tuple[str, str], Index] = {}  # all index arguments, by (operator, argument)
CODES: dict[tuple[str, str], int] = {}  # the bit of each of them, which launchers pass to kernels
_words: dict[torch.device, torch.Tensor] = {}


def declare(op: str, indices: Mapping[str, Index]) -> None:
    """Registers the index arguments of the operator `op`, by argument name."""
    for argument, index in indices.items():
        if index.bit in CODES.values():
            raise ValueError(f"{op}: {argument}: expected a bit of its own, got {index.bit:#x}, which is in use")
        INDICES[op, argument], CODES[op, argument] = index, index.bit


def error_word(device: torch.device) -> torch.Tensor:
    """The error word of `device`, in which kernels set bits. It is never freed, because recorded CUDA graphs hold its
    address."""
    if device.type == "meta":
        return torch.empty(1, dtype=torch.int32, device=device)
    word = _words.get(device)
    if word is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first call of an operator that takes indices allocates the device's error word and waits "
                               "for it: make one call before capturing a CUDA graph")
        with torch.inference_mode(False):  # a tensor made in inference mode could not be reset outside it
            word = _words[device] = torch.zeros(1, dtype=torch.int32, device=device)
        if device.type == "cuda" and hasattr(_C, "set_error_word"):
            torch.cuda.synchronize(device)  # the word must be zero before kernels on other streams use it
            _C.set_error_word(device.index, word.data_ptr())
    return word


if hasattr(_C, "set_error_word_maker"):  # the C++ calls it at the first CUDA kernel of a device that needs an error word
    _C.set_error_word_maker(lambda index: error_word(torch.device("cuda", index)))


def check() -> None:
    """Raises `ValueError`, naming operator and argument, if a kernel has found an index out of range since the last check.

    It waits for every CUDA device that has an error word, and clears the errors that it reports. Indices on the CPU are checked
    in the call itself.
    """
    found = []
    for device, word in _words.items():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        bits = int(word)
        if bits:
            word.zero_()
            found += [f"{op}: {argument}: expected {index.expected}, got others on {device} ({index.consequence})"
                      for (op, argument), index in INDICES.items() if bits & index.bit]
    if found:
        raise ValueError("; ".join(found))


@contextlib.contextmanager
def validate() -> Iterator[None]:
    """A context manager that calls `check()` at its start and at its end.

    An exception raised inside the block passes unchanged. It costs two synchronisations of each device.
    """
    check()
    yield
    check()
