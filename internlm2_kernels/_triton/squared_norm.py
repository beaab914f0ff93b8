"""Sum of squares over a list of tensors. Contract: ops/squared_norm.py.

One program sums the squares of one chunk of one tensor; there is one such launch for each dtype in the list. A last launch adds
the sums of all chunks in float64, in order.
"""

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch
from .tables import _address_of, _find_chunk, aligned, table

CHUNK = 32768  # elements that a program sums
BLOCK = 4096  # elements that a program loads in one step of its loop
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["tensors"])
def squared_norm_chunks_kernel(table_ptr, partial_ptr, tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
                               CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tensor, chunk = _find_chunk(table_ptr, tensors, program)
    x_ptr = _address_of(table_ptr, tensors, 1, tensor, DTYPE, ALIGNED) + chunk * CHUNK
    size = tl.load(table_ptr + 2 * (tensors + 1) + tensor) - chunk * CHUNK
    total = tl.zeros((BLOCK,), tl.float32)
    if size >= CHUNK:  # a full chunk needs no mask, and its loads have 16 bytes
        for start in range(0, CHUNK, BLOCK):
            x = tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
            total += x * x
    else:
        for start in range(0, CHUNK, BLOCK):
            index = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + index, mask=index < size, other=0.0).to(tl.float32)
            total += x * x
    tl.store(partial_ptr + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["size"])
def squared_norm_sum_kernel(partial_ptr, total_ptr, size, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + index, mask=index < size, other=0.0).to(tl.float64)
    tl.store(total_ptr, tl.sum(total, axis=0).to(tl.float32))


def squared_norm_fwd(tensors):
    device = tensors[0].device
    total = torch.empty((), dtype=torch.float32, device=device)
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        check_dtype("squared_norm", "tensors", tensor)
        if tensor.numel():
            groups.setdefault(tensor.dtype, []).append(tensor)
    chunks = sum(triton.cdiv(t.numel(), CHUNK) for own in groups.values() for t in own)
    partial = torch.empty(max(chunks, 1), dtype=torch.float32, device=device)
    first = 0
    for dtype, own in groups.items():
        sizes = [t.numel() for t in own]
        rows, count = table(CHUNK, sizes, [[t.data_ptr() for t in own], sizes], device)
        launch(squared_norm_chunks_kernel, count, device,
               dict(table_ptr=rows, partial_ptr=partial[first:], tensors=len(own), DTYPE=TYPES[dtype], ALIGNED=aligned(own),
                    CHUNK=CHUNK, BLOCK=BLOCK), num_warps=8)
        first += count
    launch(squared_norm_sum_kernel, 1, device,
           dict(partial_ptr=partial, total_ptr=total, size=chunks, BLOCK=1024), num_warps=4)
    return total
