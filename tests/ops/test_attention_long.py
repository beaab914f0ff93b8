"""Attention at length: 200,000 tokens, 65,536 with gradients, the bits of a prefill at 32k, more than 2^31 elements."""

import pytest
import torch
from cells import variants
from memory import peak_extra
from shared import OPS, assert_bitwise, instruction_set
from test_paged_attention import ends, paged

from internlm2_kernels import flash_attention, paged_attention
from internlm2_kernels.testing import _rung, ladder_table, run
from internlm2_kernels.workloads import Sample

OP = OPS["flash_attention"]
SDPA, SDPA_EXPANDED = OP.workload.eager.values()  # the second: with enable_gqa SDPA's backward takes over 20 times as long
SETS = [isa for backend, isa in variants("cpu", OP) if backend == "cpp"]
DTYPES = (torch.bfloat16, torch.float32)
GIB = 2**30
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(params=SETS)
def isa(request):
    with instruction_set(request.param):
        yield request.param


def drawn(length, generator, count=64):
    """`count` positions in increasing order, drawn uniformly; the last position is always among them."""
    return torch.cat((torch.randint(length - 1, (count - 1,), generator=generator).sort().values, torch.tensor([length - 1])))


def assert_rows(positions, length, tensors):
    """Asserts the error ladder on the rows at `positions`: on all of them together, on each quarter of the sequence, and on the
    last row. `tensors` is {name: (ours, SDPA's, float64 gold)} with one row for each position. The parts are checked by
    themselves because rows late in a causal sequence are smaller by orders of magnitude: measured by the scale of all rows,
    their errors would pass unseen.
    """
    quarters = positions * 4 // length
    parts = {"": quarters >= 0, "last": positions == length - 1, **{f"{i + 1}/4": quarters == i for i in range(4)}}
    rungs = [_rung(f"{name} {part}", got[rows], base[rows], gold[rows], 0.0)
             for name, (got, base, gold) in tensors.items() for part, rows in parts.items() if rows.any()]
    print(ladder_table(rungs))
    assert all(rung.ok for rung in rungs), ladder_table(rungs)


# --------------------------------------------------------------------------------------------------- 200,000 tokens
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_hundred_thousand_tokens(dtype, generator):
    """The call takes less than 1 GiB of extra memory, and 64 of its rows pass the error ladder, with SDPA in the same dtype on
    the same rows as baseline.
    """
    length = 200_000
    q, k, v = (torch.randn(1, length, heads, 64, generator=generator).to(dtype) for heads in (2, 1, 1))
    out, extra = peak_extra(lambda: flash_attention(q, k, v, causal=True, backend="cpp"))
    print(f"\n200,000 tokens, {dtype}: {extra / 2**20:.0f} MiB of extra memory, {out.nbytes / 2**20:.0f} of them the result")
    assert extra < GIB
    positions = drawn(length, generator)
    rows = lambda attend: torch.cat([attend(q[:, i: i + 1], k[:, : i + 1], v[:, : i + 1])[0] for i in positions.tolist()])
    assert_rows(positions, length, {"out": (out[0, positions], rows(SDPA), rows(row_of_reference))})


def row_of_reference(q, k, v):
    """float64 attention of one query [1, 1, H, d] to all of k, v [1, S, 1, d]."""
    scores = q[0, 0].double() @ k[0, :, 0].double().T * q.shape[-1] ** -0.5
    return (torch.softmax(scores, -1) @ v[0, :, 0].double())[None, None]


# -------------------------------------------------------------------------------------- 65,536 tokens, with gradients
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_at_64k_tokens(dtype, generator):
    """Forward and backward take less than 1 GiB of extra memory, and 64 rows of out, dQ, dK and dV pass the error ladder, with
    SDPA on expanded keys as baseline.
    """
    length = 65_536
    q, k, v, dout = (torch.randn(1, length, heads, 64, generator=generator).to(dtype) for heads in (2, 1, 1, 2))
    sample, upstream = Sample({"q": q, "k": k, "v": v, "causal": True}, ("q", "k", "v")), {"out": dout}
    got, extra = peak_extra(lambda: run(OP, sample, "cpp", upstream))
    results = sum(t.nbytes for t in got.values()) / 2**20
    print(f"\n65,536 tokens, {dtype}: {extra / 2**20:.0f} MiB of extra memory, {results:.0f} of them the results")
    assert extra < GIB
    base = run(OP, sample, SDPA_EXPANDED, upstream)
    positions = drawn(length, generator)
    gold = gradients_of_reference(*(t[0].double() for t in (q, k, v, dout)), positions)
    assert_rows(positions, length, {name: (got[name][0, positions], base[name][0, positions], want)
                                    for name, want in gold.items()})


def gradients_of_reference(q, k, v, dout, positions, block=512):
    """out, dq, dk, dv in float64 at the given tokens, computed a block of queries at a time. q, dout [T, H, d], k, v [T, 1, d].
    """
    length, heads, dim = q.shape
    k, v, scale = k[:, 0], v[:, 0], dim**-0.5
    out, dq = torch.zeros(2, len(positions), heads, dim, dtype=torch.float64)
    dk, dv = torch.zeros(2, len(positions), dim, dtype=torch.float64)
    hidden = torch.ones(block, block, dtype=torch.bool).triu(1)
    for head in range(heads):
        for first in range(0, length, block):
            seen = first + block
            rows, dout_rows = q[first: seen, head], dout[first: seen, head]
            p = rows * scale @ k[:seen].T
            p[:, first:].masked_fill_(hidden, -torch.inf)
            p = p.sub_(p.amax(-1, keepdim=True)).exp_()
            p /= p.sum(-1, keepdim=True)
            o = p @ v[:seen]
            delta = (dout_rows * o).sum(-1, keepdim=True)
            keys = positions < seen  # of the tokens at `positions`, those that this block of queries sees as keys
            p_keys = p[:, positions[keys]]
            ds = p_keys * (dout_rows @ v[positions[keys]].T - delta) * scale
            dv[keys] += p_keys.T @ dout_rows
            dk[keys] += ds.T @ rows
            mine = keys & (positions >= first)
            at = positions[mine] - first
            out[mine, head] = o[at]
            dq[mine, head] = (p[at] * (dout_rows[at] @ v[:seen].T - delta[at]) * scale) @ k[:seen]
    return {"out": out, "d_q": dq, "d_k": dk[:, None], "d_v": dv[:, None]}


def test_the_reference_in_blocks_is_the_reference(generator):
    length, positions = 1536, torch.tensor([0, 5, 511, 512, 700, 1535])
    q, k, v, dout = (torch.randn(length, heads, 64, generator=generator).double() for heads in (2, 1, 1, 2))
    want = run(OP, Sample({"q": q[None], "k": k[None], "v": v[None], "causal": True}, ("q", "k", "v")), "reference",
               {"out": dout[None]})
    for name, got in gradients_of_reference(q, k, v, dout, positions).items():
        torch.testing.assert_close(got, want[name][0, positions], rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------- decoding and prefill at 32k
LENGTHS = {1: (32_768,), 8: (8192, 5000, 32_768, 64, 4096, 12_289, 700, 20_000)}


@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_has_the_bits_of_prefill_at_32k(dtype, batch, isa, generator):
    """Decode of 1, 7 and 64 new tokens for each sequence, at the end of the sequence and at two earlier places, must have the
    bits of one packed prefill of all tokens.
    """
    lengths = LENGTHS[batch]
    q, k, v = (torch.randn(sum(lengths), heads, 64, generator=generator).to(dtype) for heads in (4, 2, 2))
    starts = ends(lengths)[:-1].long()
    k_cache, v_cache, table = paged(k, v, lengths, 64, generator)
    out, lse = flash_attention(q, k, v, causal=True, cu_seqlens_q=ends(lengths), return_lse=True, backend="cpp")
    places = [torch.tensor(lengths), *((64 + torch.rand(batch, generator=generator) * (torch.tensor(lengths) - 63)).long()
                                       for _ in range(2))]
    for seq_lens in places:
        for chunk in (1, 7, 64):
            rows = ((starts + seq_lens - chunk)[:, None] + torch.arange(chunk)).flatten()
            got = paged_attention(q[rows], k_cache, v_cache, table, seq_lens.int(), return_lse=True, backend="cpp",
                                  cu_seqlens_q=None if chunk == 1 else ends([chunk] * batch))
            assert_bitwise({"out": got[0], "lse": got[1]}, {"out": out[rows], "lse": lse[:, rows]},
                           f"{chunk} new tokens, {seq_lens.tolist()} keys")


# ------------------------------------------------------------------------------------------- beyond 2^31 elements
@pytest.mark.parametrize("cached,dtype", ((torch.bfloat16, torch.bfloat16), (torch.int8, torch.bfloat16),
                                          (torch.int8, torch.float32)), ids=str)
def test_a_cache_beyond_two_to_the_31(cached, dtype, generator):
    """Caches of more than 2^31 elements each, of which the last blocks are read. All other blocks hold NaN, so
    that an index that wrapped around would show.
    """
    size, kv_heads, dim = 64, 8, 128
    blocks = 2**31 // (size * kv_heads * dim) + 8
    table = torch.tensor([[blocks - 1, 2, blocks - 2]], dtype=torch.int32)
    used, near = table[0].long(), torch.arange(3, dtype=torch.int32)[None]
    large, small = {}, {}
    for name in ("k", "v"):
        x = torch.randn(3, size, kv_heads, dim, generator=generator)
        scale = x.abs().amax(-1) / 127
        small[f"{name}_cache"] = (x / scale[..., None]).round().to(cached) if cached == torch.int8 else x.to(cached)
        if cached == torch.int8:
            small[f"{name}_scale"] = scale
    for name, tensor in small.items():
        unused = float("nan") if tensor.is_floating_point() else 0
        large[name] = torch.full((blocks, *tensor.shape[1:]), unused, dtype=tensor.dtype)
        large[name][used] = tensor
    assert large["k_cache"].numel() > 2**31
    q = torch.randn(8, 16, dim, generator=generator).to(dtype)
    seq_lens = torch.tensor([150], dtype=torch.int32)
    call = lambda new, table, cache: paged_attention(q[:new], block_table=table, seq_lens=seq_lens, backend="cpp",
                                                     cu_seqlens_q=ends([new]), **cache)
    for isa in SETS:
        for new in (1, 8):
            with instruction_set(isa):
                got, want = call(new, table, large), call(new, near, small)
            assert torch.equal(got, want) and got.isfinite().all() and got.any(), (isa, new)


def test_views_of_a_projection_beyond_two_to_the_31(isa, generator):
    """Packed sequences as slices of one tensor of more than 2^31 elements."""
    lengths, heads, kv_heads, dim = (5, 0, 200, 1, 50), 16, 1, 64
    small = torch.randn(256, heads + 2 * kv_heads, dim, generator=generator).bfloat16()
    times = 2**31 // small.numel() + 1
    large = small.repeat(times, 1, 1)
    assert large.numel() > 2**31
    split = lambda qkv: qkv.split((heads, kv_heads, kv_heads), 1)
    want, want_lse = flash_attention(*split(small), causal=True, cu_seqlens_q=ends(lengths), return_lse=True, backend="cpp")
    got, lse = flash_attention(*split(large), causal=True, cu_seqlens_q=ends(lengths * times), return_lse=True, backend="cpp")
    for i in range(times):
        assert torch.equal(got[256 * i: 256 * (i + 1)], want), i
    assert torch.equal(lse, want_lse.repeat(1, times))
