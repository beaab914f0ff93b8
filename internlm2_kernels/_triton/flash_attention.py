"""Flash attention forward, and the launchers of both directions. Contract: ops/flash_attention.py; arithmetic: attention.py.

One program computes one tile of query rows of one head. Only key blocks at the edges of the mask are masked. The heads of a
group run concurrently, so that they share keys in the L2 cache. The tiles with the most keys start first, for load balance.
"""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES
from .attention import (
    SPLIT,
    _attend,
    _edges,
    _empty,
    _finish,
    _merge,
    _scores,
    _tile,
    check_boundaries,
    options,
    slots,
    strides,
    tile_config,
)
from .common import architecture, check_dtype, launch
from .flash_attention_bwd import backward


@triton.jit
def _walk(state, q, k_ptr, v_ptr, k_row, v_row, v_cols, position, start, end, keys, left, right, inner, outer,
          SOFTCAP: tl.constexpr, MASKED: tl.constexpr, MULTI_SPLIT: tl.constexpr, SPLIT: tl.constexpr,
          HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    """Processes the keys from start to end, in blocks. Where a split begins (attention.py), the result of the split before it
    is merged into the total.

    This is one loop over blocks with a branch that is rarely taken: nested loops over splits and blocks would drain the
    pipeline of loads at the end of every split.
    """
    acc, z, m, total, total_z, total_m = state
    offset = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_V)[None, :]
    k_offset = offset.to(tl.int64)[:, None] * k_row + d
    v_offset = offset.to(tl.int64)[:, None] * v_row + dv
    k_ptr += tl.cast(start, tl.int64) * k_row
    v_ptr += tl.cast(start, tl.int64) * v_row
    k_step = tl.cast(k_row, tl.int64) * BLOCK_N
    v_step = tl.cast(v_row, tl.int64) * BLOCK_N
    for first_key in tl.range(start, end, BLOCK_N):
        block = tl.multiple_of(first_key, BLOCK_N)
        if MULTI_SPLIT:
            if block % SPLIT == 0:
                total, total_z, total_m = _merge(total, total_z, total_m, acc, z, m)
                acc, z, m = _empty(acc.shape[0], acc.shape[1])
        key = block + offset
        known = (key < keys)[:, None]
        k_block = k_ptr + k_offset
        v_block = v_ptr + v_offset
        k_ptr += k_step
        v_ptr += v_step
        if MASKED:
            k = tl.load(k_block, mask=known & (d < HEAD_DIM), other=0.0)
            v = tl.load(v_block, mask=known & (dv < v_cols), other=0.0)
        else:
            if HEAD_DIM == BLOCK_D:
                k = tl.load(k_block)
            else:
                k = tl.load(k_block, mask=d < HEAD_DIM, other=0.0)
            if HEAD_DIM % BLOCK_V == 0:
                v = tl.load(v_block)
            else:
                v = tl.load(v_block, mask=dv < v_cols, other=0.0)
        score = _scores(q, k, None, key, position, keys, left, right, inner, SOFTCAP, MASKED)
        acc, z, m = _attend(acc, z, m, score, v, outer)
    return acc, z, m, total, total_z, total_m


@triton.jit(do_not_specialize=["sequences", "length_q", "length_k", "tiles", "group", "window_left",
                               "window_right"])
def flash_attention_fwd_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, valid_ptr,
                               sequences, length_q, length_k, tiles, group, window_left, window_right,
                               inner, outer, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
                               out_batch, out_row, out_head, lse_batch, lse_head,
                               SOFTCAP: tl.constexpr, MULTI_SPLIT: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr,
                               HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                               BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    part = tl.program_id(0) % PARTS
    member = tl.program_id(0) // PARTS % group
    slot = tiles - 1 - tl.program_id(0) // PARTS // group % tiles
    kv_head = (tl.program_id(0) // PARTS // group // tiles).to(tl.int64)
    head = kv_head * group + member
    offset = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_V)[None, :]
    v_cols = HEAD_DIM - part * BLOCK_V
    out_ptr += head * out_head + part * BLOCK_V
    lse_ptr += head * lse_head
    if valid_ptr is not None:
        if tl.load(valid_ptr) == 0:
            return
    sequence, first, queries, begin = _tile(cu_q_ptr, slot, sequences, length_q, 1, BLOCK_M)
    if begin >= queries:
        return
    if cu_k_ptr is None:
        first_key = 0
        keys = length_k
    else:
        first_key = tl.load(cu_k_ptr + sequence)
        keys = tl.load(cu_k_ptr + sequence + 1) - first_key
    sequence = sequence.to(tl.int64)
    row = begin + offset
    q_rows = q_ptr + sequence * q_batch + head * q_head + (first + row).to(tl.int64)[:, None] * q_row
    q = tl.load(q_rows + d, mask=(row < queries)[:, None] & (d < HEAD_DIM), other=0.0)
    k_ptr += sequence * k_batch + kv_head * k_head + tl.cast(first_key, tl.int64) * k_row
    v_ptr += sequence * v_batch + kv_head * v_head + tl.cast(first_key, tl.int64) * v_row + part * BLOCK_V
    shift = keys - queries
    position = row + shift
    a, b, c, end = _edges(begin + shift, tl.minimum(begin + BLOCK_M, queries) - 1 + shift, keys, window_left,
                           window_right, BLOCK_N)
    edges = (a, b, c, end)
    acc, z, m = _empty(BLOCK_M, BLOCK_V)
    state = (acc, z, m, acc, z, m)
    for part_of_mask in tl.static_range(0 if window_left is not None else 1, 3):
        state = _walk(state, q, k_ptr, v_ptr, k_row, v_row, v_cols, position, edges[part_of_mask], edges[part_of_mask + 1],
                      keys, window_left, window_right, inner, outer, SOFTCAP, part_of_mask != 1, MULTI_SPLIT, SPLIT,
                      HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_V)
    acc, z, m, total, total_z, total_m = state
    if MULTI_SPLIT:
        acc, z, m = _merge(total, total_z, total_m, acc, z, m)
    out, lse = _finish(acc, z, m)
    row = row.to(tl.int64)
    out_ptr += sequence * out_batch + (first + row)[:, None] * out_row
    tl.store(out_ptr + dv, out.to(out_ptr.dtype.element_ty), mask=(row < queries)[:, None] & (dv < v_cols))
    if part == 0:
        tl.store(lse_ptr + sequence * lse_batch + first + row, lse, mask=row < queries)


def flash_attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left, window_right, scale,
                        softcap):
    check_dtype("flash_attention", "q", q)
    dense = cu_seqlens_q is None
    heads, head_dim = q.shape[-2:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], heads, q.shape[-3]), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    longest_q, longest_k = (q.shape[1], k.shape[1]) if dense else (max_seqlen_q, max_seqlen_k)
    longest_k = k.shape[0] if longest_k < 0 else longest_k
    tile = tile_config(head_dim, q.element_size(), architecture(q.device), 0 <= longest_q <= 64)
    if dense:
        sequences, valid, tiles = q.shape[0], None, q.shape[0] * triton.cdiv(q.shape[1], tile.rows)
    else:
        sequences = cu_seqlens_q.shape[0] - 1
        tiles = slots(q.shape[0], sequences, 1, tile.rows)
        valid = _check(q, k, cu_seqlens_q, cu_seqlens_k, out, lse)
    settings = options(scale, softcap, window_left, window_right)
    kv_heads, parts = k.shape[-2], triton.cdiv(head_dim, tile.values)
    launch(flash_attention_fwd_kernel, parts * heads * tiles, q.device,
           dict(q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse, cu_q_ptr=cu_seqlens_q, cu_k_ptr=cu_seqlens_k,
                valid_ptr=valid, sequences=sequences, length_q=q.shape[-3], length_k=k.shape[-3],
                tiles=tiles, group=heads // kv_heads, **settings._asdict(), **strides(q, "q"), **strides(k, "k"),
                **strides(v, "v"), **strides(out, "out"), lse_batch=lse.stride(0) if dense else 0, lse_head=lse.stride(-2),
                SOFTCAP=softcap > 0, MULTI_SPLIT=longest_k > SPLIT, SPLIT=SPLIT, PARTS=parts, HEAD_DIM=head_dim,
                BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_D=triton.next_power_of_2(head_dim),
                BLOCK_V=tile.values), num_warps=tile.num_warps, num_stages=tile.num_stages)
    return out, lse


def flash_attention_bwd(dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left,
                        window_right, scale, softcap):
    check_dtype("flash_attention", "q", q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    valid = None
    if cu_seqlens_q is not None and q.numel() + k.numel():
        valid = _check(q, k, cu_seqlens_q, cu_seqlens_k, dq, dk, dv)
    backward(dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, valid, window_left, window_right, scale, softcap,
             dq, dk, dv)
    return dq, dk, dv


def _check(q, k, cu_q, cu_k, *results):
    return check_boundaries(cu_q, cu_k, q.shape[0], k.shape[0], CODES["flash_attention", "cu_seqlens_q"],
                            CODES["flash_attention", "cu_seqlens_k"], *results)
