"""The matrix product of `linear` with one order of sums, for its forward and both gradients.

A tile's shape does not depend on the number of rows. The sum is cut into pieces; each is accumulated by itself, in steps of
BLOCK_K, and the pieces are added in a balanced tree (or, over the rows of a batch, one after the other). Where there are too
few tiles to fill the GPU, a program computes one piece of a tile and a second kernel adds the pieces in the same tree.
"""

import torch
import triton
import triton.language as tl

from .common import architecture, check_dtype, launch
from .linear_head import GROUP, Tile

ROWS_AT_ONCE = 512  # rows of the batch in a piece of the gradient of the weight
FEW_TILES = 256     # with fewer tiles than this, pieces are computed by programs of their own


def tile_config(element_size: int, arch: int) -> Tile:
    """The tile for an architecture. Up to four tiles of sums are live at once, which keeps it small."""
    if element_size == 4:
        return Tile(64, 64, 32, 8, 2)
    return Tile(128, 64, 64, 8, 3 if arch < 90 else 4)


def piece_of(inner: int, pieces: int) -> int:
    """The length of a piece: a multiple of the steps of all tiles."""
    return max(1, -(-inner // (64 * pieces))) * 64


@triton.jit
def _chain(a_at, b_at, a_mask, b_mask, start, end, a_inner, b_inner, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum over k in [start, end), in steps of BLOCK_K. EVEN: BLOCK_K divides every piece."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a_from = a_at + (start + k.to(tl.int64))[None, :] * a_inner
    b_from = b_at + (start + k.to(tl.int64))[:, None] * b_inner
    a_step = tl.cast(a_inner, tl.int64) * BLOCK_K
    b_step = tl.cast(b_inner, tl.int64) * BLOCK_K
    for at in tl.range(start, end, BLOCK_K):
        if EVEN:
            a = tl.load(a_from, mask=a_mask, other=0.0)
            b = tl.load(b_from, mask=b_mask, other=0.0)
        else:
            a = tl.load(a_from, mask=a_mask & (k < end - at)[None, :], other=0.0)
            b = tl.load(b_from, mask=b_mask & (k < end - at)[:, None], other=0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
        a_from += a_step
        b_from += b_step
    return acc


@triton.jit
def _finish(total, out_ptr, bias_ptr, residual_ptr, row, col, col_mask, row_mask, out_stride, residual_stride):
    """Adds bias and residual, rounds, stores."""
    if bias_ptr is not None:
        total += tl.load(bias_ptr + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None]
    inside = row_mask[:, None] & col_mask[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at * residual_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at * out_stride + col[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(a_ptr, b_ptr, out_ptr, bias_ptr, residual_ptr, rows, cols, inner, piece, pieces, a_row, a_inner, b_inner,
                  b_col, out_stride, residual_stride, EVEN: tl.constexpr, TREE: tl.constexpr, SPLIT: tl.constexpr,
                  GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of the product. SPLIT: one piece of one tile, stored in float32 at [piece, rows, cols]."""
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    program = tl.program_id(0) % (blocks_m * blocks_n)
    group = program // (GROUP * blocks_n)  # as in linear_head._place, by the number of the tile
    size = tl.minimum(blocks_m - group * GROUP, GROUP)
    place = program - group * (GROUP * blocks_n)
    row = (group * GROUP + place % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = place // size * BLOCK_N + tl.arange(0, BLOCK_N)
    a_at = a_ptr + row.to(tl.int64)[:, None] * a_row
    b_at = b_ptr + col.to(tl.int64)[None, :] * b_col
    a_mask = (row < rows)[:, None]
    b_mask = (col < cols)[None, :]
    length = tl.cast(piece, tl.int64)
    if SPLIT:
        index = tl.program_id(0) // (blocks_m * blocks_n)
        acc = _chain(a_at, b_at, a_mask, b_mask, index * length, tl.minimum((index + 1) * length, inner), a_inner, b_inner,
                     EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
        at = (tl.cast(index, tl.int64) * rows + row)[:, None] * cols + col[None, :]
        tl.store(out_ptr + at, acc, mask=a_mask & b_mask)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        one = acc  # the sums of one, two and four pieces that wait for their neighbour
        two = acc
        four = acc
        for index in range(pieces):
            acc = _chain(a_at, b_at, a_mask, b_mask, index * length, tl.minimum((index + 1) * length, inner), a_inner, b_inner,
                         EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
            if TREE:
                if index % 2 == 0:
                    one = acc
                else:
                    acc = one + acc
                    if index % 4 == 1:
                        two = acc
                    else:
                        acc = two + acc
                        if index % 8 == 3:
                            four = acc
                        else:
                            acc = four + acc
            else:
                acc = one + acc
                one = acc
        _finish(acc, out_ptr, bias_ptr, residual_ptr, row, col, col < cols, row < rows, out_stride, residual_stride)


# The rows of the gradient of the weight are the weight's, whose number does not change from call to call. There the kernel is
# compiled for what divides it, so that loads along the rows are wide.
linear_weight_kernel = triton.jit(linear_kernel.fn)


@triton.jit(do_not_specialize=["rows"])
def linear_merge_kernel(parts_ptr, out_ptr, bias_ptr, residual_ptr, rows, cols, out_stride, residual_stride,
                        PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds the pieces [piece, rows, cols] of a block of the result in the tree of `linear_kernel`."""
    blocks = tl.cdiv(cols, BLOCK_N)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    at = parts_ptr + row.to(tl.int64)[:, None] * cols + col[None, :]
    step = tl.cast(rows, tl.int64) * cols
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    if PIECES >= 2:
        total += tl.load(at + step, mask=mask, other=0.0)
    if PIECES >= 4:
        total += tl.load(at + 2 * step, mask=mask, other=0.0) + tl.load(at + 3 * step, mask=mask, other=0.0)
    if PIECES >= 8:
        low = tl.load(at + 4 * step, mask=mask, other=0.0) + tl.load(at + 5 * step, mask=mask, other=0.0)
        high = tl.load(at + 6 * step, mask=mask, other=0.0) + tl.load(at + 7 * step, mask=mask, other=0.0)
        total += low + high
    _finish(total, out_ptr, bias_ptr, residual_ptr, row, col, col < cols, row < rows, out_stride, residual_stride)


@triton.jit(do_not_specialize=["rows"])
def linear_bwd_bias_kernel(dy_ptr, dbias_ptr, rows, cols, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of BLOCK_N columns over all rows, BLOCK_M rows after the other."""
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, rows, BLOCK_M):
        inside = (start + row < rows)[:, None] & (col < cols)[None, :]
        at = (start + row).to(tl.int64)[:, None] * stride + col[None, :]
        total += tl.sum(tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32), axis=0)
    tl.store(dbias_ptr + col, total, mask=col < cols)


def _multiply(a, b, out, bias=None, residual=None, *, piece, pieces, tree):
    """out = a b + bias + residual. `a` [m, k] and `b` [k, n] may have any strides, `out` and `residual` [m, n] rows."""
    (rows, inner), cols = a.shape, b.shape[1]
    if not rows or not cols:
        return
    if not inner and bias is None and residual is None:
        out.zero_()
        return
    tile = tile_config(a.element_size(), architecture(a.device))
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    split = tree and pieces > 1 and tiles < FEW_TILES
    parts = torch.empty((pieces, rows, cols), dtype=torch.float32, device=a.device) if split else None
    epilogue = dict(bias_ptr=bias, residual_ptr=residual, residual_stride=0 if residual is None else residual.stride(0))
    launch(linear_kernel if tree else linear_weight_kernel, tiles * (pieces if split else 1), a.device,
           dict(a_ptr=a, b_ptr=b, out_ptr=parts if split else out, rows=rows, cols=cols, inner=inner, piece=piece,
                pieces=pieces, a_row=a.stride(0), a_inner=a.stride(1), b_inner=b.stride(0), b_col=b.stride(1),
                **(dict(bias_ptr=None, residual_ptr=None, residual_stride=0) if split else epilogue),
                out_stride=out.stride(0), EVEN=inner % tile.inner == 0, TREE=tree, SPLIT=split, GROUP=GROUP,
                BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.inner),
           num_warps=tile.num_warps, num_stages=tile.num_stages)
    if split:
        launch(linear_merge_kernel, triton.cdiv(rows, 16) * triton.cdiv(cols, 128), a.device,
               dict(parts_ptr=parts, out_ptr=out, rows=rows, cols=cols, out_stride=out.stride(0), PIECES=pieces, BLOCK_M=16,
                    BLOCK_N=128, **epilogue), num_warps=4)


def linear_fwd(x, weight, bias, residual, pieces, wide):
    check_dtype("linear", "x", x)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if wide else x.dtype, device=x.device)
    _multiply(x, weight.T, out, bias, residual, piece=piece_of(x.shape[1], pieces), pieces=pieces, tree=True)
    return out


def linear_bwd(dy, x, weight, pieces, wide, needs_dbias):
    check_dtype("linear", "dy", dy)
    rows, cols = dy.shape
    new = lambda *shape, dtype=dy.dtype: torch.empty(shape, dtype=dtype, device=dy.device)
    dx = new(0) if weight is None else new(rows, weight.shape[1])
    dweight = new(0) if x is None else new(cols, x.shape[1], dtype=torch.float32 if wide else dy.dtype)
    dbias = new(cols if needs_dbias else 0, dtype=torch.float32)
    if weight is not None:
        _multiply(dy, weight, dx, piece=piece_of(cols, pieces), pieces=pieces, tree=True)
    if x is not None:
        _multiply(dy.T, x, dweight, piece=ROWS_AT_ONCE, pieces=triton.cdiv(rows, ROWS_AT_ONCE), tree=False)
    if needs_dbias and not rows:
        dbias.zero_()
    elif needs_dbias and cols:
        launch(linear_bwd_bias_kernel, triton.cdiv(cols, 64), dy.device,
               dict(dy_ptr=dy, dbias_ptr=dbias, rows=rows, cols=cols, stride=dy.stride(0), BLOCK_M=32, BLOCK_N=64), num_warps=4)
    return dx, dweight, dbias
