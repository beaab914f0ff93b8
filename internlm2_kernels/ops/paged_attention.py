"""Attention of new tokens to a paged key/value cache: decode, chunked prefill, reuse of a prefix."""

import torch

from .._autocast import autocast
from .._checks import (
    check_boundaries,
    check_cu_seqlens,
    check_device,
    check_flag,
    check_float,
    check_longest,
    check_tensor,
    fail,
    last_stride_1,
)
from .._device_errors import Index
from .._native import native
from .._registry import Op
from ._attention import SHAPES, attend, check_bound, check_heads, check_options
from ._cache import check_cache


def _gather(cache, scale, blocks, length, dtype):
    """The keys or values [length, G, d] of one sequence, which lie in `blocks` of the cache, in `dtype`. int8 numbers are
    multiplied by their scale, or by 1 where the scale is 0."""
    from einops import rearrange

    in_order = lambda x: rearrange(x[blocks.long()], "b s g ... -> (b s) g ...")[:length].to(dtype)
    x = in_order(cache)
    if scale is None:
        return x
    s = in_order(scale)
    return x * torch.where(s == 0, 1, s)[..., None]


def _rows(seq_lens, cu_q):
    """(first row, number of rows) of every sequence in q."""
    bounds = list(range(seq_lens.shape[0] + 1)) if cu_q is None else cu_q.tolist()
    return [(a, b - a) for a, b in zip(bounds, bounds[1:], strict=False)]


def blocks_in_use(new, length, left, size):
    """(first, end) of the blocks of a sequence that hold a key which at least one of its new tokens may see: from `first` up
    to, but not including, `end`. `new` is the number of new tokens, `left` the window, `size` the tokens of a block."""
    if new == 0:
        return 0, 0
    return max(0, length - new - left) // size if left >= 0 else 0, -(-length // size)


def gathered(q, k_cache, v_cache, block_table, seq_lens, cu_q, k_scale, v_scale, dtype, left):
    """For every sequence (q [n, H, d], k [S, G, d], v [S, G, d]) in `dtype`, gathered from the cache. Blocks that lie wholly
    before the window of the first new token are left out."""
    size = k_cache.shape[1]
    for (first, count), length, table in zip(_rows(seq_lens, cu_q), seq_lens.tolist(), block_table, strict=True):
        begin, end = blocks_in_use(count, length, left, size)
        blocks, keys = table[begin:end], max(0, min(length, end * size) - begin * size)
        yield (q[first: first + count].to(dtype), _gather(k_cache, k_scale, blocks, keys, dtype),
               _gather(v_cache, v_scale, blocks, keys, dtype))


def reference(q, k_cache, v_cache, block_table, seq_lens, *, cu_seqlens_q=None, scale=None, window=None, softcap=0.0,
              k_scale=None, v_scale=None, return_lse=False, max_seqlen_q=None):
    scale, left, right, softcap = check_options("paged_attention", q.shape[-1], scale, window, softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    results = [attend(*one, left, 0, scale, softcap) for one in
               gathered(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, k_scale, v_scale, wide, left)]
    out = torch.cat([o for o, _ in results]).to(q.dtype) if results else q.clone()
    lse = torch.cat([x for _, x in results], 1) if results else q.new_empty((q.shape[1], 0), dtype=wide)
    return (out, lse) if return_lse else out


def _fake_fwd(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, max_seqlen_q, k_scale, v_scale, window_left, scale,
              softcap):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]),
                                             dtype=torch.promote_types(q.dtype, torch.float32))


PAGED_ATTENTION = Op(
    name="paged_attention",
    source="arXiv:2309.06180 section 4.1 (paging), arXiv:2205.14135 (attention)",
    summary="attention of new tokens to a paged key/value cache, float or int8",
    reference=reference,
    schemas={
        "fwd": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q,"
               " int max_seqlen_q, Tensor? k_scale, Tensor? v_scale, int window_left, float scale, float softcap)"
               " -> (Tensor out, Tensor lse)",
    },
    fakes={"fwd": _fake_fwd},
    outputs=("out", "lse"),
    directions=("forward",),
    autocast=True,
    isas=("avx2", "avx512", "avx512_bf16", "amx"),
    indices={
        "cu_seqlens_q": Index(1 << 5, "values that start at 0, never fall and end at the tokens of q",
                              "all results of the call are NaN"),
        "seq_lens": Index(1 << 6, "values from the new tokens of a sequence to max_blocks * block_size",
                          "the outputs of those sequences are NaN"),
        "block_table": Index(1 << 7, "values from 0 to the blocks of the cache minus 1 in the blocks in use",
                             "the outputs of those sequences are NaN"),
    },
)
_FWD = PAGED_ATTENTION.overloads["fwd"]


def _check_integers(argument, value, shape, meaning, q):
    check_tensor("paged_attention", argument, value, "an int32 tensor")
    if value.dtype != torch.int32:
        fail(TypeError, "paged_attention", argument, "torch.int32", value.dtype)
    if value.dim() != len(shape) or any(want is not None and got != want for got, want in zip(value.shape, shape, strict=True)):
        fail(ValueError, "paged_attention", argument, meaning, list(value.shape))
    check_device("paged_attention", argument, value, q, "q")
    return value.contiguous()


def _check_values(k_cache, block_table, seq_lens, rows, left):
    """Checks on the CPU that lengths fit the block table and the new tokens, and that the used block numbers exist."""
    if seq_lens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    size, blocks = k_cache.shape[1], k_cache.shape[0]
    for index, (length, (_, new)) in enumerate(zip(seq_lens.tolist(), rows, strict=True)):
        if new == 0:
            continue
        if not new <= length <= block_table.shape[1] * size:
            fail(ValueError, "paged_attention", "seq_lens", f"values from the new tokens of a sequence, {new} in sequence "
                 f"{index}, to max_blocks * block_size = {block_table.shape[1] * size}", length)
        used = block_table[index, slice(*blocks_in_use(new, length, left, size))]
        if (int(used.min()) < 0 or int(used.max()) >= blocks):
            fail(ValueError, "paged_attention", "block_table", f"values from 0 to {blocks - 1} in the blocks in use",
                 int(used.min()) if int(used.min()) < 0 else int(used.max()))


def paged_attention(q, k_cache, v_cache, block_table, seq_lens, *, cu_seqlens_q=None, scale=None, window=None, softcap=0.0,
                    k_scale=None, v_scale=None, return_lse=False, max_seqlen_q=None, backend=None):
    """Causal attention of the last tokens of each sequence to all its keys in a paged cache: decode and chunked prefill.

    Shapes:   q [T, H, d], the new tokens of all sequences end to end; cu_seqlens_q int32 [sequences + 1], their bounds (None:
              one token for each sequence); k_cache, v_cache [blocks, block_size, G, d], contiguous; block_table int32
              [sequences, max_blocks], the blocks of each sequence in order; seq_lens int32 [sequences], the number of keys
              including the new ones, which are in the cache already -> out [T, H, d], lse [H, T]. H, G and d as for
              `flash_attention`
    Mask:     new token i of n is at position seq_len - n + i and sees the keys up to it, with window=(left, right) from
              position - left on. NaN in masked keys: as for `flash_attention`
    Cache:    the dtype of q, or int8 with k_scale and v_scale float32 [blocks, block_size, G], as `qkv_rope` writes them. A
              scale of 0 counts as 1. What no new token can see is never read: entries of block_table after the last block or
              before the window, slots after the end, and sequences without new tokens may hold anything
    Options:  scale, softcap and return_lse as for `flash_attention`; max_seqlen_q helps to choose tiles
    Dtypes:   float32 | bfloat16 | float16 | float64, with float32 sums. Autocast casts q; a float cache must have its dtype
              already, because casting would copy it. With a float cache a token has the same bits as in a packed prefill by
              `flash_attention` on the same compiled backend, for any batch, number of threads and chunk size. With an int8
              cache, bfloat16 queries and a processor that multiplies bfloat16, up to 8 rows (new tokens x H / G) are
              multiplied as integers and more rows as bfloat16, so that the bits depend on the chunk size. The integers
              resolve 2^-16 of the largest |q_e| of a token and head
    Backward: none, for inference: an argument that requires a gradient is an error. Deterministic: yes
    Errors:   ValueError and TypeError. On CUDA a wrong length or block number makes the rows that use it NaN, and `check()`
              reports it
    Cost:     memory-bound: reads the used part of the cache once for each group of H / G heads.
              Source: arXiv:2309.06180 section 4.1
    """
    check_float("paged_attention", "q", q)
    (q,) = autocast(q)
    if q.dim() != 3:
        fail(ValueError, "paged_attention", "q", "shape [T, heads, head_dim]", list(q.shape))
    check_cache("paged_attention", {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}, q, "q")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_cache, v_cache, k_scale, v_scale)):
        fail(ValueError, "paged_attention", "q, k_cache, v_cache", "tensors that require no gradient (there is no backward)",
             "requires_grad=True")
    check_heads("paged_attention", q, k_cache, "k_cache")
    scale, left, _, softcap = check_options("paged_attention", q.shape[-1], scale, window, softcap)
    max_q = check_bound("paged_attention", "max_seqlen_q", max_seqlen_q)
    check_flag("paged_attention", "return_lse", return_lse)
    seq_lens = _check_integers("seq_lens", seq_lens, (None,), "shape [sequences]", q)
    sequences = seq_lens.shape[0]
    block_table = _check_integers("block_table", block_table, (sequences, None), f"shape [{sequences}, max_blocks]", q)
    if cu_seqlens_q is None:
        if q.shape[0] != sequences:
            fail(ValueError, "paged_attention", "cu_seqlens_q", "a tensor, unless q has one token a sequence "
                 f"({sequences})", f"None with {q.shape[0]} tokens")
        if sequences:
            check_longest("paged_attention", "max_seqlen_q", max_q, 1)
        max_q = 1
    else:
        cu_seqlens_q = check_cu_seqlens("paged_attention", "cu_seqlens_q", cu_seqlens_q, q, "q")
        if cu_seqlens_q.shape[0] != sequences + 1:
            fail(ValueError, "paged_attention", "cu_seqlens_q", f"shape [{sequences + 1}] (sequences + 1)",
                 list(cu_seqlens_q.shape))
    chosen = PAGED_ATTENTION.select(q, backend)
    if q.device.type == "meta":
        chosen = SHAPES
    elif chosen == "reference":
        if cu_seqlens_q is not None:
            check_boundaries("paged_attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0], longest=max_q)
        _check_values(k_cache, block_table, seq_lens, _rows(seq_lens, cu_seqlens_q), left)
        return reference(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q=cu_seqlens_q, scale=scale,
                         window=(left, 0), softcap=softcap, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)
    q = last_stride_1(q)
    out, lse = native(_FWD[chosen], q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, max_q, k_scale, v_scale, left,
                      scale, softcap)
    return (out, lse) if return_lse else out
