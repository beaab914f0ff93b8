"""What is special to paged_attention: the bits of a prefill, memory that must not be read, int8 caches."""

import math

import pytest
import torch
from cells import variants
from shared import OPS, assert_bitwise, instruction_set

from internlm2_kernels import KVCache, flash_attention, paged_attention, qkv_rope, rope_table
from internlm2_kernels._registry import _C

OP = OPS["paged_attention"]
VARIANTS = [v for v in variants("cpu", OP) if v[0] != "triton"]


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join(filter(None, v)))
def backend(request):
    with instruction_set(request.param[1]):
        yield request.param[0]


@pytest.fixture(params=[v for v in VARIANTS if v[0] == "cpp"], ids=lambda v: "-".join(v))
def native(request):
    with instruction_set(request.param[1]):
        yield request.param[0]


def paged(k, v, lengths, size, generator, *, spare=3, poison=True):
    """(k_cache, v_cache, block_table) that hold packed k, v [T, G, d] in random blocks; every other slot is NaN."""
    used = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(used) + spare, generator=generator)
    caches = [torch.full((len(order), size, *k.shape[1:]), float("nan") if poison else 0.0, dtype=k.dtype) for _ in range(2)]
    table = torch.full((len(lengths), max(used) + 1), -7, dtype=torch.int32)
    first = token = 0
    for row, (count, length) in enumerate(zip(used, lengths, strict=True)):
        table[row, :count] = order[first: first + count]
        slots = torch.arange(length)
        where = table[row, slots // size].long(), slots % size
        for cache, x in zip(caches, (k, v), strict=True):
            cache[where] = x[token: token + length]
        first, token = first + count, token + length
    return *caches, table


def ends(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def decoded_like_prefill(lengths, chunk, dtype, native, generator, heads=4, kv_heads=2, dim=64, size=16, window=None):
    """Asserts that the last `chunk` tokens of every sequence give the same bits by paged_attention from a cache as in one
    packed prefill by flash_attention.
    """
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads))
    cu = ends(lengths)
    rows = torch.cat([torch.arange(int(e) - chunk, int(e)) for e in cu[1:]])
    k_cache, v_cache, table = paged(k, v, lengths, size, generator)
    got = paged_attention(q[rows], k_cache, v_cache, table, torch.tensor(lengths, dtype=torch.int32), window=window,
                          cu_seqlens_q=None if chunk == 1 else ends([chunk] * len(lengths)), return_lse=True, backend=native)
    want = flash_attention(q, k, v, causal=True, cu_seqlens_q=cu, window=window, return_lse=True, backend=native)
    assert_bitwise({"out": got[0], "lse": got[1]}, {"out": want[0][rows], "lse": want[1][:, rows]}, f"{lengths} {chunk}")


@pytest.mark.parametrize("chunk", (1, 7, 64))
@pytest.mark.parametrize("lengths", ((200,), (4096,), (4097,), (64, 65, 300, 1000, 128, 77, 2000, 99)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_decoded_token_has_the_bits_of_prefill(dtype, lengths, chunk, native, generator):
    decoded_like_prefill(lengths, chunk, dtype, native, generator)


@pytest.mark.parametrize("heads,kv_heads,dim,size,window", ((12, 2, 128, 5, None), (3, 3, 40, 1, None), (8, 1, 256, 64, None),
                                                            (4, 2, 64, 16, (100, 0)), (16, 2, 128, 16, (100, 0))))
def test_the_bits_of_prefill_in_other_shapes(heads, kv_heads, dim, size, window, native, generator):
    for chunk in (1, 3, 20):
        decoded_like_prefill((150, 333), chunk, torch.bfloat16, native, generator, heads, kv_heads, dim, size, window)


def test_batch_invariant(native, generator):
    """A sequence's bits do not depend on the other sequences of the batch."""
    lengths = [5, 700, 64, 1, 4200]
    k, v = (torch.randn(sum(lengths), 2, 64, generator=generator).bfloat16() for _ in range(2))
    k_cache, v_cache, table = paged(k, v, lengths, 16, generator)
    q, seq_lens = torch.randn(5, 8, 64, generator=generator).bfloat16(), torch.tensor(lengths, dtype=torch.int32)
    whole = paged_attention(q, k_cache, v_cache, table, seq_lens, backend=native)
    for i in range(5):
        alone = paged_attention(q[i: i + 1], k_cache, v_cache, table[i: i + 1], seq_lens[i: i + 1], backend=native)
        assert_bitwise({"out": alone}, {"out": whole[i: i + 1]}, f"sequence {i}")


def test_what_qkv_rope_wrote_is_what_attention_reads(backend, generator):
    """qkv_rope writes an int8 cache and paged_attention reads it; the result differs from qkv_rope and flash_attention without
    a cache by no more than the rounding to int8.
    """
    tokens, heads, kv_heads, dim, size = 37, 4, 2, 64, 8
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator)
    cos, sin = rope_table(tokens, dim)
    shape = (6, size, kv_heads)
    table = torch.tensor([[4, 0, 3, 1, 5]], dtype=torch.int32)
    slots = table[0, torch.arange(tokens) // size].long() * size + torch.arange(tokens) % size
    cache = KVCache(*(torch.zeros(*shape, dim, dtype=torch.int8) for _ in range(2)), slots,
                    *(torch.zeros(shape) for _ in range(2)))
    options = {"num_heads": heads, "num_kv_heads": kv_heads, "backend": backend}
    q, _, _ = qkv_rope(qkv, cos, sin, cache=cache, **options)
    got = paged_attention(q, cache.k, cache.v, table, torch.tensor([tokens], dtype=torch.int32), cu_seqlens_q=ends([tokens]),
                          k_scale=cache.k_scale, v_scale=cache.v_scale, backend=backend)
    want = flash_attention(*(t[None] for t in qkv_rope(qkv, cos, sin, **options)), causal=True, backend=backend)[0]
    error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 1e-4 < error < 0.02  # int8 rounds each key and value by up to 1 / 254 of the largest in its row


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_int8_bits_and_the_number_of_new_tokens(dtype, native, generator):
    """The last token has the same bits however many new tokens are computed in the call with it. With bfloat16 queries
    avx512_bf16 has two kinds of arithmetic: integer products for up to 8 lanes (new tokens x query heads of a group), and
    int8 converted to bfloat16 for more. There the bits are compared within each kind only.
    """
    keys, heads, kv_heads, dim = 300, 4, 2, 64
    q = torch.randn(40, heads, dim, generator=generator).to(dtype)
    cache = {f"{name}_cache": torch.randint(-127, 128, (5, 64, kv_heads, dim), generator=generator, dtype=torch.int8)
             for name in "kv"}
    cache |= {f"{name}_scale": torch.rand(5, 64, kv_heads, generator=generator) / 50 for name in "kv"}
    table, seq_lens = torch.tensor([[4, 0, 3, 1, 2]], dtype=torch.int32), torch.tensor([keys], dtype=torch.int32)
    last = {}
    for new in (1, 2, 4, 5, 40):  # 2 to 80 lanes
        out, lse = paged_attention(q[-new:], block_table=table, seq_lens=seq_lens, cu_seqlens_q=ends([new]), return_lse=True,
                                   backend=native, **cache)
        last[new] = {"out": out[-1], "lse": lse[:, -1]}
    two = dtype == torch.bfloat16 and _C.cpu_isa() == "avx512_bf16"
    for new in last:
        assert_bitwise(last[new], last[5 if two and new > 4 else 1], f"{new} new tokens")


def test_a_scale_of_zero_counts_as_one(backend):
    q = torch.zeros(1, 1, 32)
    cache = torch.full((1, 2, 1, 32), 3, dtype=torch.int8)
    scale = torch.tensor([[[0.0], [2.0]]])
    out = paged_attention(q, cache, cache, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32),
                          k_scale=scale, v_scale=scale, backend=backend)
    assert torch.equal(out, torch.full_like(out, (3 * 1 + 3 * 2) / 2))


def test_prefill_into_an_empty_cache(backend, generator):
    """paged_attention as a prefill: all keys of one sequence belong to new tokens, while another sequence has no new token."""
    k, v = (torch.randn(9, 1, 32, generator=generator) for _ in range(2))
    k_cache, v_cache, table = paged(k, v, [4, 5], 4, generator)
    q = torch.randn(5, 2, 32, generator=generator)
    out, lse = paged_attention(q, k_cache, v_cache, table, torch.tensor([4, 5], dtype=torch.int32),
                               cu_seqlens_q=ends([0, 5]), return_lse=True, backend=backend)
    want = flash_attention(q[None], k[None, 4:], v[None, 4:], causal=True, backend=backend)[0]
    torch.testing.assert_close(out, want)
    assert lse.shape == (2, 5) and lse.isfinite().all()


def test_scores_of_a_long_context_stay_finite(native, generator):
    lengths = [10_000]
    k, v = (torch.randn(10_000, 1, 32, generator=generator) * 30 for _ in range(2))
    k_cache, v_cache, table = paged(k, v, lengths, 64, generator)
    out, lse = paged_attention(torch.randn(1, 1, 32, generator=generator) * 30, k_cache, v_cache, table,
                               torch.tensor(lengths, dtype=torch.int32), return_lse=True, backend=native)
    assert out.isfinite().all() and lse.isfinite().all() and not math.isinf(float(lse.max()))
