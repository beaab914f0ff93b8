"""Tables that let one launch process a whole list of tensors: the address of each tensor, and the chunks it is divided into.

A table is an int64 tensor [rows, n + 1] on the device. Row 0 holds the number of chunks before each of the n tensors, and in
column n the number of all chunks. The caller defines the other rows, with one column for each tensor. The table is built on
the host and copied asynchronously from pinned memory.

CUDA graphs: during a capture pinned memory must not be allocated, and the memory that a captured copy reads must not change
while the graph may be replayed. Therefore the first call outside a capture allocates an arena of pinned memory for each
device, and captured tables occupy parts of it permanently. The arena has room for the tables of thousands of parameters.
"""

import itertools

import torch
import triton
import triton.language as tl

ARENA_ELEMENTS = 1 << 20  # int64 elements of the arena of a device: 8 MiB


class _Arena:
    """Pinned memory that the copies captured in CUDA graphs read at every replay. No part of it is ever reused."""

    def __init__(self):
        self.memory = torch.empty(ARENA_ELEMENTS, dtype=torch.int64, pin_memory=True)
        self.used = 0

    def take(self, table: torch.Tensor) -> torch.Tensor:
        if self.used + table.numel() > ARENA_ELEMENTS:
            raise RuntimeError("the pinned memory for captured optimizer steps is used up: record one graph and replay it "
                               "instead of many")
        part = self.memory[self.used: self.used + table.numel()].view(table.shape)
        self.used += table.numel()
        return part.copy_(table)


_arenas: dict[torch.device, _Arena] = {}


def table(chunk: int, sizes: list[int], rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, int]:
    """(table on the device, number of all chunks) for tensors of `sizes` elements, which are divided into chunks of `chunk`
    elements. `rows` are the rows of the table after row 0, as the top of this file describes."""
    counts = list(itertools.accumulate((-(-size // chunk) for size in sizes), initial=0))
    if device.type == "meta":
        return torch.empty((1 + len(rows), len(counts)), dtype=torch.int64, device=device), counts[-1]
    host = torch.tensor([counts, *([*row, 0] for row in rows)], dtype=torch.int64)
    if device.type != "cuda":
        return host, counts[-1]
    if torch.cuda.is_current_stream_capturing():
        if device not in _arenas:
            raise RuntimeError("the first call of an operator on lists of tensors sets pinned memory aside: make one call "
                               "before capturing a CUDA graph")
        pinned = _arenas[device].take(host)
    else:
        if device not in _arenas:
            _arenas[device] = _Arena()
        pinned = host.pin_memory()  # PyTorch does not reuse pinned memory before copies from it are done
    return pinned.to(device, non_blocking=True), counts[-1]


@triton.jit
def _find_chunk(table_ptr, tensors, chunk):
    """(tensor, number of the chunk within it) for chunk number `chunk` of the whole list. The tensor is the last one with at
    most `chunk` chunks before it, found by bisection."""
    low = chunk * 0
    high = low + tensors
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle) <= chunk
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, chunk - tl.load(table_ptr + low)


@triton.jit
def _address_of(table_ptr, tensors, row, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the elements of `tensor`, whose address is in `row` of the table. ALIGNED: all addresses are multiples of
    16 bytes."""
    ptr = tl.load(table_ptr + row * (tensors + 1) + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


def aligned(*lists) -> bool:
    """Whether all tensors are aligned to 16 bytes."""
    return all(t.data_ptr() % 16 == 0 for tensors in lists for t in tensors)
