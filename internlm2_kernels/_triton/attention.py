"""What flash_attention and paged_attention share: the arithmetic of one block of keys, splits, and the assignment of tiles.

A token decoded against a cache has the same bits as the same token in a prefill, because both compute the same operations in
the same order:
- Keys are grouped into blocks of `Tile.keys` and splits of SPLIT keys, both counted from key 0 of the sequence. The blocks of
  a split go through an online softmax, and the results of the splits are merged in order. A block or split in which a row
  has no key does not change the row's bits, so it may be skipped or computed.
- Every row of a tile uses the same instructions. In 16-bit dtypes a tile has 64 rows and 4 warps, or 128 rows and 8 warps, so
  that every warp owns whole rows; with fewer rows Triton would distribute a row over warps and sum it in another order. On
  sm_90 every product is a wgmma of 64 rows, because mma.sync accumulates in another order. Tiles of decoded tokens are padded
  to these sizes, which costs little: decoding is bound by reading the keys. In float32 and on Blackwell there is one tile for
  all numbers of rows.
- The compiler does not contract multiplications and additions (`common.launch`); fused operations are written as tl.fma.

Scores are in units of log2, so that the exponential is exp2. Products of float32 inputs use input_precision "ieee", which runs
on the arithmetic units. tf32x3 would be less accurate than PyTorch's float32 attention: it drops the product of the low
parts, and the tensor cores truncate their sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._device_errors import error_word
from .common import launch
from .functions import _fast_tanh, _tanh

# Keys per split. Shorter splits are merged more often; longer ones give a decode of one sequence too few programs to fill a
# GPU: with 1024, a sequence of 8192 keys and 8 key heads has only 64 programs.
SPLIT = 512
LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
LARGEST_WINDOW = 2**30  # a wider window is treated as none; sequences are shorter, so it masks nothing
CHECK_PROGRAMS = 64  # the largest number of programs that fill the results with NaN after an error


class Options(NamedTuple):
    """What the kernels need of scale, soft-cap and window. A score in units of log2 is outer * q.k, or with a soft-cap
    outer * tanh(inner * q.k). A side of the window that is None has no limit."""

    inner: float
    outer: float
    window_left: int | None
    window_right: int | None


SMALLEST = 1.1754943508222875e-38  # the smallest normal float32; a factor of 0 would make all scores equal


def options(scale: float, softcap: float, left: int, right: int) -> Options:
    """The `Options` of a call. A side of the window that is wider than any sequence becomes None, and factors are limited so
    that they are normal float32 numbers."""
    # `_fast_tanh` multiplies inner by 3; if the factor became infinite, a score of 0 would become NaN
    inner, outer = (min(scale / softcap, 1e38), softcap * LOG2E) if softcap > 0 else (0.0, max(scale * LOG2E, SMALLEST))
    return Options(inner, outer, *(None if w < 0 or w > LARGEST_WINDOW else w for w in (left, right)))


class Tile(NamedTuple):
    """The tiling of attention. rows: query rows of a program; keys: keys of a block; values: output columns of a program."""

    rows: int
    keys: int
    values: int
    num_warps: int
    num_stages: int


def tile_config(head_dim: int, element_size: int, arch: int, few_rows: bool) -> Tile:
    """The tile for an architecture (80, 90, ...). Only the rows and the warps may depend on `few_rows`, or bits would change.

    The accumulators of the current split and of all splits before it are both in registers, which limits `values` and `keys`.
    A program computes at most 128 output columns, and 64 on Blackwell, where results are copied between tensor memory and
    registers. For larger heads several programs compute the same scores.
    """
    width = triton.next_power_of_2(head_dim)
    if element_size == 4:
        return Tile(32, 16, min(width, 128), 8, 2)
    if arch // 10 == 10:
        return Tile(128, 64 if width <= 64 else 32, min(width, 64), 8, 3)
    # 64 rows only with wgmma (sm_90) or for heads of at most 64 columns: where a product has fewer rows than columns, mma.sync
    # would distribute a row over several warps.
    rows, num_warps = (64, 4) if few_rows and (arch == 90 or width <= 64) else (128, 8)
    if arch == 90:
        return Tile(rows, {32: 128, 64: 128, 128: 64, 256: 32}[width], min(width, 128), num_warps, 3)
    # GPUs for workstations have 99 KiB of shared memory, which holds only two pipeline stages where d is above 128.
    return Tile(rows, 64 if width <= 64 else 32, min(width, 128), num_warps, 3 if arch == 80 or width <= 128 else 2)


def strides(x: torch.Tensor, name: str) -> dict[str, int]:
    """The strides of the tensor `name` as kernel arguments: of dense [B, S, heads, d], or of packed [T, heads, d], whose batch
    stride is 0."""
    batch, row, head = x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])
    return {f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}


def slots(tokens: int, sequences: int, rows_per_token: int, block: int) -> int:
    """An upper limit of the number of tiles (slots) of packed sequences, which needs no sequence lengths: `_tile` begins the
    tiles of sequence i at slot cu[i] * rows_per_token // block + i, and slots between sequences may stay empty."""
    return tokens * rows_per_token // block + max(sequences, 1)


@triton.jit(do_not_specialize=["sequences", "tokens_q", "tokens_k", "a_size", "b_size", "c_size"])
def attention_check_kernel(cu_q_ptr, cu_k_ptr, valid_ptr, error_ptr, a_ptr, b_ptr, c_ptr, sequences, tokens_q, tokens_k,
                           a_size, b_size, c_size, ERROR_Q: tl.constexpr, ERROR_K: tl.constexpr, BLOCK: tl.constexpr):
    """Stores 1 in `valid` if cu_q rises from 0 to tokens_q (equal neighbours are allowed), and cu_k, if given, from 0 to
    tokens_k.

    Otherwise stores 0 in `valid`, sets the bit of the error in the device's error word (_device_errors.py) and fills the
    results a, b, c with NaN. The kernels that follow return at once if `valid` is 0.
    """
    bad_q = tl.zeros((BLOCK,), tl.int32)
    bad_k = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, sequences + 1, BLOCK):
        index = start + tl.arange(0, BLOCK)
        bad_q |= _out_of_order(cu_q_ptr, index, sequences, tokens_q)
        if cu_k_ptr is not None:
            bad_k |= _out_of_order(cu_k_ptr, index, sequences, tokens_k)
    wrong_q = tl.max(bad_q, axis=0)
    wrong_k = tl.max(bad_k, axis=0)
    wrong = tl.maximum(wrong_q, wrong_k)
    if tl.program_id(0) == 0:
        tl.store(valid_ptr, 1 - wrong)
        tl.atomic_or(error_ptr, ERROR_Q, mask=wrong_q != 0)
        tl.atomic_or(error_ptr, ERROR_K, mask=wrong_k != 0)
    if wrong != 0:
        _fill(a_ptr, a_size, BLOCK)
        if b_ptr is not None:
            _fill(b_ptr, b_size, BLOCK)
        if c_ptr is not None:
            _fill(c_ptr, c_size, BLOCK)


@triton.jit
def _fill(ptr, size, BLOCK: tl.constexpr):
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        index = start + tl.arange(0, BLOCK)
        tl.store(ptr + index, tl.full((BLOCK,), float("nan"), ptr.dtype.element_ty), mask=index < size)


@triton.jit
def _out_of_order(cu_ptr, index, sequences, tokens):
    value = tl.load(cu_ptr + index, mask=index <= sequences, other=0)
    following = tl.load(cu_ptr + index + 1, mask=index < sequences, other=0)
    bad = (index < sequences) & (following < value)
    bad |= (index == 0) & (value != 0)
    bad |= (index == sequences) & (value != tokens)
    return bad.to(tl.int32)


def check_boundaries(cu_q, cu_k, tokens_q: int, tokens_k: int, error_q: int, error_k: int, *results) -> torch.Tensor:
    """Launches `attention_check_kernel`. Returns int32 [1] on the device, 1 if the boundaries are valid; otherwise the results,
    up to three contiguous tensors, are filled with NaN."""
    valid = torch.empty(1, dtype=torch.int32, device=cu_q.device)
    a, b, c = (*results, None, None)[:3]
    programs = min(CHECK_PROGRAMS, max(1, triton.cdiv(max(x.numel() for x in results), 4096)))
    launch(attention_check_kernel, programs, cu_q.device,
           dict(cu_q_ptr=cu_q, cu_k_ptr=cu_k, valid_ptr=valid, error_ptr=error_word(cu_q.device), a_ptr=a, b_ptr=b, c_ptr=c,
                sequences=cu_q.shape[0] - 1, tokens_q=tokens_q, tokens_k=tokens_k, a_size=a.numel(),
                b_size=0 if b is None else b.numel(), c_size=0 if c is None else c.numel(),
                ERROR_Q=error_q, ERROR_K=error_k, BLOCK=1024), num_warps=4)
    return valid


@triton.jit
def _tile(cu_ptr, slot, sequences, length, rows_per_token, BLOCK: tl.constexpr):
    """The tile of a slot: (sequence, first token of the sequence, number of its tokens, first row of the tile, counted from the
    beginning of the sequence). Rows past the end of the sequence are unused.

    The tiles of packed sequence i begin at slot cu[i] * rows_per_token // BLOCK + i. The term i leaves room for the last,
    partial tile of every sequence before it.
    The sequence of a slot is found by bisection.
    """
    if cu_ptr is None:
        tiles = (length * rows_per_token + BLOCK - 1) // BLOCK
        return slot // tiles, 0, length, slot % tiles * BLOCK
    else:
        low = slot * 0
        high = low + sequences
        while low + 1 < high:
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle).to(tl.int64) * rows_per_token // BLOCK + middle <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        first = tl.load(cu_ptr + low)
        own = slot - (first.to(tl.int64) * rows_per_token // BLOCK + low).to(tl.int32)
        return low, first, tl.load(cu_ptr + low + 1) - first, own * BLOCK


@triton.jit
def _edges(first, last, length, before, after, BLOCK: tl.constexpr):
    """(a, b, c, d), multiples of BLOCK, for a tile of positions first to last on one axis of the scores (queries or keys): the
    tile needs the blocks [a, d) of the other axis, of which [b, c) need no mask. The window pairs a position p of the tile with
    the positions p - before to p + after of the other axis; None is no limit."""
    low = first * 0
    full_low = low
    high = length
    full_high = length
    if before is not None:
        low = tl.maximum(first - before, 0)
        full_low = tl.maximum(last - before, 0)
    if after is not None:
        high = tl.minimum(length, last + after + 1)
        full_high = tl.minimum(length, first + after + 1)
    a = low // BLOCK * BLOCK
    d = tl.maximum((tl.maximum(high, 0) + BLOCK - 1) // BLOCK * BLOCK, a)
    b = tl.minimum((full_low + BLOCK - 1) // BLOCK * BLOCK, d)
    c = tl.maximum(tl.maximum(full_high, 0) // BLOCK * BLOCK, b)
    return a, b, tl.minimum(c, d), d


@triton.jit
def _cap(score, inner, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr):
    """tanh(inner * score) with a soft-cap, score without one. The result is still to be multiplied by Options.outer."""
    if SOFTCAP:
        # With 16-bit inputs the probabilities are rounded to 2^-9 or 2^-12, so an accurate tanh would not improve the result.
        return _tanh(score * inner) if FLOAT32 else _fast_tanh(score, inner)
    else:
        return score


@triton.jit
def _allowed(inside, position, key, left, right):
    """Mask of the pairs of a query position and a key that the window allows. One of `position` and `key` is a column and the
    other a row, so that they broadcast. `inside` excludes keys or queries past the end of the sequence."""
    if left is not None:
        inside = inside & (key >= position - left)
    if right is not None:
        inside = inside & (key <= position + right)
    return inside


@triton.jit
def _sees_one_key(position, keys, left, right):
    """Whether the mask leaves exactly one key to the query at `position`. The softmax of one score is 1 for any score, so the
    gradient of that score is 0."""
    first = position * 0
    last = first + keys - 1
    if left is not None:
        first = tl.maximum(first, position - left)
    if right is not None:
        last = tl.minimum(last, position + right)
    return first == last


@triton.jit
def _scores(q, k, k_scale, key, position, keys, left, right, inner, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """The scores of a block of keys, still to be multiplied by Options.outer; -inf where the mask forbids the key."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if k_scale is not None:
        score = score * k_scale[None, :]
    score = _cap(score, inner, SOFTCAP, q.dtype == tl.float32)
    if MASKED:
        allowed = _allowed((key < keys)[None, :], position[:, None], key[None, :], left, right)
        score = tl.where(allowed, score, float("-inf"))
    return score


@triton.jit
def _attend(acc, z, m, score, v, outer, v_scale=None):
    """Adds a block of keys to the state of a split: acc = sum of p v, z = sum of p, m = the maximum of score * outer, where
    p = exp2(score * outer - m). The argument of exp2 is one fused multiply-add per score."""
    m_new = tl.maximum(m, tl.max(score, axis=1) * outer)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(score, outer, -m_safe[:, None]))
    decay = tl.exp2(m - m_safe)
    z = tl.fma(z, decay, tl.sum(p, axis=1))
    if v_scale is not None:
        p = p * v_scale[None, :]
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, z, m_new


@triton.jit
def _empty(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The state (acc, z, m) of rows before their first key: see `_attend`."""
    return (tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS,), tl.float32),
            tl.full((ROWS,), float("-inf"), tl.float32))


@triton.jit
def _merge(total, total_z, total_m, acc, z, m):
    """Merges the state (acc, z, m) of a split into the total. Merging an empty state (0, 0, -inf) changes no bit."""
    m_new = tl.maximum(total_m, m)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    a = tl.exp2(total_m - m_safe)
    b = tl.exp2(m - m_safe)
    total = tl.fma(acc, tl.expand_dims(b, -1), total * tl.expand_dims(a, -1))
    return total, tl.fma(z, b, total_z * a), m_new


@triton.jit
def _finish(acc, z, m):
    """(out, natural log-sum-exp). A row without keys, whose maximum is -inf, gives (0, -inf); a row with a NaN gives NaN."""
    empty = (z == 0.0) & (m == float("-inf"))
    some = tl.where(empty, 1.0, z)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(some)) * _LN2)
    return tl.where(tl.expand_dims(empty, -1), 0.0, acc * tl.expand_dims(tl.div_rn(1.0, some), -1)), lse
