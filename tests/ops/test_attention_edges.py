"""Both attention operators at the edges of their options and of numbers: windows, scales, rows without keys, NaN, autocast."""

import math

import numpy as np
import pytest
import torch
from cells import variants
from shared import OPS, assert_bitwise, bits, instruction_set

from internlm2_kernels import check, flash_attention, paged_attention

NAN, DTYPES = math.nan, (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=variants("cpu", OPS["flash_attention"]), ids=lambda v: "-".join(filter(None, v)))
def backend(request):
    chosen = request.node.callspec.params
    if request.param[1] == "interpreted" and (chosen.get("dtype") in DTYPES[1:] or chosen.get("wide", 2**31) != 2**31):
        pytest.skip("the same kernels, of which the interpreter takes up to seconds a call: float32 and one width are enough")
    with instruction_set(request.param[1]):
        yield request.param[0]


@pytest.fixture
def randn(generator):
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


def ends(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def results(q, k, v, upstream, backend, **options):
    """out, lse and the gradients by name; `upstream` holds the upstream gradients of out and lse."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    outputs = flash_attention(*leaves, return_lse=True, backend=backend, **options)
    grads = torch.autograd.grad(outputs, leaves, upstream)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (*(o.detach() for o in outputs), *grads), strict=True))


# ---------------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize("wide", (2**31, 2**63 - 1, 2**63, 2**70), ids=lambda n: f"{n:.3g}")
@pytest.mark.parametrize("window", ((1, 0), (0, 1), (1, 1)), ids=("left", "right", "both"))
def test_a_window_wider_than_any_sequence_is_none(window, wide, backend, randn):
    q, k, v = randn(1, 7, 2, 32), randn(1, 9, 1, 32), randn(1, 9, 1, 32)
    upstream = randn(1, 7, 2, 32), randn(1, 2, 7)
    for rest in (-1, 3):
        of = lambda size, rest=rest: results(q, k, v, upstream, backend, window=tuple(size if w else rest for w in window))
        assert_bitwise(of(wide), of(-1), f"window {window} {wide}")


def test_a_wide_window_and_integers_of_numpy_on_a_cache(backend, randn):
    arguments = randn(2, 2, 32), randn(3, 4, 1, 32), randn(3, 4, 1, 32), torch.tensor([[0, 1], [2, -9]], dtype=torch.int32)
    call = lambda **options: paged_attention(*arguments, int32(8, 3), backend=backend, **options)
    for wide in (2**63 - 1, 2**63):
        assert torch.equal(call(window=(wide, 0)), call())
    assert torch.equal(call(window=(np.int64(2), np.int32(0)), max_seqlen_q=np.uint8(1)), call(window=(2, 0)))


def test_integers_of_numpy(backend, randn):
    q, k = randn(9, 2, 32), randn(9, 1, 32)
    call = lambda number: flash_attention(q, k, k, cu_seqlens_q=ends(4, 5), window=(number(2), number(1)), backend=backend,
                                          max_seqlen_q=number(5), max_seqlen_k=number(2**40))
    for number in (np.int64, np.uint64):
        assert torch.equal(call(number), call(int))
    with pytest.raises(ValueError, match="flash_attention: window: expected None or"):
        call(np.float32)


@pytest.mark.parametrize("scale,softcap", ((1e-37, 0.0), (1e37, 0.0), (1e-37, 1e-37), (1e-37, 0.5), (1e37, 2.0), (1e37, 1e37),
                                           (0.2, 1e-37), (0.2, 1e36)))
def test_the_widest_scales_give_no_nan(scale, softcap, backend, randn):
    """Scores of usual size, some of them 0, from extreme scales and soft-caps, compared with float64."""
    q, k, v = randn(1, 5, 1, 32) * scale**-0.5, randn(1, 5, 1, 32) * scale**-0.5, randn(1, 5, 1, 32)
    q[:, 2] = 0
    got = results(q, k, v, (randn(1, 5, 1, 32), torch.zeros(1, 1, 5)), backend, causal=True, scale=scale, softcap=softcap)
    want = flash_attention(q.double(), k.double(), v.double(), causal=True, scale=scale, softcap=softcap, return_lse=True,
                           backend="reference")
    torch.testing.assert_close(got["out"].double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["lse"].double(), want[1], rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("size", (3e3, 1e5, 1e8), ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scores_of_which_float32_keeps_no_fraction(dtype, size, backend, randn):
    """Scores of 1e7 to 1e16: each row of the output is the value of its best key, and no weight is lost."""
    if backend == "triton" and size > 3e3:
        pytest.skip("beyond scores of 1e8 the Triton kernels promise nothing: a row that loses all its weights becomes NaN")
    q, k, v = (size * randn(1, 40, 2, 32)).to(dtype), (size * randn(1, 40, 1, 32)).to(dtype), randn(1, 40, 1, 32).to(dtype)
    got = results(q, k, v, (randn(1, 40, 2, 32).to(dtype), torch.zeros(1, 2, 40)), backend, causal=True)
    want = flash_attention(q.double(), k.double(), v.double(), causal=True, return_lse=True, backend="reference")
    torch.testing.assert_close(got["out"].double(), want[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got["lse"].double(), want[1], rtol=1e-4, atol=0)  # sums of 32 products of both signs
    assert all(x.isfinite().all() for x in got.values())


def test_compiled_self_attention_of_documents_trains(backend, randn):
    """The same cu_seqlens tensor is passed for queries and keys; a compiled graph refuses one tensor as two of its inputs."""
    if backend in ("reference", "triton"):
        pytest.skip("nothing of ours in the graph; no graph over the interpreter")
    cu, q, k, v = ends(4, 5), randn(9, 2, 32).requires_grad_(), randn(9, 1, 32), randn(9, 1, 32)
    call = lambda q, **more: flash_attention(q, k, v, causal=True, cu_seqlens_q=cu, backend=backend, **more).square().sum()
    torch._dynamo.reset()
    for more in ({}, {"cu_seqlens_k": cu}):
        compiled = torch.compile(lambda q, more=more: call(q, **more), fullgraph=True, backend="aot_eager")
        got, want = (torch.autograd.grad(f(q), q)[0] for f in (compiled, call))
        assert torch.equal(got, want)


def test_compiled_code_takes_any_max_seqlen(backend, randn):
    """Calls that differ in max_seqlen run the same compiled graph; none of them compiles again."""
    q, k, graphs = randn(1, 12, 2, 32), randn(1, 12, 1, 32), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, longest: flash_attention(q, k, k, causal=True, max_seqlen_q=longest, backend=backend),
                             fullgraph=True, backend=counting)
    for longest in range(12, 24):
        assert torch.equal(compiled(q, longest), flash_attention(q, k, k, causal=True, backend=backend))
    assert len(graphs) <= 2


# --------------------------------------------------------------------------------------------------------- autocast, dtypes
def test_autocast_comes_before_the_comparison_of_dtypes(backend, randn):
    q, k, v = randn(1, 5, 2, 32).bfloat16(), randn(1, 5, 1, 32), randn(1, 5, 1, 32).half()
    with pytest.raises(TypeError, match="flash_attention: k: expected the dtype of q, torch.bfloat16, got torch.float32"):
        flash_attention(q, k, v, backend=backend)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attention(*leaves, causal=True, backend=backend)
        with pytest.raises(TypeError, match="flash_attention: k: expected the dtype of q, torch.float64"):
            flash_attention(q.double(), k, v, backend=backend)
    assert torch.equal(out, flash_attention(q, k.bfloat16(), v.bfloat16(), causal=True, backend=backend))
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), leaves)] == [t.dtype for t in leaves]


def test_a_cache_under_autocast(backend, randn):
    """Autocast casts q; the cache must have autocast's dtype already, or be int8."""
    q, cache = randn(1, 2, 32), randn(2, 4, 1, 32)
    table, lengths = torch.tensor([[1, 0]], dtype=torch.int32), int32(6)
    call = lambda q, cache, **options: paged_attention(q, cache, cache, table, lengths, backend=backend, **options)
    scale = torch.ones(2, 4, 1)
    int8 = {"cache": (10 * cache).to(torch.int8), "k_scale": scale, "v_scale": scale}
    want, want_int8 = call(q.bfloat16(), cache.bfloat16()), call(q.bfloat16(), **int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(q, cache.bfloat16()), want) and torch.equal(call(q, **int8), want_int8)
        with pytest.raises(TypeError, match="paged_attention: k_cache: expected torch.bfloat16 or int8, k_cache and v_cache "
                                            "alike, got torch.float32"):
            call(q, cache)


# ------------------------------------------------------------------------------------------------------- rows without keys
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
@pytest.mark.parametrize("options,queries,keys,blind", (
    ({"causal": True}, 33, 20, 13), ({"window": (7, 3)}, 40, 20, 17), ({"causal": True, "softcap": 5.0}, 9, 1, 8),
    ({"causal": True}, 400, 230, 170)), ids=str)
def test_rows_without_keys_contribute_nothing(options, queries, keys, blind, packed, dtype, backend, randn, request):
    """Fully masked rows: out 0, lse -inf, dq 0 and no contribution to dk and dv, whatever the rows, their upstream gradients
    and the keys masked from them hold.
    """
    if "interpreted" in request.node.name and (queries == 400 or not packed):
        pytest.skip("the interpreter takes seconds; smaller packed sequences have fully masked tiles too")
    q, k, v = randn(queries, 4, 32, dtype=dtype), randn(keys, 2, 32, dtype=dtype), randn(keys, 2, 32, dtype=dtype)
    dout, dlse = randn(queries, 4, 32, dtype=dtype), randn(4, queries)
    if packed:  # with other sequences before and after it
        cu = {"cu_seqlens_q": ends(3, queries, 2), "cu_seqlens_k": ends(1, keys, 5)}
        around = lambda x, before, behind, dim=0: torch.cat((x.narrow(dim, 0, 1).repeat_interleave(before, dim), x,
                                                             x.narrow(dim, -1, 1).repeat_interleave(behind, dim)), dim)
        q, dout, k, v = around(q, 3, 2), around(dout, 3, 2), around(k, 1, 5), around(v, 1, 5)
        dlse, rows = around(dlse, 3, 2, 1), slice(3, 3 + blind)
    else:
        cu, rows = {}, (0, slice(0, blind))
        q, k, v, dout, dlse = (t[None] for t in (q, k, v, dout, dlse))
    want = results(q, k, v, (dout, dlse), backend, **options, **cu)
    for value in (NAN, math.inf):
        q, dout, dlse = q.clone(), dout.clone(), dlse.clone()
        q[rows] = dout[rows] = value
        dlse.transpose(-1, -2)[rows] = value
        got = results(q, k, v, (dout, dlse), backend, **options, **cu)
        assert_bitwise(got, want, f"{value}")
        assert all(x.isfinite().all() for name, x in got.items() if name != "lse")
    assert not got["out"][rows].any() and not got["dq"][rows].any()
    assert (got["lse"].transpose(-1, -2)[rows] == -math.inf).all()
    for spoilt in (k, v):
        kept = spoilt.clone()
        spoilt[..., -6 if packed else -1, :, :] = NAN
        got = results(q, k, v, (dout, dlse), backend, **options, **cu)
        assert not got["out"][rows].any() and not got["dq"][rows].any()
        spoilt.copy_(kept)


# ------------------------------------------------------------------------------------------------------ rows with one key
ONE_KEY = (  # options, number of queries and number of keys of each sequence, the rows that attend to exactly one key
    ({"window": (0, 0)}, (300,), (300,), slice(None)),  # several blocks of queries; every row attends to its own key only
    ({"window": (0, 0), "softcap": 30.0}, (40,), (40,), slice(None)),
    ({}, (150, 3), (1, 1), slice(None)),
    ({"causal": True}, (40, 1, 9), (40, 1, 9), [0, 40, 41]),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options,queries,keys,rows", ONE_KEY, ids=str)
def test_a_row_that_sees_one_key_moves_neither_query_nor_key(options, queries, keys, rows, dtype, backend, randn):
    """The softmax of a single score is 1 whatever the score, so out is that key's value and the gradient of out must not reach
    q and k. Only the gradient of lse reaches them.
    """
    if backend != "cpp":
        pytest.skip("the promise is that of the compiled kernels")
    q, k, v = 4 * randn(sum(queries), 4, 64), 4 * randn(sum(keys), 2, 64), randn(sum(keys), 2, 64)
    q, k, v, dout = (t.to(dtype) for t in (q, k, v, randn(sum(queries), 4, 64)))
    cu = {"cu_seqlens_q": ends(*queries), "cu_seqlens_k": ends(*keys)}
    got = results(q, k, v, (dout, torch.zeros(4, sum(queries))), backend, **options, **cu)
    assert not got["dq"][rows].any()
    if rows == slice(None):
        assert not got["dk"].any()
        own = torch.cat([torch.arange(n).clamp(max=m - 1) + first for n, m, first in
                         zip(queries, keys, cu["cu_seqlens_k"].tolist(), strict=False)])
        assert torch.equal(got["out"], v[own].repeat_interleave(2, 1))
        dlse = randn(4, sum(queries))
        got = results(q, k, v, (dout, dlse), backend, **options, **cu)
        want = results(q.double(), k.double(), v.double(), (0 * dout.double(), dlse.double()), "reference", **options, **cu)
        for name in ("dq", "dk"):
            scale = float(want[name].abs().max())
            torch.testing.assert_close(got[name].double(), want[name], rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


# ------------------------------------------------------------------------------------------- NaN and infinity behind the mask
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", (NAN, math.inf))
@pytest.mark.parametrize("which", ("k", "v"))
def test_what_hidden_keys_reach(which, value, dtype, backend, randn):
    """NaN or infinity in the last key of the second of three sequences, in one key head: other sequences and key heads keep
    their bits, and where that key is masked, its k changes neither out nor lse.
    """
    lengths, hidden = (11, 40, 9), 50
    data = {"q": randn(60, 4, 32, dtype=dtype), "k": randn(60, 2, 32, dtype=dtype), "v": randn(60, 2, 32, dtype=dtype)}
    upstream = randn(60, 4, 32, dtype=dtype), randn(4, 60)
    call = lambda: results(*data.values(), upstream, backend, causal=True, cu_seqlens_q=ends(*lengths))
    want = call()
    data[which][hidden, 1, 5] = value
    got = call()
    for name in want:
        a, b = got[name], want[name]
        a, b = (a.T[..., None], b.T[..., None]) if name == "lse" else (a, b)  # [tokens, heads, ...]
        same = (bits(a) == bits(b)).all(-1)
        same[11:51, slice(1, 2) if name in ("dk", "dv") else slice(2, 4)] = True  # the elements that NaN or infinity may reach
        assert same.all(), name
    seen = hidden
    assert torch.equal(got["lse"][:, :seen], want["lse"][:, :seen])
    if which == "k":
        assert torch.equal(got["out"][:seen], want["out"][:seen])
    if which == "v" or math.isnan(value):
        assert not got["out"][hidden, 2:].isfinite().all()


# -------------------------------------------------------------------------------------------------- a cache behind its window
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, "int8"), ids=str)
@pytest.mark.parametrize("left,new,lengths,size", ((3, 1, (18, 40), 7), (0, 1, (9, 17), 1), (20, 3, (900, 30), 16),
                                                   (5, 12, (60, 12), 3)), ids=str)
def test_blocks_that_the_window_hides_are_not_read(left, new, lengths, size, dtype, backend, randn):
    """Block-table entries before the window may hold anything, and so may the blocks there. The same holds for the table row of
    a sequence without new tokens.
    """
    q, sequences = randn(new * len(lengths), 4, 64), len(lengths)
    blocks = sum(-(-n // size) for n in lengths)
    caches = [randn(blocks, size, 2, 64) for _ in range(2)]
    options = {}
    if dtype == "int8":
        caches = [(20 * c).to(torch.int8) for c in caches]
        options = {f"{name}_scale": randn(blocks, size, 2).abs() for name in "kv"}
    else:
        q, caches = q.to(dtype), [c.to(dtype) for c in caches]
    table = torch.full((sequences + 1, max(-(-n // size) for n in lengths)), -7, dtype=torch.int32)
    first = 0
    for row, length in enumerate(lengths):
        count = -(-length // size)
        table[row, :count] = torch.arange(first, first + count)
        first += count
    call = lambda table, idle: paged_attention(
        q, *caches, table, int32(*lengths, idle), cu_seqlens_q=ends(*[new] * sequences, 0), window=(left, 0), return_lse=True,
        backend=backend, **options)
    want, want_lse = call(table, 0)
    for garbage in (-1, 2**31 - 1, -(2**31)):
        spoilt = table.clone()
        for row, length in enumerate(lengths):
            spoilt[row, : max(0, length - new - left) // size] = garbage
        spoilt[-1] = garbage
        got, lse = call(spoilt, garbage)
        check()  # raises an error where a Triton kernel has met a bad index
        assert torch.equal(got, want) and torch.equal(lse, want_lse)
    assert not torch.equal(spoilt[:-1], table[:-1])
