"""Split of the packed projection, rotation, cache write. Contract: ops/qkv_rope.py.

One program processes a tile of the slots of one token. Slot s is block s of the columns of qkv: each key/value group has
first its query heads, then its key, then its value. Every slot is read once and written once.
"""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
from .common import check_dtype, launch


def tile_config(slots: int, half: int, element_size: int) -> tuple[int, int, int]:
    """(slots of a tile, half the columns of a slot rounded up to a power of two, warps). Each thread gets 64 bytes, which are
    four 16-byte loads."""
    block = triton.next_power_of_2(half)
    tile = min(triton.next_power_of_2(slots), max(1, 1024 // block))
    return tile, block, max(1, tile * block * element_size // 1024)


@triton.jit
def _rotate(a, b, cos_ptr, sin_ptr, position, table_rows, half, rotated, BLOCK: tl.constexpr, INVERSE: tl.constexpr):
    """Rotates the halves (a, b) of a tile of heads by the angles of `position` where `rotated` is True (queries and keys), and
    keeps them elsewhere (values). A position outside the table gives NaN."""
    pair = tl.arange(0, BLOCK)
    inside = (position >= 0) & (position < table_rows)
    cos = tl.load(cos_ptr + position * half + pair, mask=inside & (pair < half), other=float("nan"))[None, :]
    sin = tl.load(sin_ptr + position * half + pair, mask=inside & (pair < half), other=float("nan"))[None, :]
    if INVERSE:
        sin = -sin
    first = tl.where(rotated, a * cos - b * sin, tl.where(inside, a, float("nan")))
    second = tl.where(rotated, b * cos + a * sin, tl.where(inside, b, float("nan")))
    return first, second


@triton.jit
def _quantize(first, second, mask):
    """(first, second, scale): the two halves of the rows of the tile, divided by the scale of the row and rounded half to even
    to integers from -127 to 127, and scale = max |x| / 127 of each row."""
    a_in = tl.where(mask, first.to(tl.float32), 0.0)
    b_in = tl.where(mask, second.to(tl.float32), 0.0)
    a, b = a_in, b_in
    size = tl.maximum(tl.where(a == a, tl.abs(a), float("inf")), tl.where(b == b, tl.abs(b), float("inf")))
    scale = tl.div_rn(tl.max(size, axis=1), 127.0)
    divisor = tl.where(scale == 0.0, 1.0, scale)[:, None]
    # Adding and subtracting 1.5 * 2^23 rounds half to even. In a row that is not finite the integers do not matter, because the
    # scale that multiplies them is not finite either.
    a = (tl.div_rn(tl.where(tl.abs(a) < float("inf"), a, 0.0), divisor) + 12582912.0) - 12582912.0
    b = (tl.div_rn(tl.where(tl.abs(b) < float("inf"), b, 0.0), divisor) + 12582912.0) - 12582912.0
    nan = tl.max(((a_in != a_in) | (b_in != b_in)).to(tl.int32), axis=1) != 0  # tl.max may drop a NaN
    scale = tl.where(nan, float("nan"), scale)
    return tl.minimum(tl.maximum(a, -127.0), 127.0), tl.minimum(tl.maximum(b, -127.0), 127.0), scale


@triton.jit(do_not_specialize=["table_rows", "cache_rows"])
def qkv_rope_fwd_kernel(qkv_ptr, cos_ptr, sin_ptr, positions_ptr, q_ptr, k_ptr, v_ptr,
                        k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, error_ptr,
                        table_rows, cache_rows, half, qkv_stride,
                        GROUP: tl.constexpr, KV_HEADS: tl.constexpr, POSITION_ERROR: tl.constexpr,
                        SLOT_ERROR: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    slots: tl.constexpr = KV_HEADS * (GROUP + 2)
    tiles: tl.constexpr = (slots + TILE - 1) // TILE
    token = tl.program_id(0).to(tl.int64) // tiles
    slot = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    kv_head = slot // (GROUP + 2)
    kind = slot % (GROUP + 2)  # less than GROUP: a query head; GROUP: the key; GROUP + 1: the value
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token).to(tl.int64)
    inside = (position >= 0) & (position < table_rows)
    tl.atomic_or(error_ptr, POSITION_ERROR, mask=inside == 0)

    col = tl.arange(0, BLOCK)[None, :]
    mask = (slot < slots)[:, None] & (col < half)
    x_ptr = qkv_ptr + token * qkv_stride + (slot * (2 * half))[:, None] + col
    a = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + half, mask=mask, other=0.0).to(tl.float32)
    first, second = _rotate(a, b, cos_ptr, sin_ptr, position, table_rows, half, (kind <= GROUP)[:, None], BLOCK, False)
    first = first.to(q_ptr.dtype.element_ty)
    second = second.to(q_ptr.dtype.element_ty)

    q_out = ((token * (KV_HEADS * GROUP) + kv_head * GROUP + kind) * (2 * half))[:, None] + col
    kv_out = ((token * KV_HEADS + kv_head) * (2 * half))[:, None] + col
    q_mask = mask & (kind < GROUP)[:, None]
    k_mask = mask & (kind == GROUP)[:, None]
    v_mask = mask & (kind == GROUP + 1)[:, None]
    tl.store(q_ptr + q_out, first, mask=q_mask)
    tl.store(q_ptr + q_out + half, second, mask=q_mask)
    tl.store(k_ptr + kv_out, first, mask=k_mask)
    tl.store(k_ptr + kv_out + half, second, mask=k_mask)
    tl.store(v_ptr + kv_out, first, mask=v_mask)
    tl.store(v_ptr + kv_out + half, second, mask=v_mask)

    if k_cache_ptr is not None:
        cache_row = tl.load(slots_ptr + token)
        tl.atomic_or(error_ptr, SLOT_ERROR, mask=(cache_row < -1) | (cache_row >= cache_rows))
        written = (slot < slots) & inside & (cache_row >= 0) & (cache_row < cache_rows)
        is_k = written & (kind == GROUP)
        is_v = written & (kind == GROUP + 1)
        place = cache_row * KV_HEADS + kv_head
        if k_scale_ptr is not None:
            first, second, scale = _quantize(first, second, mask)
            tl.store(k_scale_ptr + place, scale, mask=is_k)
            tl.store(v_scale_ptr + place, scale, mask=is_v)
        out = (place * (2 * half))[:, None] + col
        first = first.to(k_cache_ptr.dtype.element_ty)
        second = second.to(k_cache_ptr.dtype.element_ty)
        tl.store(k_cache_ptr + out, first, mask=is_k[:, None] & (col < half))
        tl.store(k_cache_ptr + out + half, second, mask=is_k[:, None] & (col < half))
        tl.store(v_cache_ptr + out, first, mask=is_v[:, None] & (col < half))
        tl.store(v_cache_ptr + out + half, second, mask=is_v[:, None] & (col < half))


@triton.jit(do_not_specialize=["table_rows"])
def qkv_rope_bwd_kernel(dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, positions_ptr, dqkv_ptr, error_ptr, table_rows, half,
                        dq_stride, dq_head_stride, dk_stride, dk_head_stride, dv_stride, dv_head_stride,
                        GROUP: tl.constexpr, KV_HEADS: tl.constexpr, POSITION_ERROR: tl.constexpr,
                        TILE: tl.constexpr, BLOCK: tl.constexpr):
    slots: tl.constexpr = KV_HEADS * (GROUP + 2)
    tiles: tl.constexpr = (slots + TILE - 1) // TILE
    token = tl.program_id(0).to(tl.int64) // tiles
    slot = (tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)).to(tl.int64)
    kv_head = slot // (GROUP + 2)
    kind = slot % (GROUP + 2)
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token).to(tl.int64)
    tl.atomic_or(error_ptr, POSITION_ERROR, mask=(position < 0) | (position >= table_rows))

    col = tl.arange(0, BLOCK)[None, :]
    mask = (slot < slots)[:, None] & (col < half)
    q_mask = mask & (kind < GROUP)[:, None]
    k_mask = mask & (kind == GROUP)[:, None]
    v_mask = mask & (kind == GROUP + 1)[:, None]
    dq_ptr += (token * dq_stride + (kv_head * GROUP + kind) * dq_head_stride)[:, None] + col
    dk_ptr += (token * dk_stride + kv_head * dk_head_stride)[:, None] + col
    dv_ptr += (token * dv_stride + kv_head * dv_head_stride)[:, None] + col
    a = tl.load(dq_ptr, mask=q_mask, other=0.0).to(tl.float32)
    a += tl.load(dk_ptr, mask=k_mask, other=0.0).to(tl.float32)
    a += tl.load(dv_ptr, mask=v_mask, other=0.0).to(tl.float32)
    b = tl.load(dq_ptr + half, mask=q_mask, other=0.0).to(tl.float32)
    b += tl.load(dk_ptr + half, mask=k_mask, other=0.0).to(tl.float32)
    b += tl.load(dv_ptr + half, mask=v_mask, other=0.0).to(tl.float32)
    first, second = _rotate(a, b, cos_ptr, sin_ptr, position, table_rows, half, (kind <= GROUP)[:, None], BLOCK, True)
    out = ((token * slots + slot) * (2 * half))[:, None] + col
    tl.store(dqkv_ptr + out, first.to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(dqkv_ptr + out + half, second.to(dqkv_ptr.dtype.element_ty), mask=mask)


def _forward(qkv, cos, sin, positions, num_heads, num_kv_heads, cache):
    check_dtype("qkv_rope", "qkv", qkv)
    tokens, slots = qkv.shape[0], num_heads + 2 * num_kv_heads
    head_dim = qkv.shape[1] // slots
    q, k, v = (torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
               for heads in (num_heads, num_kv_heads, num_kv_heads))
    if tokens == 0:
        return q, k, v
    k_cache, v_cache, k_scale, v_scale, cache_slots = cache
    tile, block, num_warps = tile_config(slots, head_dim // 2, qkv.element_size())
    launch(qkv_rope_fwd_kernel, tokens * triton.cdiv(slots, tile), qkv.device,
           dict(qkv_ptr=qkv, cos_ptr=cos, sin_ptr=sin, positions_ptr=positions, q_ptr=q, k_ptr=k, v_ptr=v,
                k_cache_ptr=k_cache, v_cache_ptr=v_cache, k_scale_ptr=k_scale, v_scale_ptr=v_scale, slots_ptr=cache_slots,
                error_ptr=error_word(qkv.device), table_rows=cos.shape[0],
                cache_rows=0 if k_cache is None else k_cache.shape[0] * k_cache.shape[1],
                half=head_dim // 2, qkv_stride=qkv.stride(0), GROUP=num_heads // num_kv_heads, KV_HEADS=num_kv_heads,
                POSITION_ERROR=CODES["qkv_rope", "positions"], SLOT_ERROR=CODES["qkv_rope", "cache.slots"],
                TILE=tile, BLOCK=block), num_warps=num_warps)
    return q, k, v


def qkv_rope_fwd(qkv, cos, sin, positions, num_heads, num_kv_heads):
    return _forward(qkv, cos, sin, positions, num_heads, num_kv_heads, (None,) * 5)


def qkv_rope_cache_fwd(qkv, cos, sin, positions, num_heads, num_kv_heads, k_cache, v_cache, k_scale, v_scale, slots):
    return _forward(qkv, cos, sin, positions, num_heads, num_kv_heads, (k_cache, v_cache, k_scale, v_scale, slots))


def qkv_rope_bwd(dq, dk, dv, cos, sin, positions):
    check_dtype("qkv_rope", "dq", dq)
    tokens, heads, head_dim = dq.shape
    kv_heads = dk.shape[1]
    slots = heads + 2 * kv_heads
    dqkv = torch.empty((tokens, slots * head_dim), dtype=dq.dtype, device=dq.device)
    if tokens == 0:
        return dqkv
    tile, block, num_warps = tile_config(slots, head_dim // 2, dq.element_size())
    launch(qkv_rope_bwd_kernel, tokens * triton.cdiv(slots, tile), dq.device,
           dict(dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, cos_ptr=cos, sin_ptr=sin, positions_ptr=positions, dqkv_ptr=dqkv,
                error_ptr=error_word(dq.device), table_rows=cos.shape[0], half=head_dim // 2,
                dq_stride=dq.stride(0), dq_head_stride=dq.stride(1), dk_stride=dk.stride(0), dk_head_stride=dk.stride(1),
                dv_stride=dv.stride(0), dv_head_stride=dv.stride(1), GROUP=heads // kv_heads, KV_HEADS=kv_heads,
                POSITION_ERROR=CODES["qkv_rope", "positions"], TILE=tile, BLOCK=block), num_warps=num_warps)
    return dqkv
