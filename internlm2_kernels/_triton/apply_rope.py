"""Rotary embedding of q and k. Contract: ops/apply_rope.py.

One program rotates a tile of the heads of one token, those of q before those of k: about 2048 elements, with 16-byte accesses.
"""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
from .common import check_dtype, launch


def tile_config(heads: int, half: int, element_size: int) -> tuple[int, int, int]:
    """(heads of a tile, half the columns of a head rounded up to a power of two, warps). Each thread gets 64 bytes, which are
    four 16-byte loads."""
    block = triton.next_power_of_2(half)
    tile = min(triton.next_power_of_2(heads), max(1, 1024 // block))
    return tile, block, max(1, tile * block * element_size // 1024)


@triton.jit(do_not_specialize=["table_rows"])
def apply_rope_fwd_kernel(q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr, error_ptr, table_rows, half,
                          q_stride, q_head_stride, k_stride, k_head_stride,
                          HEADS: tl.constexpr, KV_HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
                          ERROR: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    tiles: tl.constexpr = (HEADS + KV_HEADS + TILE - 1) // TILE
    token = tl.program_id(0).to(tl.int64) // tiles
    head = (tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)).to(tl.int64)
    is_q = (head < HEADS)[:, None]
    is_k = (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None]
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token).to(tl.int64)
    inside = (position >= 0) & (position < table_rows)
    tl.atomic_or(error_ptr, ERROR, mask=inside == 0)
    pair = tl.arange(0, BLOCK)
    known = inside & (pair < half)
    cos = tl.load(cos_ptr + position * half + pair, mask=known, other=float("nan"))[None, :]
    sin = tl.load(sin_ptr + position * half + pair, mask=known, other=float("nan"))[None, :]
    if INVERSE:
        sin = -sin
    q_row = (token * q_stride + head * q_head_stride)[:, None]
    k_row = (token * k_stride + (head - HEADS) * k_head_stride)[:, None]
    q_out = ((token * HEADS + head) * (2 * half))[:, None]
    k_out = ((token * KV_HEADS + head - HEADS) * (2 * half))[:, None]
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    if INTERLEAVED:  # loads whole heads contiguously, and separates even and odd columns in registers
        col = tl.arange(0, 2 * BLOCK)[None, :]
        q_mask = is_q & (col < 2 * half)
        k_mask = is_k & (col < 2 * half)
        x = tl.load(q_ptr + q_row + col, mask=q_mask, other=0.0).to(tl.float32)
        x += tl.load(k_ptr + k_row + col, mask=k_mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (TILE, BLOCK, 2)))
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (TILE, 2 * BLOCK)).to(dtype)
        tl.store(q_out_ptr + q_out + col, y, mask=q_mask)
        tl.store(k_out_ptr + k_out + col, y, mask=k_mask)
    else:
        col = pair[None, :]
        q_mask = is_q & (col < half)
        k_mask = is_k & (col < half)
        a = tl.load(q_ptr + q_row + col, mask=q_mask, other=0.0).to(tl.float32)
        a += tl.load(k_ptr + k_row + col, mask=k_mask, other=0.0).to(tl.float32)
        b = tl.load(q_ptr + q_row + half + col, mask=q_mask, other=0.0).to(tl.float32)
        b += tl.load(k_ptr + k_row + half + col, mask=k_mask, other=0.0).to(tl.float32)
        first = (a * cos - b * sin).to(dtype)
        second = (b * cos + a * sin).to(dtype)
        tl.store(q_out_ptr + q_out + col, first, mask=q_mask)
        tl.store(k_out_ptr + k_out + col, first, mask=k_mask)
        tl.store(q_out_ptr + q_out + half + col, second, mask=q_mask)
        tl.store(k_out_ptr + k_out + half + col, second, mask=k_mask)


def apply_rope_fwd(q, k, cos, sin, positions, interleaved, inverse):
    check_dtype("apply_rope", "q", q)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    tokens, heads, kv_heads, half = q.shape[0], q.shape[1], k.shape[1], q.shape[2] // 2
    if tokens * (heads + kv_heads) == 0:
        return q_out, k_out
    tile, block, num_warps = tile_config(heads + kv_heads, half, q.element_size())
    launch(apply_rope_fwd_kernel, tokens * triton.cdiv(heads + kv_heads, tile), q.device,
           dict(q_ptr=q, k_ptr=k, cos_ptr=cos, sin_ptr=sin, positions_ptr=positions, q_out_ptr=q_out, k_out_ptr=k_out,
                error_ptr=error_word(q.device), table_rows=cos.shape[0], half=half,
                q_stride=q.stride(0), q_head_stride=q.stride(1), k_stride=k.stride(0), k_head_stride=k.stride(1),
                HEADS=heads, KV_HEADS=kv_heads, INTERLEAVED=interleaved, INVERSE=inverse,
                ERROR=CODES["apply_rope", "positions"], TILE=tile, BLOCK=block),
           num_warps=num_warps)
    return q_out, k_out
