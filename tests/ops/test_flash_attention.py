"""What is special to flash_attention: FlashAttention's conventions case by case, packed sequences, views, errors of gradients.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from cells import variants
from shared import OPS, Recorder, assert_bitwise, instruction_set

from internlm2_kernels import flash_attention, nn, qkv_rope, rope_table
from internlm2_kernels.ops._attention import attend

OP = OPS["flash_attention"]
VARIANTS = [v for v in variants("cpu", OP) if v[0] != "triton"]
NATIVE = [v for v in VARIANTS if v[0] == "cpp"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join(filter(None, v)))
def backend(request):
    with instruction_set(request.param[1]):
        yield request.param[0]


@pytest.fixture(params=NATIVE, ids=lambda v: "-".join(v))
def native(request):
    with instruction_set(request.param[1]):
        yield request.param[0]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def seen_keys(queries, keys, backend, **options):
    """Which keys each query attends to. Values are unit vectors and scores are equal, so the output shows the probabilities."""
    q, k = torch.zeros(1, queries, 1, 32), torch.zeros(1, keys, 1, 32)
    v = torch.eye(32)[:keys].reshape(1, keys, 1, 32)
    return [[int(p > 0) for p in row[:keys]] for row in flash_attention(q, k, v, backend=backend, **options)[0, :, 0]]


# ------------------------------------------------------------- the mask, as flash_attn documents it since version 2.1
MASKS = [
    (2, 5, {"causal": True}, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
    (5, 2, {"causal": True}, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]),
    (4, 4, {"causal": True}, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    (4, 4, {"window": (1, 0)}, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
    (4, 4, {"window": (1, 2), "causal": True}, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
    (3, 5, {"window": (1, 1)}, [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]),
    (3, 3, {"window": (-1, 1)}, [[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
    (3, 3, {"window": (0, 0)}, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    (2, 3, {"window": (-1, -1)}, [[1, 1, 1], [1, 1, 1]]),
    (4, 1, {"window": (1, 1)}, [[0], [0], [1], [1]]),
]


@pytest.mark.parametrize("queries,keys,options,mask", MASKS, ids=[f"{m[0]}x{m[1]}-{m[2]}" for m in MASKS])
def test_masks(queries, keys, options, mask, backend):
    assert seen_keys(queries, keys, backend, **options) == mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(dtype, backend):
    """Fully masked rows have output 0, lse -inf and gradients 0; the other rows are those of the sequence without them."""
    q, k, v = (randn(1, n, 2, 32, dtype=dtype, seed=n + i).requires_grad_() for i, n in enumerate((7, 3, 3)))
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert not out[:, :4].any() and (lse[..., :4] == -math.inf).all() and lse[..., 4:].isfinite().all()
    tail = flash_attention(q[:, 4:], k, v, causal=True, backend=backend)
    torch.testing.assert_close(out[:, 4:], tail)
    dq, dk, dv = torch.autograd.grad(out.float().square().sum() + lse[..., 4:].sum(), (q, k, v))
    assert not dq[:, :4].any() and dq[:, 4:].any() and all(g.isfinite().all() for g in (dq, dk, dv))


def test_sequences_of_no_length(backend):
    """Empty sequences at the front, in between and at the end: of queries only, of keys only, and of both."""
    queries, keys = (0, 3, 0, 2, 4, 0), (0, 5, 4, 0, 4, 0)
    q, k, v = randn(9, 4, 32), randn(13, 2, 32, seed=1), randn(13, 2, 32, seed=2)
    out, lse = flash_attention(q, k, v, cu_seqlens_q=ends(*queries), cu_seqlens_k=ends(*keys), return_lse=True,
                               backend=backend)
    assert not out[3:5].any() and (lse[:, 3:5] == -math.inf).all()
    for rows, columns in ((slice(0, 3), slice(0, 5)), (slice(5, 9), slice(9, 13))):
        alone = flash_attention(q[None, rows], k[None, columns], v[None, columns], return_lse=True, backend=backend)
        torch.testing.assert_close(out[rows], alone[0][0])
        torch.testing.assert_close(lse[:, rows], alone[1][0])
    nothing = flash_attention(q[:0], k[:0], v[:0], cu_seqlens_q=ends(), backend=backend)
    assert nothing.shape == (0, 4, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_is_batch_invariant(dtype, native):
    """A sequence gives the same bits, in results and gradients, as a dense batch of one and packed at any place among
    others.
    """
    lengths = (37, 300, 1, 130)
    q, k, v, dout = (randn(sum(lengths), heads, 64, dtype=dtype, seed=heads + i) for i, heads in enumerate((4, 2, 2, 4)))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out, lse = flash_attention(q, k, v, causal=True, cu_seqlens_q=ends(*lengths), return_lse=True, backend=native)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        one = [t[None, part].detach().requires_grad_() for t in (q, k, v)]
        alone, alone_lse = flash_attention(*one, causal=True, return_lse=True, backend=native)
        assert_bitwise({"out": out[part].detach(), "lse": lse[:, part].detach()},
                       {"out": alone[0].detach(), "lse": alone_lse[0].detach()}, f"{length}")
        alone_grads = torch.autograd.grad(alone, one, dout[None, part])
        assert_bitwise({n: g[part] for n, g in zip("qkv", grads, strict=True)},
                       {n: g[0] for n, g in zip("qkv", alone_grads, strict=True)}, f"gradients of {length}")
        start += length


@pytest.mark.parametrize("keys", (100, 4095, 4096, 4097, 9000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_does_not_depend_on_how_many_there_are(dtype, keys, native):
    """The last 1, 7 and 100 queries have the same bits in a call of their own as in the call with all queries, although the two
    calls have other tiles and split the keys differently.
    """
    q, k, v = randn(1, keys, 4, 32, dtype=dtype), randn(1, keys, 2, 32, dtype=dtype, seed=1), randn(1, keys, 2, 32, dtype=dtype)
    q = q[:, -min(keys, 200):]
    whole, whole_lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=native)
    for count in (1, 7, 100):
        out, lse = flash_attention(q[:, -count:], k, v, causal=True, return_lse=True, backend=native)
        assert_bitwise({"out": out, "lse": lse}, {"out": whole[:, -count:], "lse": whole_lse[..., -count:]}, f"last {count}")


def test_views_of_a_packed_projection_are_read_in_place(native):
    """q, k and v as slices of one tensor [T, H + 2 G, d] are not copied, and give the bits that copies give."""
    qkv, cu = randn(50, 6 + 2 * 2, 64), ends(20, 30)
    views = qkv.split((6, 2, 2), 1)
    with Recorder() as recorder:
        out = flash_attention(*views, causal=True, cu_seqlens_q=cu, backend=native)
    assert [call[0]._schema.name for call in recorder.calls if "split" not in call[0]._schema.name] == [
        "internlm2::flash_attention_fwd"]
    copies = flash_attention(*(t.contiguous() for t in views), causal=True, cu_seqlens_q=cu, backend=native)
    assert_bitwise({"out": out}, {"out": copies})


def test_after_qkv_rope(backend):
    """qkv_rope followed by attention, as in the model, compared with the reference in float64."""
    cos, sin = rope_table(40, 64)
    qkv = randn(40, 8 * 64)
    run = lambda x, chosen: flash_attention(
        *qkv_rope(x, cos, sin, num_heads=4, num_kv_heads=2, backend=chosen), causal=True, cu_seqlens_q=ends(11, 29),
        backend=chosen)
    torch.testing.assert_close(run(qkv, backend).double(), run(qkv.double(), "reference"), rtol=1e-5, atol=1e-5)


EXACTNESS = [(4, 2, 64), (4, 1, 128), (6, 1, 64)]  # heads, kv_heads, d: 2, 4 and 6 query heads a key head


def gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    return torch.autograd.grad(function(*leaves), leaves, tensors[3])


@functools.cache
def gradients_of_others(shape, seed):
    """([q, k, v, dout] in bfloat16, the float64 gold of dq, dk and dv, the gradients by each of SDPA's two forms)."""
    heads, kv_heads, dim = shape
    data = [randn(1, 2048, h, dim, seed=4 * seed + i).bfloat16() for i, h in enumerate((heads, kv_heads, kv_heads, heads))]
    with instruction_set(NATIVE[-1][1]):
        gold = gradients(lambda q, k, v: flash_attention(q, k, v, causal=True, backend="cpp"), [t.double() for t in data])
    return data, gold, [gradients(lambda *t, form=form: form(*t, causal=True), data) for form in OP.workload.eager.values()]


@pytest.mark.parametrize("shape", EXACTNESS, ids=str)
def test_bf16_gradients_are_more_exact_than_sdpas(shape, native):
    """On CPU, SDPA adds up dK and dV over blocks in bfloat16; ours are rounded once, and may have at most 0.8 of SDPA's error.
    Our dQ may have at most SDPA's error, since in both the rounding of dS to bfloat16 dominates. The error of a gradient is the
    root mean square over all elements in three draws of q, k, v and dout, for each shape separately. SDPA counts with its more
    accurate form: `enable_gqa`, or keys expanded beforehand.
    """
    errors = {name: torch.zeros(3, dtype=torch.float64) for name in "qkv"}  # of ours and of SDPA's two forms
    for seed in range(3):
        data, gold, theirs = gradients_of_others(shape, seed)
        ours = gradients(lambda q, k, v: flash_attention(q, k, v, causal=True, backend=native), data)
        for i, name in enumerate("qkv"):
            errors[name] += torch.stack([(g[i].double() - gold[i]).square().mean() for g in (ours, *theirs)])
    ratios = {name: float((e[0] / e[1:].min()).sqrt()) for name, e in errors.items()}
    print({f"d{name}": round(ratio, 3) for name, ratio in ratios.items()})
    assert max(ratios["k"], ratios["v"]) <= 0.8 and ratios["q"] <= 1, ratios


def test_the_float64_kernel_is_exact(native):
    """The cpp kernel in float64, which other tests use as gold, against the plain reference."""
    q, k, v = (randn(2, 90, h, 40, seed=h).double() for h in (4, 2, 2))
    got, lse = flash_attention(q, k, v, window=(30, 4), softcap=3.0, return_lse=True, backend=native)
    for i in range(2):
        want, want_lse = attend(q[i], k[i], v[i], 30, 4, 40**-0.5, 3.0)
        torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(lse[i], want_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_large_scores_neither_overflow_nor_vanish(dtype, backend):
    draw = lambda seed, size: randn(1, 70, 2, 64, dtype=dtype, seed=seed) * size
    q, k, v = draw(0, 100), draw(1, 100), draw(2, 1)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
    want = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)
    assert out.isfinite().all() and lse.isfinite().all()
    assert (out.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max() + 1e-4


def test_infinity_and_nan_stay_in_their_sequence(native):
    q, k, v = randn(60, 2, 32), randn(60, 2, 32, seed=1), randn(60, 2, 32, seed=2)
    v[10, 0, 3], k[25, 1, 0] = math.inf, math.nan
    cu = ends(20, 20, 20)
    out = flash_attention(q, k, v, causal=True, cu_seqlens_q=cu, backend=native)
    clean = flash_attention(q, k.nan_to_num(0), v.nan_to_num(posinf=0), causal=True, cu_seqlens_q=cu, backend=native)
    touched = torch.zeros(60, 2, dtype=torch.bool)
    touched[:20, 0], touched[20:40, 1] = True, True  # rows before it in its tile too: weight 0 times infinity is NaN
    assert torch.equal(out[~touched], clean[~touched]) and not out[25:40, 1].isfinite().any()


def test_flash_attention_module(generator):
    """The module on separate and on packed inputs, dense and packed sequences, returns what the function returns."""
    qkv = torch.randn(2, 10, 3, 4, 32, generator=generator)
    module = nn.FlashAttention(causal=True, window=(5, 0))
    want = flash_attention(*qkv.unbind(2), causal=True, window=(5, 0))
    assert torch.equal(module(qkv), want) and torch.equal(module(*qkv.unbind(2)), want)
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    out, lse = module(qkv[0], cu_seqlens_q=cu, return_lse=True)
    assert torch.equal(out, flash_attention(*qkv[0].unbind(1), causal=True, window=(5, 0), cu_seqlens_q=cu))
    assert lse.shape == (4, 10)
    with pytest.raises(ValueError, match=r"FlashAttention: q: expected \[..., 3, heads, head_dim\]"):
        module(qkv[0, :, 0])
    with pytest.raises(ValueError, match="FlashAttention: v: expected a tensor where k is given"):
        module(qkv[0, :, 0], qkv[0, :, 0])


def test_the_module_names_what_it_cannot_take():
    """Wrong options raise, when the module is constructed, the errors that flash_attention raises. Inputs of a wrong type raise
    an error that names them, and not an AttributeError from inside the module.
    """
    q = randn(1, 4, 2, 32)
    for options in ({"causal": "yes"}, {"causal": 1}, {"window": "x"}, {"window": (-2, 0)}, {"window": (1.0, 0)},
                    {"scale": -1}, {"scale": math.nan}, {"softcap": -1.0}, {"softcap": 1e37}):
        with pytest.raises((TypeError, ValueError)) as wanted:
            flash_attention(q, q, q, **options)
        with pytest.raises(wanted.type) as got:
            nn.FlashAttention(**options)
        assert str(got.value) == str(wanted.value).replace("flash_attention", "FlashAttention")
    # scale / softcap must be at least 1e-37. 32^-0.5 / 1e36 is, 256^-0.5 / 1e36 would not be: the module, which does not know
    # head_dim at construction, must not assume a large one.
    assert nn.FlashAttention(softcap=1e36)(q, q, q).isfinite().all()
    for wrong in (None, q.numpy(), [q, q, q]):
        with pytest.raises(TypeError, match=f"^FlashAttention: q: expected a tensor, got {type(wrong).__name__}$"):
            nn.FlashAttention()(wrong)
    with pytest.raises(TypeError, match="^flash_attention: k: expected a tensor, got ndarray"):
        nn.FlashAttention()(q, q.numpy(), q)
