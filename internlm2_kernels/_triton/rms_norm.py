"""RMS normalization. Contract: ops/rms_norm.py.

Up to LARGEST_TILE columns (LARGEST_BACKWARD_TILE in the backward) a program holds whole rows in registers and reads them
once. For more columns a program reads its row twice, the second time mostly from the L2 cache. The tile depends only on the
number of columns, so a row's bits depend only on its own values and on whether rows are aligned to 16 bytes: the alignment
decides the width of a load, and the width decides the order of the sum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch, rows_of

LARGEST_TILE = 16384
LARGEST_BACKWARD_TILE = 8192  # the row and the partial sums of dweight are both in registers; 16384 would spill
PROGRAMS = 264  # persistent programs of the backward: two for each of an H100's 132 multiprocessors
WIDE_PROGRAMS = 32  # partial sums of dweight where rows are longer than the largest tile: fewer, because each takes more memory


class Tile(NamedTuple):
    rows: int
    block: int
    num_warps: int


def tile_config(cols: int) -> Tile:
    """The tile with 16 elements per thread, which are two 16-byte loads of a 2-byte dtype or four of a 4-byte one, and at least
    2048 elements per program, as far as 64 rows hold so many."""
    block = min(triton.next_power_of_2(cols), LARGEST_TILE)
    rows = max(1, min(64, 2048 // block))
    return Tile(rows, block, max(1, rows * block // 512))


def backward_stages(block: int, element_size: int) -> int:
    """The num_stages of the backward's loop over row tiles: 3 where the tiles of its three inputs fit twice into the shared
    memory of an A100, so that two are prefetched, otherwise 2 (one is prefetched)."""
    return 3 if block * element_size <= 16384 else 2


@triton.jit(do_not_specialize=["rows"])
def rms_norm_fwd_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, rows, cols, eps,
                        x_inner, x_outer_stride, x_inner_stride,
                        residual_inner, residual_outer_stride, residual_inner_stride,
                        HF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    x_row = (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
    out = (row * cols)[:, None] + col[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    h = tl.load(x_ptr + x_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        r_row = (row // residual_inner) * residual_outer_stride + (row % residual_inner) * residual_inner_stride
        r = tl.load(residual_ptr + r_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = (h + r).to(dtype)
        tl.store(h_ptr + out, rounded, mask=mask)
        h = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
    mean = tl.div_rn(tl.sum(h * h, axis=1), cols * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    x_hat = h * rstd[:, None]
    if HF:
        x_hat = x_hat.to(dtype).to(tl.float32)
    tl.store(y_ptr + out, (x_hat * weight[None, :]).to(dtype), mask=mask)


@triton.jit
def rms_norm_fwd_wide_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, cols, eps,
                             x_inner, x_outer_stride, x_inner_stride,
                             residual_inner, residual_outer_stride, residual_inner_stride,
                             HF: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
    if residual_ptr is not None:
        residual_ptr += (row // residual_inner) * residual_outer_stride + (row % residual_inner) * residual_inner_stride
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            h += tl.load(residual_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
            h = h.to(dtype).to(tl.float32)
        squares += h * h
    mean = tl.div_rn(tl.sum(squares, axis=0), cols * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            h += tl.load(residual_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
            rounded = h.to(dtype)
            tl.store(h_ptr + row * cols + col, rounded, mask=col < cols)
            h = rounded.to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x_hat = h * rstd
        if HF:
            x_hat = x_hat.to(dtype).to(tl.float32)
        tl.store(y_ptr + row * cols + col, (x_hat * weight).to(dtype), mask=col < cols)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_bwd_kernel(dy_ptr, dresidual_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, rows, cols,
                        dy_inner, dy_outer_stride, dy_inner_stride,
                        dresidual_inner, dresidual_outer_stride, dresidual_inner_stride,
                        h_inner, h_outer_stride, h_inner_stride,
                        HF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Computes dx = rstd * (g - x_hat * mean(g * x_hat)) + dresidual with x_hat = h * rstd and g = dy * weight, and for each
    program the partial sums of dy * x_hat over its rows, which `rms_norm_dweight_kernel` adds up to dweight.

    Program p processes the row tiles p, p + programs, ..., so that concurrent programs read neighbouring rows.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    col = tl.arange(0, BLOCK)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(first, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + start
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        dy_row = (row // dy_inner) * dy_outer_stride + (row % dy_inner) * dy_inner_stride
        h_row = (row // h_inner) * h_outer_stride + (row % h_inner) * h_inner_stride
        dy = tl.load(dy_ptr + dy_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + h_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x_hat = h * rstd[:, None]
        if partial_ptr is not None:  # before dx is computed, so that dy needs no registers after this
            dweight += dy * (x_hat.to(dtype).to(tl.float32) if HF else x_hat)
        g = dy * weight[None, :]
        mean = tl.div_rn(tl.sum(g * x_hat, axis=1), cols * 1.0)
        dx = (g - x_hat * mean[:, None]) * rstd[:, None]
        if dresidual_ptr is not None:
            r_row = ((row // dresidual_inner) * dresidual_outer_stride + (row % dresidual_inner) * dresidual_inner_stride)
            dx += tl.load(dresidual_ptr + r_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + (row * cols)[:, None] + col[None, :], dx.to(dtype), mask=mask)
    if partial_ptr is not None:
        out = tl.program_id(0).to(tl.int64) * cols + col
        tl.store(partial_ptr + out, tl.sum(dweight, axis=0), mask=col < cols)


@triton.jit
def rms_norm_bwd_wide_kernel(dy_ptr, dresidual_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, cols,
                             dy_inner, dy_outer_stride, dy_inner_stride,
                             dresidual_inner, dresidual_outer_stride, dresidual_inner_stride,
                             h_inner, h_outer_stride, h_inner_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += (row // dy_inner) * dy_outer_stride + (row % dy_inner) * dy_inner_stride
    h_ptr += (row // h_inner) * h_outer_stride + (row % h_inner) * h_inner_stride
    if dresidual_ptr is not None:
        dresidual_ptr += ((row // dresidual_inner) * dresidual_outer_stride
                          + (row % dresidual_inner) * dresidual_inner_stride)
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        dy = tl.load(dy_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
        products += dy * weight * (h * rstd)
    mean = tl.div_rn(tl.sum(products, axis=0), cols * 1.0)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        dy = tl.load(dy_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dx = (dy * weight - h * rstd * mean) * rstd
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * cols + col, dx.to(dx_ptr.dtype.element_ty), mask=col < cols)


@triton.jit(do_not_specialize=["rows", "programs"])
def rms_norm_bwd_wide_dweight_kernel(dy_ptr, h_ptr, rstd_ptr, partial_ptr, rows, cols, programs,
                                     dy_inner, dy_outer_stride, dy_inner_stride,
                                     h_inner, h_outer_stride, h_inner_stride,
                                     HF: tl.constexpr, BLOCK: tl.constexpr):
    """For rows longer than the largest tile: a program computes, for a tile of columns, the sum of dy * x_hat over the rows p,
    p + programs, ..., which is the partial sum number p of dweight."""
    first = tl.program_id(0).to(tl.int64) % programs
    col = tl.program_id(0).to(tl.int64) // programs * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    row = first
    while row < rows:
        dy_row = (row // dy_inner) * dy_outer_stride + (row % dy_inner) * dy_inner_stride
        h_row = (row // h_inner) * h_outer_stride + (row % h_inner) * h_inner_stride
        dy = tl.load(dy_ptr + dy_row + col, mask=col < cols, other=0.0).to(tl.float32)
        x_hat = tl.load(h_ptr + h_row + col, mask=col < cols, other=0.0).to(tl.float32) * tl.load(rstd_ptr + row)
        if HF:
            x_hat = x_hat.to(h_ptr.dtype.element_ty).to(tl.float32)
        total += dy * x_hat
        row += programs
    tl.store(partial_ptr + first * cols + col, total, mask=col < cols)


@triton.jit(do_not_specialize=["partials"])
def rms_norm_dweight_kernel(partial_ptr, dweight_ptr, partials, cols, PARTIALS: tl.constexpr, BLOCK: tl.constexpr):
    """dweight = the sum of the partial sums, in an order that depends only on their number."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((PARTIALS, BLOCK), tl.float32)
    for start in range(0, partials, PARTIALS):
        row = start + tl.arange(0, PARTIALS)
        mask = (row < partials)[:, None] & (col < cols)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * cols + col[None, :], mask=mask, other=0.0)
    tl.store(dweight_ptr + col, tl.sum(total, axis=0).to(dweight_ptr.dtype.element_ty), mask=col < cols)


def _forward(x, residual, weight, eps, hf):
    check_dtype("rms_norm", "x", x)
    check_dtype("rms_norm", "weight", weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    x_rows, cols = rows_of(x), x.shape[-1]
    if x_rows.count == 0:
        return y, h, rstd
    r_rows = x_rows if residual is None else rows_of(residual)
    tile = tile_config(cols)
    arguments = dict(x_ptr=x, residual_ptr=residual, weight_ptr=weight, y_ptr=y, h_ptr=h, rstd_ptr=rstd, cols=cols, eps=eps,
                     HF=hf, BLOCK=tile.block, **x_rows.named("x"), **r_rows.named("residual"))
    if cols > LARGEST_TILE:
        launch(rms_norm_fwd_wide_kernel, x_rows.count, x.device, arguments, num_warps=tile.num_warps)
    else:
        arguments.update(rows=x_rows.count, ROWS=tile.rows)
        launch(rms_norm_fwd_kernel, triton.cdiv(x_rows.count, tile.rows), x.device, arguments, num_warps=tile.num_warps)
    return y, h, rstd


def rms_norm_fwd(x, weight, eps, hf):
    y, _, rstd = _forward(x, None, weight, eps, hf)
    return y, rstd


def rms_norm_add_fwd(x, residual, weight, eps, hf):
    return _forward(x, residual, weight, eps, hf)


def rms_norm_bwd(dy, dresidual, h, weight, rstd, hf, needs_dweight):
    check_dtype("rms_norm", "x", h)
    check_dtype("rms_norm", "weight", weight)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    cols, rows = h.shape[-1], rows_of(h).count
    if not needs_dweight:
        dweight = torch.empty(0, dtype=weight.dtype, device=weight.device)
    elif rows == 0:
        return dx, torch.zeros_like(weight)
    else:
        dweight = torch.empty_like(weight)
    if rows == 0:
        return dx, dweight
    strides = {**rows_of(dy).named("dy"), **rows_of(h).named("h"),
               **rows_of(h if dresidual is None else dresidual).named("dresidual")}
    arguments = dict(dy_ptr=dy, dresidual_ptr=dresidual, h_ptr=h, weight_ptr=weight, rstd_ptr=rstd, dx_ptr=dx, cols=cols,
                     **strides)
    run = _backward_wide if cols > LARGEST_BACKWARD_TILE else _backward
    partial = run(arguments, rows, cols, h.device, hf, needs_dweight)
    if needs_dweight:
        launch(rms_norm_dweight_kernel, triton.cdiv(cols, 32), h.device,
               dict(partial_ptr=partial, dweight_ptr=dweight, partials=partial.shape[0], cols=cols, PARTIALS=64, BLOCK=32),
               num_warps=4)
    return dx, dweight


def _backward(arguments, rows, cols, device, hf, needs_dweight):
    tile = tile_config(cols)
    programs = min(triton.cdiv(rows, tile.rows), PROGRAMS)
    partial = torch.empty((programs, cols), dtype=torch.float32, device=device) if needs_dweight else None
    launch(rms_norm_bwd_kernel, programs, device,
           dict(arguments, partial_ptr=partial, rows=rows, HF=hf, ROWS=tile.rows, BLOCK=tile.block,
                STAGES=backward_stages(tile.block, arguments["dx_ptr"].element_size())),
           num_warps=tile.num_warps)
    return partial


def _backward_wide(arguments, rows, cols, device, hf, needs_dweight):
    launch(rms_norm_bwd_wide_kernel, rows, device, dict(arguments, BLOCK=8192), num_warps=16)
    if not needs_dweight:
        return None
    programs, block = min(rows, WIDE_PROGRAMS), 1024
    partial = torch.empty((programs, cols), dtype=torch.float32, device=device)
    names = ("dy_ptr", "h_ptr", "rstd_ptr", "cols", "dy_inner", "dy_outer_stride", "dy_inner_stride", "h_inner",
             "h_outer_stride", "h_inner_stride")
    launch(rms_norm_bwd_wide_dweight_kernel, programs * triton.cdiv(cols, block), device,
           dict({name: arguments[name] for name in names}, partial_ptr=partial, rows=rows, programs=programs, HF=hf,
                BLOCK=block), num_warps=4)
    return partial
