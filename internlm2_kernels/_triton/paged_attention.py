"""Attention to a paged cache. Contract: ops/paged_attention.py; arithmetic: attention.py.

One program computes a tile of rows of one key head. The rows are the new tokens of a sequence times the query heads of the
group, so that they share every key that is read. If there are too few tiles to fill a GPU, the splits of the keys are
distributed over several programs; each stores its results in memory, and a second kernel merges them in order. Otherwise one
program processes all splits and merges them itself, as the forward of flash_attention does. The bits are the same for any
distribution of the splits. The number of splits follows from the width of the block table, so the host does not wait for the
sequence lengths.
"""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
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
    tile_config,
)
from .common import architecture, check_dtype, launch

# With this many programs (eight for each multiprocessor of an H100), the splits of a row are not distributed over programs.
ENOUGH_PROGRAMS = 1024
# The most programs over which splits are distributed: with a wide table and short sequences most of them have no work.
MOST_PROGRAMS = 4096
LARGEST_WORKSPACE_BYTES = 2**28
UNROLL = 16  # the merge kernel loads the results of this many splits at once and then merges them in order


@triton.jit
def _load_scale(ptr, place, inside):
    scale = tl.load(ptr + place, mask=inside, other=1.0)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def _paged_walk(state, bad, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, kv_heads, blocks, v_cols, position,
                seen, start, end, keys, left, inner, outer, SOFTCAP: tl.constexpr, MULTI_SPLIT: tl.constexpr,
                SPLIT: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    """Processes the keys from start to end, in blocks. The mask is computed for all of them, which costs no time, because
    decoding is bound by memory. `bad` becomes nonzero at keys whose entry of the block table is not a block of the cache,
    except at keys before `seen`, the first key that any row may see."""
    acc, z, m, total, total_z, total_m = state
    offset = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    for first_key in tl.range(start, end, BLOCK_N):
        block = tl.multiple_of(first_key, BLOCK_N)
        if MULTI_SPLIT:
            if block % SPLIT == 0:
                total, total_z, total_m = _merge(total, total_z, total_m, acc, z, m)
                acc, z, m = _empty(acc.shape[0], acc.shape[1])
        key = block + offset
        known = key < keys
        if left is not None:
            known = known & (key >= seen)
        entry = tl.load(table_ptr + key // BLOCK_SIZE, mask=known, other=0)
        inside = known & (entry >= 0) & (entry < blocks)
        bad |= (known & (inside == 0)).to(tl.int32)
        place = (entry.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * kv_heads + kv_head
        # Keys and values past the end of a sequence are loaded as 0, because the cache may contain NaN there.
        k = tl.load(k_ptr + place[:, None] * HEAD_DIM + d[None, :], mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_ptr + place[:, None] * HEAD_DIM + dv[None, :], mask=inside[:, None] & (dv < v_cols)[None, :], other=0.0)
        k_scale = None
        v_scale = None
        if k_scale_ptr is not None:
            k = k.to(tl.float32).to(q.dtype)
            v = v.to(tl.float32).to(q.dtype)
            k_scale = _load_scale(k_scale_ptr, place, inside)
            v_scale = _load_scale(v_scale_ptr, place, inside)
        score = _scores(q, k, k_scale, key, position, keys, left, 0, inner, SOFTCAP, True)
        acc, z, m = _attend(acc, z, m, score, v, outer, v_scale)
    return acc, z, m, total, total_z, total_m, bad


@triton.jit(do_not_specialize=["sequences", "tiles", "tokens", "split_programs", "splits", "blocks", "max_blocks", "kv_heads",
                               "group", "window_left"])
def paged_attention_fwd_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, lengths_ptr, cu_q_ptr, valid_ptr,
                               out_ptr, lse_ptr, partial_ptr, statistics_ptr, counts_ptr, error_ptr,
                               sequences, tiles, tokens, split_programs, splits, blocks, max_blocks, kv_heads, group,
                               window_left, inner, outer, q_row, q_head,
                               SOFTCAP: tl.constexpr, MULTI_SPLIT: tl.constexpr, SPLIT: tl.constexpr,
                               LENGTH_ERROR: tl.constexpr, TABLE_ERROR: tl.constexpr, PARTS: tl.constexpr,
                               BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
                               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    part = tl.program_id(0) % PARTS
    first_split = tl.program_id(0) // PARTS % split_programs
    kv_head = tl.program_id(0) // PARTS // split_programs % kv_heads
    slot = tl.program_id(0) // PARTS // split_programs // kv_heads
    if valid_ptr is not None:
        if tl.load(valid_ptr) == 0:
            return
    sequence, first, new, begin = _tile(cu_q_ptr, slot, sequences, 1, group, BLOCK_M)
    if cu_q_ptr is None:
        first = sequence
    if begin >= new * group:
        return
    keys = tl.load(lengths_ptr + sequence)
    fits = (keys >= new) & (keys <= max_blocks.to(tl.int64) * BLOCK_SIZE)
    tl.atomic_or(error_ptr, LENGTH_ERROR, mask=fits == 0)
    keys = tl.where(fits, keys, 0)
    row = begin + tl.arange(0, BLOCK_M)
    here = row < new * group
    token = row // group
    position = keys - new + token
    head = (kv_head * group + row % group).to(tl.int64)
    place = first.to(tl.int64) + token
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_V)[None, :]
    v_cols = HEAD_DIM - part * BLOCK_V
    q = tl.load(q_ptr + (place * q_row + head * q_head)[:, None] + d, mask=here[:, None] & (d < HEAD_DIM), other=0.0)
    v_ptr += part * BLOCK_V
    table_ptr += sequence.to(tl.int64) * max_blocks
    last = tl.minimum(begin + BLOCK_M, new * group) - 1
    start, _, _, end = _edges(keys - new + begin // group, keys - new + last // group, keys, window_left, 0, BLOCK_N)
    seen = start
    if window_left is not None:
        seen = tl.maximum(keys - new + begin // group - window_left, 0)
    acc, z, m = _empty(BLOCK_M, BLOCK_V)
    state = (acc, z, m, acc, z, m)
    bad = tl.zeros((BLOCK_N,), tl.int32)
    count = tl.where(fits, (keys + SPLIT - 1) // SPLIT, -1)
    out_row = place * (kv_heads * group) + head
    mask = here[:, None] & (dv < v_cols)
    if partial_ptr is None:
        acc, z, m, total, total_z, total_m, bad = _paged_walk(
            state, bad, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, kv_heads, blocks, v_cols, position,
            seen, start, end, keys, window_left, inner, outer, SOFTCAP, MULTI_SPLIT, SPLIT, BLOCK_SIZE, HEAD_DIM, BLOCK_N,
            BLOCK_D, BLOCK_V)
        if MULTI_SPLIT:
            acc, z, m = _merge(total, total_z, total_m, acc, z, m)
        wrong = tl.max(bad, axis=0) != 0
        tl.atomic_or(error_ptr, TABLE_ERROR, mask=wrong)
        z = tl.where(wrong | (fits == 0), float("nan"), z)
        out, lse = _finish(acc, z, m)
        tl.store(out_ptr + out_row[:, None] * HEAD_DIM + part * BLOCK_V + dv, out.to(out_ptr.dtype.element_ty), mask=mask)
        if part == 0:
            tl.store(lse_ptr + head * tokens + place, lse, mask=here)
    else:
        if (part == 0) & (first_split == 0):
            tl.store(counts_ptr + place, tl.zeros((BLOCK_M,), tl.int32) + count, mask=here)
        for split in tl.range(first_split, count, split_programs, num_stages=1):
            acc, z, m, total, total_z, total_m, bad = _paged_walk(
                state, bad, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, kv_heads, blocks, v_cols,
                position, seen, tl.maximum(start, split * SPLIT), tl.minimum(end, split * SPLIT + SPLIT), keys, window_left,
                inner, outer, SOFTCAP, False, SPLIT, BLOCK_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_V)
            wrong = tl.max(bad, axis=0) != 0
            tl.atomic_or(error_ptr, TABLE_ERROR, mask=wrong)
            z = tl.where(wrong, float("nan"), z)
            cell = out_row * splits + split
            tl.store(partial_ptr + cell[:, None] * HEAD_DIM + part * BLOCK_V + dv, acc, mask=mask)
            if part == 0:
                tl.store(statistics_ptr + cell * 2, z, mask=here)
                tl.store(statistics_ptr + cell * 2 + 1, m, mask=here)


@triton.jit(do_not_specialize=["tokens", "splits"])
def paged_attention_fwd_merge_kernel(partial_ptr, statistics_ptr, counts_ptr, valid_ptr, out_ptr, lse_ptr, tokens, heads,
                                     splits, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr):
    """Merges the results of the splits of one token and head in order. `counts` holds the number of splits of each token, or a
    number below 0 if the length of its sequence is invalid."""
    if valid_ptr is not None:
        if tl.load(valid_ptr) == 0:
            return
    token = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    one = tl.arange(0, 1)
    d = tl.arange(0, BLOCK_D)[None, :]
    count = tl.load(counts_ptr + token)
    first = (token * heads + head) * splits
    total = tl.zeros((1, BLOCK_D), tl.float32)
    total_z = tl.zeros((1,), tl.float32)
    total_m = tl.full((1,), float("-inf"), tl.float32)
    for start in range(0, count, UNROLL):
        for index in tl.static_range(UNROLL):
            cell = first + start + index + one
            there = start + index + one < count
            z = tl.load(statistics_ptr + cell * 2, mask=there, other=0.0)
            m = tl.load(statistics_ptr + cell * 2 + 1, mask=there, other=float("-inf"))
            acc = tl.load(partial_ptr + cell[:, None] * HEAD_DIM + d, mask=there[:, None] & (d < HEAD_DIM), other=0.0)
            total, total_z, total_m = _merge(total, total_z, total_m, acc, z, m)
    total_z = tl.where(count < 0, float("nan"), total_z)
    out, lse = _finish(total, total_z, total_m)
    row = token * heads + head
    tl.store(out_ptr + row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + head * tokens + token + one, lse)


def paged_attention_fwd(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, max_seqlen_q, k_scale, v_scale, window_left,
                        scale, softcap):
    check_dtype("paged_attention", "q", q)
    (tokens, heads, head_dim), (blocks, block_size, kv_heads, _) = q.shape, k_cache.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group, sequences, max_blocks = heads // kv_heads, seq_lens.shape[0], block_table.shape[1]
    tile = tile_config(head_dim, q.element_size(), architecture(q.device), 0 <= max_seqlen_q * group <= 64)
    parts, splits = triton.cdiv(head_dim, tile.values), max(1, triton.cdiv(max_blocks * block_size, SPLIT))
    if cu_seqlens_q is None:
        valid, tiles = None, sequences * triton.cdiv(group, tile.rows)
    else:
        tiles = slots(tokens, sequences, group, tile.rows)
        valid = check_boundaries(cu_seqlens_q, None, tokens, 0, CODES["paged_attention", "cu_seqlens_q"], 0, out, lse)
    # int8 keys are converted to float32 in registers; two pipeline stages of them would spill.
    stages = 1 if k_scale is not None and q.element_size() == 4 else tile.num_stages
    programs = tiles * kv_heads * parts
    split_programs, partial, statistics, counts = 1, None, None, None
    if splits > 1 and programs < ENOUGH_PROGRAMS and tokens * heads * splits * head_dim * 4 <= LARGEST_WORKSPACE_BYTES:
        split_programs = min(splits, max(1, MOST_PROGRAMS // programs))
        partial = torch.empty((tokens, heads, splits, head_dim), dtype=torch.float32, device=q.device)
        statistics = torch.empty((tokens, heads, splits, 2), dtype=torch.float32, device=q.device)
        counts = torch.empty(tokens, dtype=torch.int32, device=q.device)
    settings = options(scale, softcap, window_left, 0)
    launch(paged_attention_fwd_kernel, programs * split_programs, q.device,
           dict(q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, k_scale_ptr=k_scale, v_scale_ptr=v_scale, table_ptr=block_table,
                lengths_ptr=seq_lens, cu_q_ptr=cu_seqlens_q, valid_ptr=valid, out_ptr=out, lse_ptr=lse, partial_ptr=partial,
                statistics_ptr=statistics, counts_ptr=counts, error_ptr=error_word(q.device), sequences=sequences,
                tiles=tiles, tokens=tokens, split_programs=split_programs, splits=splits, blocks=blocks,
                max_blocks=max_blocks, kv_heads=kv_heads, group=group, window_left=settings.window_left,
                inner=settings.inner, outer=settings.outer, q_row=q.stride(0), q_head=q.stride(1), SOFTCAP=softcap > 0,
                MULTI_SPLIT=splits > 1 and partial is None, SPLIT=SPLIT, LENGTH_ERROR=CODES["paged_attention", "seq_lens"],
                TABLE_ERROR=CODES["paged_attention", "block_table"], PARTS=parts, BLOCK_SIZE=block_size,
                HEAD_DIM=head_dim, BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_D=triton.next_power_of_2(head_dim),
                BLOCK_V=tile.values), num_warps=tile.num_warps, num_stages=stages)
    if partial is not None:
        launch(paged_attention_fwd_merge_kernel, tokens * heads, q.device,
               dict(partial_ptr=partial, statistics_ptr=statistics, counts_ptr=counts, valid_ptr=valid, out_ptr=out,
                    lse_ptr=lse, tokens=tokens, heads=heads, splits=splits, HEAD_DIM=head_dim,
                    BLOCK_D=triton.next_power_of_2(head_dim), UNROLL=UNROLL), num_warps=1)
    return out, lse
