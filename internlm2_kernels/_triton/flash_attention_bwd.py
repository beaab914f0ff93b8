"""Flash attention backward. Contract: ops/flash_attention.py.

With the scores s, p = exp(s - lse) and delta = rowsum(dout * out) - dlse: ds = p * (dout v^T - delta), dq = scale * ds k,
dk = scale * ds^T q, dv = p^T dout. dlse is the upstream gradient of lse.

One kernel computes dk and dv: a program owns a tile of keys of one key head and loops over the query rows of all heads of the
group in order. Another kernel computes dq: a program owns a tile of query rows of one head and loops over the keys. Both
compute the scores again. This takes two more matrix products than one kernel with atomic additions, but it is deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention import _allowed, _cap, _edges, _sees_one_key, _tile, options, slots, strides
from .common import architecture, launch

LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """The tiling of one kernel.

    own     the keys whose gradients a program computes; in the kernel of dq, the query rows
    other   the query rows of one step of the program's loop; in the kernel of dq, the keys
    values  the columns of the gradients that a program computes: a head of more columns takes several programs
    """

    own: int
    other: int
    values: int
    num_warps: int
    num_stages: int


def dkdv_tiles(head_dim: int, element_size: int, arch: int) -> list[tuple[bool, bool, Tile]]:
    """(whether it computes dk, whether it computes dv, tile) of each launch.

    For heads of at most 64 columns one launch computes dk and dv. For larger heads the two accumulators and the scores do not
    fit in registers together. There one launch computes dk and another dv. Each computes the scores, so that a backward takes
    eight matrix products in place of seven. On Hopper the product of the scores is efficient from 64 rows on. On Ampere each
    warp holds its rows of k and v in registers, so the step is small.
    """
    width = triton.next_power_of_2(head_dim)
    if element_size == 4:
        tile = Tile(32, 16, width, 8, 1) if width <= 64 else Tile(16, 16, 128, 8, 2)
    elif arch == 90:
        if width > 64:
            stages, rows = (2, 64) if width == 128 else (1, 32)
            return [(True, False, Tile(128, 32, 128, 8, stages)), (False, True, Tile(128, rows, 128, 8, stages))]
        tile = Tile(128, 64, width, 8, 2)
    elif arch // 10 == 10:
        tile = Tile(128, 64 if width <= 128 else 32, width if width <= 128 else 64, 8, 1)
    elif width <= 64:
        tile = Tile(64, 32, width, 4, 2)
    elif width == 128 or arch == 80:
        tile = Tile(128, 16, 128, 8, 2 if width == 128 else 1)
    else:
        tile = Tile(64, 32, 128, 4, 1)
    return [(True, True, tile)] if width <= 64 else [(True, False, tile), (False, True, tile)]


def dq_tile(head_dim: int, element_size: int, arch: int) -> Tile:
    width = triton.next_power_of_2(head_dim)
    server = arch in (80, 90) or arch // 10 == 10  # data-center GPUs; others have only 99 KiB of shared memory
    if element_size == 4:
        return Tile(32, 16, min(width, 128), 8, 2 if server or width <= 128 else 1)
    if width == 256:
        return Tile(128, 16, 128, 8, 2) if arch == 80 else Tile(64, 32, 128, 4, 2 if server else 1)
    if width == 128:
        return Tile(128, 64 if server and arch != 80 else 32, 128, 8, 3 if arch == 90 else 2)
    return Tile(128, 64, width, 8, 2)


@triton.jit(do_not_specialize=["length"])
def flash_attention_bwd_delta_kernel(dout_ptr, out_ptr, lse_ptr, dlse_ptr, rows_ptr, length, heads,
                                     dout_batch, dout_row, dout_head, out_batch, out_row, out_head,
                                     HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores (lse, delta, lse, delta) for each row, [..., rows, 4]: lse in units of log2, delta = rowsum(dout * out) - dlse.

    A row without keys gets lse = inf, which makes p 0, and delta = 0. Both values are stored twice because a tile of them must
    not have fewer elements than the program has threads: Triton would then let every thread load all of them, and the
    addresses would need many registers.
    """
    tiles = (length + ROWS - 1) // ROWS
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.program_id(0) // heads % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = (tl.program_id(0) // heads // tiles).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    known = row < length
    mask = known[:, None] & (d < HEAD_DIM)
    dout = tl.load(dout_ptr + batch * dout_batch + head * dout_head + row[:, None] * dout_row + d, mask=mask, other=0.0)
    out = tl.load(out_ptr + batch * out_batch + head * out_head + row[:, None] * out_row + d, mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    place = (batch * heads + head) * length + row
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + place, mask=known, other=0.0)
    lse = tl.load(lse_ptr + place, mask=known, other=0.0)
    some = lse != float("-inf")
    lse = tl.where(some, lse * LOG2E, float("inf"))[:, None]
    delta = tl.where(some, delta, 0.0)[:, None]
    col = tl.arange(0, 4)[None, :]
    tl.store(rows_ptr + place[:, None] * 4 + col, tl.where(col % 2 == 0, lse, delta), mask=known[:, None])


@triton.jit
def _probabilities(score, lse, allowed, inner, outer, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr):
    """(p, capped): the probabilities, and tanh(inner * score) with a soft-cap or the score without one. lse is in units of
    log2, and infinite for a row without keys."""
    score = _cap(score, inner, SOFTCAP, FLOAT32)
    p = tl.exp2(tl.fma(score, outer, -lse))
    if allowed is not None:
        p = tl.where(allowed, p, 0.0)
    return p, score


@triton.jit
def _score_gradient(p, dp, delta, tanh, allowed, SOFTCAP: tl.constexpr):
    """The gradient with respect to scale * q.k, from the probabilities p, their gradients dp, delta = rowsum(dout * out) - dlse
    and, with a soft-cap, its tanh."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * tl.fma(-tanh, tanh, 1.0)
    if allowed is not None:  # p is 0 where a pair is not allowed, but dp may be NaN there, from v or the upstream gradient
        ds = tl.where(allowed, ds, 0.0)
    return ds


@triton.jit
def _load(ptr, first, col, stride, length, cols, MASKED: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
          WIDE: tl.constexpr):
    """Loads BLOCK rows, beginning with row `first`, of a tensor whose row 0 is at ptr. Rows past `length` (if MASKED) and
    columns past `cols` (unless FULL) are 0. WIDE: offsets within the tile need 64 bits."""
    row = tl.arange(0, BLOCK)
    offset = row[:, None] * stride
    if WIDE:
        offset = row.to(tl.int64)[:, None] * stride
    at = ptr + first.to(tl.int64) * stride + (offset + col[None, :])
    if MASKED and FULL:
        return tl.load(at, mask=(row < length - first)[:, None], other=0.0)
    elif MASKED:
        return tl.load(at, mask=(row < length - first)[:, None] & (col < cols)[None, :], other=0.0)
    elif FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=(col < cols)[None, :], other=0.0)


@triton.jit
def _dkdv_walk(dk, dv, k, v, q_ptr, dout_ptr, rows_ptr, q_row, dout_row, key, start, end, keys, queries, shift, left,
               right, inner, outer, column, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, OUT_ONLY: tl.constexpr,
               DK: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    """Adds the query rows from start to end of one head to dk and dv, for the output columns from `column` on.

    The scores are computed transposed, [keys, queries], because p and ds then have the layout of the left operands of the
    products with dout and q.
    """
    WHOLE: tl.constexpr = BLOCK_V == BLOCK_D
    d = tl.arange(0, BLOCK_D)
    part = column + tl.arange(0, BLOCK_V)
    for first_row in tl.range(start, end, BLOCK_M):
        begin = tl.multiple_of(first_row, BLOCK_M)
        row = begin + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, begin, d, q_row, queries, HEAD_DIM, True, HEAD_DIM == BLOCK_D, BLOCK_M, WIDE)
        score = tl.dot(k, tl.trans(q), input_precision="ieee")
        # Past the last row q, dout and delta are 0, so these rows add 0 to dk and dv.
        pairs = tl.load(rows_ptr + row[:, None] * 4 + tl.arange(0, 4)[None, :], mask=(row < queries)[:, None], other=0.0)
        lse, delta = tl.split(tl.reshape(pairs, (BLOCK_M, 2, 2)))
        lse, _ = tl.split(lse)
        delta, _ = tl.split(delta)
        allowed = None
        if MASKED:
            position = row + shift
            allowed = _allowed((row < queries)[None, :], position[None, :], key[:, None], left, right)
        p, tanh = _probabilities(score, lse[None, :], allowed, inner, outer, SOFTCAP, k.dtype == tl.float32)
        if DK or WHOLE:
            dout = _load(dout_ptr, begin, d, dout_row, queries, HEAD_DIM, True, HEAD_DIM == BLOCK_D, BLOCK_M, WIDE)
        if DV:
            if WHOLE:
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            else:  # dv needs only the columns of dout that this program computes
                values = _load(dout_ptr, begin, part, dout_row, queries, HEAD_DIM, True, HEAD_DIM % BLOCK_V == 0, BLOCK_M, WIDE)
                dv = tl.dot(p.to(values.dtype), values, dv, input_precision="ieee")
        if DK:
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = _score_gradient(p, dp, delta[None, :], tanh, allowed, SOFTCAP)
            # A query with one key has ds = 0 exactly. The product with 0 keeps a NaN of the upstream gradient.
            if MASKED and OUT_ONLY:
                ds = ds * tl.where(_sees_one_key(position, keys, left, right), 0.0, 1.0)[None, :]
            ds = ds.to(q.dtype)
            if WHOLE:
                dk = tl.dot(ds, q, dk, input_precision="ieee")
            else:
                values = _load(q_ptr, begin, part, q_row, queries, HEAD_DIM, True, HEAD_DIM % BLOCK_V == 0, BLOCK_M, WIDE)
                dk = tl.dot(ds, values, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["sequences", "length_q", "length_k", "tiles", "group", "window_left", "window_right"])
def flash_attention_bwd_dkdv_kernel(dout_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
                                    valid_ptr, sequences, length_q, length_k, tiles, group, window_left, window_right,
                                    scale, inner, outer, dout_batch, dout_row, dout_head, q_batch, q_row, q_head,
                                    k_batch, k_row, k_head, v_batch, v_row, v_head, dk_batch, dk_row, dk_head,
                                    lse_batch, lse_head, SOFTCAP: tl.constexpr, OUT_ONLY: tl.constexpr, DK: tl.constexpr,
                                    DV: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr,
                                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                                    BLOCK_V: tl.constexpr):
    column = tl.program_id(0) % PARTS * BLOCK_V
    slot = tl.program_id(0) // PARTS % tiles
    kv_head = (tl.program_id(0) // PARTS // tiles).to(tl.int64)
    if valid_ptr is not None:
        if tl.load(valid_ptr) == 0:
            return
    sequence, first_key, keys, begin = _tile(cu_k_ptr, slot, sequences, length_k, 1, BLOCK_N)
    if begin >= keys:
        return
    if cu_q_ptr is None:
        first = begin * 0
        queries = length_q
    else:
        first = tl.load(cu_q_ptr + sequence)
        queries = tl.load(cu_q_ptr + sequence + 1) - first
    if window_right is not None:  # skip leading fully masked rows; their q and dout are never read and may be NaN
        skipped = tl.maximum(queries - keys - window_right, 0)
        first += skipped
        queries -= skipped
    sequence = sequence.to(tl.int64)
    first = first.to(tl.int64)
    first_key = tl.cast(first_key, tl.int64)
    key = begin + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = _load(k_ptr + sequence * k_batch + kv_head * k_head + first_key * k_row, begin, d, k_row, keys, HEAD_DIM, True, False,
              BLOCK_N, WIDE)
    v = k
    if DK:
        v = _load(v_ptr + sequence * v_batch + kv_head * v_head + first_key * v_row, begin, d, v_row, keys, HEAD_DIM, True,
                  False, BLOCK_N, WIDE)
    shift = keys - queries
    a, b, _, end = _edges(begin - shift, tl.minimum(begin + BLOCK_N, keys) - 1 - shift, queries, window_right, window_left,
                          BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for member in tl.range(0, group, num_stages=1):
        head = kv_head * group + member
        q_rows = q_ptr + sequence * q_batch + head * q_head + first * q_row
        dout_rows = dout_ptr + sequence * dout_batch + head * dout_head + first * dout_row
        rows = rows_ptr + (sequence * lse_batch + head * lse_head + first) * 4
        if window_left is not None:  # one masked loop for all blocks: three loops, as below, would need more registers
            dk, dv = _dkdv_walk(dk, dv, k, v, q_rows, dout_rows, rows, q_row, dout_row, key, a, end, keys, queries, shift,
                                window_left, window_right, inner, outer, column, SOFTCAP, True, OUT_ONLY, DK, DV, WIDE,
                                HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_V)
        else:
            if window_right is not None:
                dk, dv = _dkdv_walk(dk, dv, k, v, q_rows, dout_rows, rows, q_row, dout_row, key, a, b, keys, queries, shift,
                                    window_left, window_right, inner, outer, column, SOFTCAP, True, OUT_ONLY, DK, DV, WIDE,
                                    HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_V)
            # Rows past the last one need no mask: they add 0.
            dk, dv = _dkdv_walk(dk, dv, k, v, q_rows, dout_rows, rows, q_row, dout_row, key, b, end, keys, queries, shift,
                                window_left, window_right, inner, outer, column, SOFTCAP, False, OUT_ONLY, DK, DV, WIDE,
                                HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_V)
    col = column + tl.arange(0, BLOCK_V)
    place = sequence * dk_batch + (first_key + key)[:, None] * dk_row + kv_head * dk_head + col[None, :]
    mask = (key < keys)[:, None] & (col < HEAD_DIM)[None, :]
    if DK:
        factor = scale
        if OUT_ONLY:
            factor = tl.where(keys == 1, 0.0, scale)  # with one key in the sequence the gradient of every score is 0
        tl.store(dk_ptr + place, (dk * factor).to(dk_ptr.dtype.element_ty), mask=mask)
    if DV:
        tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dq_walk(dq, q, dout, lse, delta, k_ptr, v_ptr, k_row, v_row, position, start, end, keys, left, right, inner, outer,
             column, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    """Adds the keys from start to end to dq, for the output columns from `column` on."""
    d = tl.arange(0, BLOCK_D)
    part = column + tl.arange(0, BLOCK_V)
    for first_key in tl.range(start, end, BLOCK_N):
        begin = tl.multiple_of(first_key, BLOCK_N)
        key = begin + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, begin, d, k_row, keys, HEAD_DIM, MASKED, HEAD_DIM == BLOCK_D, BLOCK_N, WIDE)
        v = _load(v_ptr, begin, d, v_row, keys, HEAD_DIM, MASKED, HEAD_DIM == BLOCK_D, BLOCK_N, WIDE)
        allowed = None
        if MASKED:
            allowed = _allowed((key < keys)[None, :], position[:, None], key[None, :], left, right)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        p, tanh = _probabilities(score, lse[:, None], allowed, inner, outer, SOFTCAP, q.dtype == tl.float32)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = _score_gradient(p, dp, delta[:, None], tanh, allowed, SOFTCAP)
        if BLOCK_V != BLOCK_D:
            k = _load(k_ptr, begin, part, k_row, keys, HEAD_DIM, MASKED, HEAD_DIM % BLOCK_V == 0, BLOCK_N, WIDE)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["sequences", "length_q", "length_k", "tiles", "group", "window_left", "window_right"])
def flash_attention_bwd_dq_kernel(dout_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, valid_ptr,
                                  sequences, length_q, length_k, tiles, group, window_left, window_right, scale, inner,
                                  outer, dout_batch, dout_row, dout_head, q_batch, q_row, q_head, k_batch, k_row, k_head,
                                  v_batch, v_row, v_head, dq_batch, dq_row, dq_head, lse_batch, lse_head,
                                  SOFTCAP: tl.constexpr, OUT_ONLY: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
                                  HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                  BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    column = tl.program_id(0) % PARTS * BLOCK_V
    member = tl.program_id(0) // PARTS % group
    slot = tiles - 1 - tl.program_id(0) // PARTS // group % tiles  # the tiles with the most keys first, for load balance
    kv_head = (tl.program_id(0) // PARTS // group // tiles).to(tl.int64)
    head = kv_head * group + member
    if valid_ptr is not None:
        if tl.load(valid_ptr) == 0:
            return
    sequence, first, queries, begin = _tile(cu_q_ptr, slot, sequences, length_q, 1, BLOCK_M)
    if begin >= queries:
        return
    if cu_k_ptr is None:
        first_key = begin * 0
        keys = length_k
    else:
        first_key = tl.load(cu_k_ptr + sequence)
        keys = tl.load(cu_k_ptr + sequence + 1) - first_key
    sequence = sequence.to(tl.int64)
    first = tl.cast(first, tl.int64)
    first_key = first_key.to(tl.int64)
    row = begin + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q = _load(q_ptr + sequence * q_batch + head * q_head + first * q_row, begin, d, q_row, queries, HEAD_DIM, True, False,
              BLOCK_M, WIDE)
    dout = _load(dout_ptr + sequence * dout_batch + head * dout_head + first * dout_row, begin, d, dout_row, queries, HEAD_DIM,
                 True, False, BLOCK_M, WIDE)
    statistic = sequence * lse_batch + head * lse_head + first + row
    lse = tl.load(rows_ptr + statistic * 4, mask=row < queries, other=float("inf"))
    delta = tl.load(rows_ptr + statistic * 4 + 1, mask=row < queries, other=0.0)
    k_rows = k_ptr + sequence * k_batch + kv_head * k_head + first_key * k_row
    v_rows = v_ptr + sequence * v_batch + kv_head * v_head + first_key * v_row
    shift = keys - queries
    position = row + shift
    a, b, c, end = _edges(begin + shift, tl.minimum(begin + BLOCK_M, queries) - 1 + shift, keys, window_left, window_right,
                          BLOCK_N)
    dq = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    edges = (a, b, c, end)
    for part_of_mask in tl.static_range(0 if window_left is not None else 1, 3):
        dq = _dq_walk(dq, q, dout, lse, delta, k_rows, v_rows, k_row, v_row, position, edges[part_of_mask],
                      edges[part_of_mask + 1], keys, window_left, window_right, inner, outer, column, SOFTCAP,
                      part_of_mask != 1, WIDE, HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_V)
    if window_right is not None:  # dq of a fully masked row is 0; masked keys that are NaN may have made it NaN
        dq = tl.where((position + window_right < 0)[:, None], 0.0, dq)
    col = column + tl.arange(0, BLOCK_V)
    place = sequence * dq_batch + (first + row)[:, None] * dq_row + head * dq_head + col[None, :]
    if OUT_ONLY:
        dq = dq * tl.where(_sees_one_key(position, keys, window_left, window_right), 0.0, 1.0)[:, None]
    tl.store(dq_ptr + place, (dq * scale).to(dq_ptr.dtype.element_ty),
             mask=(row < queries)[:, None] & (col < HEAD_DIM)[None, :])


def backward(dout, q, k, v, out, lse, dlse, cu_q, cu_k, valid, window_left, window_right, scale, softcap, dq, dk, dv):
    """Launches the kernels of the backward, which fill dq, dk and dv. `valid` is the result of `check_boundaries`, or None."""
    dense, (heads, head_dim), kv_heads = cu_q is None, q.shape[-2:], k.shape[-2]
    arch, size, width = architecture(q.device), q.element_size(), triton.next_power_of_2(head_dim)
    sequences = q.shape[0] if dense else cu_q.shape[0] - 1
    rows = torch.empty((*lse.shape, 4), dtype=torch.float32, device=lse.device)
    if q.numel():
        launch(flash_attention_bwd_delta_kernel, heads * triton.cdiv(q.shape[-3], 32) * (q.shape[0] if dense else 1), q.device,
               dict(dout_ptr=dout, out_ptr=out, lse_ptr=lse, dlse_ptr=dlse, rows_ptr=rows, length=q.shape[-3], heads=heads,
                    **strides(dout, "dout"), **strides(out, "out"), HEAD_DIM=head_dim, ROWS=32, BLOCK_D=width),
               num_warps=4)
    common = dict(dout_ptr=dout, q_ptr=q, k_ptr=k, v_ptr=v, rows_ptr=rows, cu_q_ptr=cu_q, cu_k_ptr=cu_k,
                  valid_ptr=valid, sequences=sequences, length_q=q.shape[-3], length_k=k.shape[-3], group=heads // kv_heads,
                  scale=scale, **options(scale, softcap, window_left, window_right)._asdict(), **strides(dout, "dout"),
                  **strides(q, "q"), **strides(k, "k"), **strides(v, "v"), lse_batch=lse.stride(0) if dense else 0,
                  lse_head=lse.stride(-2), SOFTCAP=softcap > 0, OUT_ONLY=dlse is None,
                  WIDE=max(x.stride(-3) for x in (dout, q, k, v)) >= 2**24, HEAD_DIM=head_dim, BLOCK_D=width)

    def run(kernel, tile, x, programs, names, **results):
        parts = triton.cdiv(head_dim, tile.values)
        tiles = sequences * triton.cdiv(x.shape[-3], tile.own) if dense else slots(x.shape[0], sequences, 1, tile.own)
        own, other = names
        launch(kernel, parts * programs * tiles, q.device,
               dict(common, **results, tiles=tiles, PARTS=parts, BLOCK_V=tile.values, **{own: tile.own, other: tile.other}),
               num_warps=tile.num_warps, num_stages=tile.num_stages)

    if k.numel():
        for sums_dk, sums_dv, tile in dkdv_tiles(head_dim, size, arch):
            run(flash_attention_bwd_dkdv_kernel, tile, k, kv_heads, ("BLOCK_N", "BLOCK_M"), dk_ptr=dk, dv_ptr=dv,
                **strides(dk, "dk"), DK=sums_dk, DV=sums_dv)
    if q.numel():
        run(flash_attention_bwd_dq_kernel, dq_tile(head_dim, size, arch), q, heads, ("BLOCK_M", "BLOCK_N"), dq_ptr=dq,
            **strides(dq, "dq"))
