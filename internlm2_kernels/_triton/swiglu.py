"""SwiGLU. Contract: ops/swiglu.py. One program computes a tile of 2048 elements: several short rows or part of a long one."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch, rows_of
from .functions import _fast_exp


class Tile(NamedTuple):
    rows: int
    block: int
    num_warps: int


def tile_config(cols: int) -> Tile:
    """The tile with 16 elements of each tensor per thread: two 16-byte loads of a 2-byte dtype, or four of a 4-byte one."""
    block = min(triton.next_power_of_2(cols), 2048)
    return Tile(min(64, 2048 // block), block, max(1, min(64, 2048 // block) * block // 512))


@triton.jit(do_not_specialize=["rows"])
def swiglu_fwd_kernel(gate_ptr, up_ptr, y_ptr, rows, cols, tiles,
                      gate_inner, gate_outer_stride, gate_inner_stride, up_inner, up_outer_stride, up_inner_stride,
                      ROWS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    col = program % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    gate_row = (row // gate_inner) * gate_outer_stride + (row % gate_inner) * gate_inner_stride
    up_row = (row // up_inner) * up_outer_stride + (row % up_inner) * up_inner_stride
    gate = tl.load(gate_ptr + gate_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    y = gate * (1.0 / (1.0 + _fast_exp(-gate))) * up
    tl.store(y_ptr + (row * cols)[:, None] + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def swiglu_bwd_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, cols, tiles, out_stride,
                      dy_inner, dy_outer_stride, dy_inner_stride, gate_inner, gate_outer_stride, gate_inner_stride,
                      up_inner, up_outer_stride, up_inner_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """With s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    col = program % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    dy_row = (row // dy_inner) * dy_outer_stride + (row % dy_inner) * dy_inner_stride
    gate_row = (row // gate_inner) * gate_outer_stride + (row % gate_inner) * gate_inner_stride
    up_row = (row // up_inner) * up_outer_stride + (row % up_inner) * up_inner_stride
    dy = tl.load(dy_ptr + dy_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + gate_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + _fast_exp(-gate))
    out = (row * out_stride)[:, None] + col[None, :]
    dgate = dy * up * s * tl.fma(gate, 1.0 - s, 1.0)
    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + out, (dy * (gate * s)).to(dup_ptr.dtype.element_ty), mask=mask)


def _grid(rows, cols):
    tile = tile_config(cols)
    tiles = triton.cdiv(cols, tile.block)
    return tile, triton.cdiv(rows, tile.rows) * tiles, dict(rows=rows, cols=cols, tiles=tiles, ROWS=tile.rows,
                                                            BLOCK=tile.block)


def swiglu_fwd(gate, up):
    check_dtype("swiglu", "gate", gate)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        rows = rows_of(gate)
        tile, programs, sizes = _grid(rows.count, gate.shape[-1])
        launch(swiglu_fwd_kernel, programs, gate.device,
               dict(gate_ptr=gate, up_ptr=up, y_ptr=y, **sizes, **rows.named("gate"), **rows_of(up).named("up")),
               num_warps=tile.num_warps)
    return y


def swiglu_bwd(dy, gate, up, packed):
    check_dtype("swiglu", "gate", gate)
    cols = gate.shape[-1]
    out_stride = 2 * cols if packed else cols
    dgate = torch.empty((*gate.shape[:-1], out_stride), dtype=gate.dtype, device=gate.device)
    dup = torch.empty(0 if packed else gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        rows = rows_of(gate)
        tile, programs, sizes = _grid(rows.count, cols)
        launch(swiglu_bwd_kernel, programs, gate.device,
               dict(dy_ptr=dy, gate_ptr=gate, up_ptr=up, dgate_ptr=dgate, dup_ptr=dgate[..., cols:] if packed else dup,
                    out_stride=out_stride, **sizes, **rows_of(dy).named("dy"), **rows.named("gate"),
                    **rows_of(up).named("up")),
               num_warps=tile.num_warps)
    return dgate, dup
