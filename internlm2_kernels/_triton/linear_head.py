"""The forward of linear_cross_entropy and linear_logprobs, and the tiled matrix product. Backward: linear_head_bwd.py.

The logits = hidden @ weight.T are never stored as a whole. One program computes a tile of logits, for a block of rows and a
block of the vocabulary, and stores what the softmax of each row needs from it: the maximum, the sum of exponentials and so
on, one float32 value each. A second kernel merges these results along the vocabulary, in order. The size of the tile does not
depend on the number of rows, and each logit is accumulated along the hidden size in one order, so a row's bits depend only on
that row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import architecture, launch
from .functions import _fast_exp
from .losses import _capped

CHUNK_BYTES = 384 * 2**20  # memory for d loss / d logits of one chunk: 2048 tokens of InternLM2's vocabulary in 16 bits
FORWARD_ROWS = 16384  # rows of one launch where no gradient is wanted; limits the memory for the results of the tiles
GROUP = 16  # row blocks whose programs run at the same time, so that they share blocks of the weight in the L2 cache


class Tile(NamedTuple):
    """The tiling of a matrix product: rows and columns of the tile that a program computes; inner: its step along the dimension
    that is summed over."""

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int


def tile_config(element_size: int, arch: int, narrow: bool = False) -> Tile:
    """The tile for an architecture (80, 90, ...). It must not depend on the number of rows, because the bits of a row would
    then depend on it too. `narrow` takes half the columns, for kernels that need many registers after the product."""
    if element_size == 4:
        return Tile(64, 64, 32, 4, 2)
    if arch < 90:
        return Tile(128, 128, 32, 8, 4)
    return Tile(128, 128 if narrow else 256, 64, 8, 3)


def scores_tile(x: torch.Tensor, softcap: float) -> Tile:
    """The tile of logits for the device and the dtype of `x`."""
    return tile_config(x.element_size(), architecture(x.device), softcap > 0)


@triton.jit
def _place(blocks_m, blocks_n, GROUP: tl.constexpr):
    """(row block, column block) of this program. GROUP consecutive programs take the same column block and different row
    blocks, so that they share the column block in the L2 cache."""
    program = tl.program_id(0)
    group = program // (GROUP * blocks_n)
    size = tl.minimum(blocks_m - group * GROUP, GROUP)
    place = program - group * (GROUP * blocks_n)
    return group * GROUP + place % size, place // size


@triton.jit
def _product(acc, a_ptr, b_ptr, row, col, rows, cols, inner, a_row, a_inner, b_inner, b_col,
             EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + sum over k of a[row, k] * b[k, col], accumulated in float32 in the order of k. EVEN: BLOCK_K divides `inner`.

    Row and column indices have 32 bits, because the epilogues keep them in registers; offsets have 64 bits.
    """
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + row.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_inner
    b_at = b_ptr + k.to(tl.int64)[:, None] * b_inner + col.to(tl.int64)[None, :] * b_col
    a_step = tl.cast(a_inner, tl.int64) * BLOCK_K
    b_step = tl.cast(b_inner, tl.int64) * BLOCK_K
    a_mask = (row < rows)[:, None]
    b_mask = (col < cols)[None, :]
    for start in tl.range(0, inner, BLOCK_K):
        if EVEN:
            a = tl.load(a_at, mask=a_mask, other=0.0)
            b = tl.load(b_at, mask=b_mask, other=0.0)
        else:
            a = tl.load(a_at, mask=a_mask & (k < inner - start)[None, :], other=0.0)
            b = tl.load(b_at, mask=b_mask & (k < inner - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_at += a_step
        b_at += b_step
    return acc


@triton.jit
def _logits(hidden_ptr, weight_ptr, rows, vocab, depth, hidden_stride, weight_stride, scale, softcap,
            SOFTCAP: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(column block, rows, columns, logits) of this program's tile. Logits of columns past the vocabulary are undefined."""
    block_m, block_n = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(vocab, BLOCK_N), GROUP)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    logit = _product(zero, hidden_ptr, weight_ptr, row, col, rows, vocab, depth, hidden_stride, 1, 1, weight_stride,
                     EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    if scale is not None:
        logit = logit * scale
    return block_n, row, col, _capped(logit, softcap, SOFTCAP)


@triton.jit
def _labels_in(block_n, labels_ptr, row, col, mask, first_token, vocab, BLOCK_N: tl.constexpr):
    """(here, own): for each row whether its label is in this column block, and the mask of the elements of the tile that are
    the logits of labels."""
    label = tl.load(labels_ptr + row, mask=mask, other=-1).to(tl.int64) - first_token
    here = (label < vocab) & (label >= block_n * BLOCK_N) & (label < (block_n + 1) * BLOCK_N)
    return here, col[None, :] == tl.where(here, label, -1).to(tl.int32)[:, None]


@triton.jit(do_not_specialize=["rows", "first_token"])
def linear_head_fwd_kernel(hidden_ptr, weight_ptr, labels_ptr, stored_ptr, top_ptr, sum_ptr, label_ptr, total_ptr,
                           moment_ptr, index_ptr, rows, vocab, depth, hidden_stride, weight_stride, stored_stride, stride,
                           first_token, scale, softcap,
                           SOFTCAP: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """For each row of a tile of logits: the maximum and the sum of e = exp(logit - maximum); if wanted, the sum of the logits,
    the sum of e * (logit - maximum), and the first column of the maximum. The program whose block holds the label stores the
    label's logit."""
    block_n, row, col, logit = _logits(hidden_ptr, weight_ptr, rows, vocab, depth, hidden_stride, weight_stride, scale, softcap,
                                       SOFTCAP, EVEN, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
    logit = tl.where((col < vocab)[None, :], logit, float("-inf"))
    at = block_n.to(tl.int64) * stride + row
    mask = row < rows
    here, own = _labels_in(block_n, labels_ptr, row, col, mask, first_token, vocab, BLOCK_N)
    tl.store(label_ptr + row, tl.sum(tl.where(own, logit, 0.0), axis=1), mask=mask & here)
    if total_ptr is not None:
        tl.store(total_ptr + at, tl.sum(tl.where((col < vocab)[None, :], logit, 0.0), axis=1), mask=mask)
    top = tl.max(logit, axis=1)
    tl.store(top_ptr + at, top, mask=mask)
    if index_ptr is not None:
        first = tl.where(logit == top[:, None], col[None, :], 2147483647)
        tl.store(index_ptr + at, tl.min(first, axis=1), mask=mask)
    less = logit - tl.where(top == float("-inf"), 0.0, top)[:, None]
    e = _fast_exp(less)
    tl.store(sum_ptr + at, tl.sum(e, axis=1), mask=mask)
    if moment_ptr is not None:
        tl.store(moment_ptr + at, tl.sum(tl.where(less == float("-inf"), 0.0, e * less), axis=1), mask=mask)
    if stored_ptr is not None:
        keep = less if SOFTCAP else e
        stored = stored_ptr + row.to(tl.int64)[:, None] * stored_stride + col[None, :]
        tl.store(stored, keep.to(stored_ptr.dtype.element_ty), mask=mask[:, None] & (col < vocab)[None, :])


@triton.jit
def _merged(top_ptr, sum_ptr, total_ptr, moment_ptr, index_ptr, row, mask, tiles, stride, TILES: tl.constexpr,
            BLOCK: tl.constexpr):
    """Merges the results of `linear_head_fwd_kernel` along the vocabulary. For each row: (maximum, log of the sum of
    exp(logit - maximum), sum of the logits, mean of logit - maximum under the softmax, first column of the maximum). Results
    that the forward did not store have no meaning here."""
    at = tl.arange(0, TILES).to(tl.int64)[:, None] * stride + row[None, :]
    step = tl.cast(stride, tl.int64) * TILES
    top = tl.full((TILES, BLOCK), float("-inf"), tl.float32)
    for start in range(0, tiles, TILES):
        there = (start + tl.arange(0, TILES) < tiles)[:, None] & mask[None, :]
        top = tl.maximum(top, tl.load(top_ptr + at + start // TILES * step, mask=there, other=float("-inf")))
    top = tl.max(top, axis=0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    z = tl.zeros((TILES, BLOCK), tl.float32)
    total = tl.zeros((TILES, BLOCK), tl.float32)
    moment = tl.zeros((TILES, BLOCK), tl.float32)
    index = tl.full((TILES, BLOCK), 2147483647, tl.int32)
    for start in range(0, tiles, TILES):
        there = (start + tl.arange(0, TILES) < tiles)[:, None] & mask[None, :]
        here = at + start // TILES * step
        m = tl.load(top_ptr + here, mask=there, other=float("-inf"))
        w = _fast_exp(m - safe[None, :])
        part = tl.load(sum_ptr + here, mask=there, other=0.0)
        z = tl.fma(part, w, z)
        if total_ptr is not None:
            total += tl.load(total_ptr + here, mask=there, other=0.0)
        if moment_ptr is not None:
            shifted = tl.fma(m - safe[None, :], part, tl.load(moment_ptr + here, mask=there, other=0.0))
            moment += tl.where(m == float("-inf"), 0.0, shifted * w)
        if index_ptr is not None:
            first = tl.load(index_ptr + here, mask=there & (m == top[None, :]), other=2147483647)
            index = tl.minimum(index, first)
    z = tl.sum(z, axis=0)
    return top, tl.log(z), tl.sum(total, axis=0), tl.div_rn(tl.sum(moment, axis=0), z), tl.min(index, axis=0)


# --- launchers ---


def block_sizes(tile, inner):
    """The constexpr arguments of a kernel that computes a matrix product with `tile`, summed over `inner` elements."""
    return dict(EVEN=inner % tile.inner == 0, GROUP=GROUP, BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.inner)


class Blocks(NamedTuple):
    """What the forward stores: one value for each block of the vocabulary and each row, [blocks, padded rows] (None where a
    value is not wanted), and the logit of each row's label."""

    top: torch.Tensor
    sum: torch.Tensor
    label: torch.Tensor
    total: torch.Tensor | None
    moment: torch.Tensor | None
    index: torch.Tensor | None


def chunks(rows: int, largest: int) -> list[tuple[int, int]]:
    """Ranges of at most `largest` rows. Their sizes are multiples of 128, except the last, and as equal as possible."""
    count = max(1, -(-rows // largest))
    size = -(-rows // (128 * count)) * 128
    return [(begin, min(begin + size, rows)) for begin in range(0, rows, max(size, 1))]


def gradient_chunks(rows: int, vocab: int, element_size: int) -> list[tuple[int, int]]:
    return chunks(rows, max(128, CHUNK_BYTES // (vocab * element_size) // 128 * 128))


def forward(hidden, weight, labels, scale, softcap, *, first_token=0, stored=None, needs_sum=False, needs_moment=False,
            needs_index=False) -> Blocks:
    """Launches `linear_head_fwd_kernel`. `scale` multiplies the logits; None stands for 1. `stored`: memory for what the
    backward needs of each logit (see linear_head_bwd.py), or None."""
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    tile = scores_tile(hidden, softcap)
    shape = triton.cdiv(vocab, tile.cols), triton.cdiv(rows, 128) * 128  # padded: the alignment never depends on rows
    new = lambda wanted, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=hidden.device) if wanted else None
    blocks = Blocks(new(True), new(True), torch.empty(shape[1], dtype=torch.float32, device=hidden.device), new(needs_sum),
                    new(needs_moment), new(needs_index, torch.int32))
    launch(linear_head_fwd_kernel, triton.cdiv(rows, tile.rows) * shape[0], hidden.device,
           dict(hidden_ptr=hidden, weight_ptr=weight, labels_ptr=labels, stored_ptr=stored, top_ptr=blocks.top,
                sum_ptr=blocks.sum, label_ptr=blocks.label, total_ptr=blocks.total, moment_ptr=blocks.moment,
                index_ptr=blocks.index, rows=rows, vocab=vocab, depth=depth, hidden_stride=hidden.stride(0),
                weight_stride=weight.stride(0), stored_stride=0 if stored is None else stored.stride(0), stride=shape[1],
                first_token=first_token, scale=scale, softcap=softcap, SOFTCAP=softcap > 0, **block_sizes(tile, depth)),
           num_warps=tile.num_warps, num_stages=tile.num_stages)
    return blocks
