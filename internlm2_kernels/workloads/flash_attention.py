"""Workload of `flash_attention`."""

import torch
from einops import repeat

from ..ops._attention import attend, check_options
from ..ops.flash_attention import on_sequences, sequences_of
from . import Case, Sample, Workload
from ._attention import pairs_of, sdpa


def _eager(enable_gqa):
    """F.scaled_dot_product_attention (SDPA) for each sequence. SDPA offers neither a soft-cap nor the lse; where one of them is
    wanted, the softmax is written out in the dtype of the inputs."""
    def composition(q, k, v, *, causal=False, scale=None, window=None, softcap=0.0, cu_seqlens_q=None, cu_seqlens_k=None,
                    max_seqlen_q=None, max_seqlen_k=None, return_lse=False):
        scale, left, right, softcap = check_options("flash_attention", q.shape[-1], scale, window, softcap)
        right = 0 if causal else right
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        if softcap or return_lse:
            one = lambda *sequence: (lambda out, lse: (out, lse.to(torch.promote_types(lse.dtype, torch.float32))))(
                *attend(*sequence, left, right, scale, softcap))
            return on_sequences(one, q, k, v, cu_seqlens_q, cu_k, return_lse)
        if cu_seqlens_q is None:
            return sdpa(q, k, v, left, right, scale, enable_gqa)
        parts = [sdpa(*(t[None] for t in sequence), left, right, scale, enable_gqa)[0]
                 for sequence in sequences_of(q, k, v, cu_seqlens_q, cu_k) if sequence[0].shape[0]]
        return torch.cat(parts) if parts else q * 1

    return composition


def _lengths(dims):
    """(S_q, S_k) of every sequence of a case."""
    if "lengths" in dims:
        return list(zip(dims["lengths"], dims.get("key_lengths", dims["lengths"]), strict=True))
    return [(dims["queries"], dims["keys"])] * dims["batch"]


_OPTIONS = ("causal", "window", "softcap", "scale", "return_lse")


def _sample(case, dtype, device, generator):
    dims = case.dims
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)
    inputs = {name: dims[name] for name in _OPTIONS if dims.get(name)}
    lengths = _lengths(dims)
    if "lengths" in dims:
        ends = lambda values: torch.tensor([0, *values], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        inputs["cu_seqlens_q"], inputs["cu_seqlens_k"] = (ends(part) for part in zip(*lengths, strict=True))
        lead_q, lead_k = ((sum(part),) for part in zip(*lengths, strict=True))
    else:
        lead_q, lead_k = (dims["batch"], dims["queries"]), (dims["batch"], dims["keys"])
    q = draw(*lead_q, dims["heads"], dims["head_dim"])
    k, v = (draw(*lead_k, dims["kv_heads"], dims["head_dim"]) for _ in range(2))
    return Sample({"q": q, "k": k, "v": v, **inputs}, ("q", "k", "v"))


def _magnitude(sample, upstream):
    """The size of the terms that cancel in lse, dq and dk, by name: the error ladder (testing.py) takes it as the scale of the
    allowed error where it is larger than the result itself.

    dq and dk are sums of p (dp - delta) times keys or queries, in which dp and delta cancel (p: probabilities, dp: their
    gradients, delta: rowsum(dout * out)). Their magnitude is the root of the sum of the squared terms. The magnitude of lse is
    that of the largest score.
    """
    inputs = dict(sample.inputs)
    q, k, v = (inputs.pop(name) for name in "qkv")
    causal, scale = inputs.get("causal", False), inputs.get("scale")
    scale, left, right, softcap = check_options("flash_attention", q.shape[-1], scale, inputs.get("window"),
                                                inputs.get("softcap", 0.0))
    cu_q, cu_k = inputs.get("cu_seqlens_q"), inputs.get("cu_seqlens_k")
    sizes = {"q": 0.0, "k": 0.0, "lse": 0.0}
    douts = upstream.get("out")
    douts = [None] * 10**6 if douts is None else sequences_of(douts, k, v, cu_q, cu_k)
    for (q1, k1, v1), dout in zip(sequences_of(q, k, v, cu_q, cu_k), douts, strict=False):
        if 0 in (q1.shape[0], k1.shape[0]):
            continue
        ke, ve = (repeat(t, "j g d -> j (g h) d", h=q1.shape[1] // t.shape[1]) for t in (k1, v1))
        s = torch.einsum("ihd,jhd->hij", q1, ke) * scale
        sizes["lse"] = max(sizes["lse"], float(s.abs().max()))
        if dout is None:
            continue
        out, lse = attend(q1, k1, v1, left, 0 if causal else right, scale, softcap)
        s = softcap * torch.tanh(s / softcap) if softcap else s
        p = torch.exp(s - lse.masked_fill(lse.isinf(), float("inf"))[..., None]).clamp(max=1)
        dp = torch.einsum("ihd,jhd->hij", dout[0], ve).abs() + (dout[0] * out).sum(-1).T[..., None].abs()
        terms = p * dp * scale
        sizes["q"] = max(sizes["q"], float(torch.einsum("hij,jhd->ihd", terms.square(), ke.square()).max().sqrt()))
        sizes["k"] = max(sizes["k"], float(torch.einsum("hij,ihd->jhd", terms.square(), q1.square()).max().sqrt()))
    return sizes


def _bytes(dims, size, direction):
    queries, keys = (sum(part) for part in zip(*_lengths(dims), strict=True))
    rows = 2 * queries * dims["heads"] + 2 * keys * dims["kv_heads"]
    return (rows if direction == "forward" else 2 * rows) * dims["head_dim"] * size + 4 * queries * dims["heads"]


def _flops(dims, direction):
    """The operations of a call: for each pair of a query and an unmasked key two products of length d in the forward, and five
    in the backward, one of which computes the scores again."""
    left, right = dims.get("window") or (-1, -1)
    pairs = sum(pairs_of(a, b, left, 0 if dims.get("causal") else right) for a, b in _lengths(dims))
    return (4 if direction == "forward" else 10) * pairs * dims["heads"] * dims["head_dim"]


def _dense(kind, batch, queries, keys, heads, kv_heads, head_dim, **options):
    return Case(kind, {"batch": batch, "queries": queries, "keys": keys, "heads": heads, "kv_heads": kv_heads,
                       "head_dim": head_dim, **options})


def _packed(kind, lengths, heads, kv_heads, head_dim, **options):
    return Case(kind, {"lengths": tuple(lengths), "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, **options})


def _model_cases():
    """Dense cases with the heads of the 1.8B and 7B models, with 6 queries for each key head, and with d = 64; packed cases
    with equal, uneven and skewed lengths.
    """
    low, high = (torch.bfloat16,), (torch.float32,)
    for heads, kv_heads, head_dim in ((16, 8, 128), (32, 8, 128), (12, 2, 128), (32, 8, 64)):
        for length in (2048, 4096):
            dims = _dense("model", 1, length, length, heads, kv_heads, head_dim, causal=True).dims
            yield Case("model", dims, dtypes=low)
    yield Case("model", _dense("model", 1, 2048, 2048, 16, 8, 128, causal=True).dims, ("forward",), high)
    yield Case("model", _dense("model", 1, 4096, 4096, 32, 8, 64, causal=True).dims, ("forward",), high)
    yield Case("model", _dense("model", 1, 16384, 16384, 16, 8, 128, causal=True).dims, ("forward",), low)
    for lengths in ((512,) * 8, (256,) * 16, (64,) * 64, (256, 2816, 512, 1024, 384, 768, 1536, 896), (8192, *(64,) * 7)):
        yield Case("model", _packed("model", lengths, 16, 8, 128, causal=True).dims, dtypes=low)
    for heads, head_dim, length in ((32, 128, 8192), (32, 128, 32768), (16, 128, 16384), (48, 128, 16384), (32, 64, 16384)):
        yield _dense("gpu", 1, length, length, heads, 8, head_dim, causal=True)
    yield _dense("gpu", 1, 131072, 131072, 32, 8, 128, causal=True)
    yield _packed("gpu", (4096,) * 8, 32, 8, 128, causal=True)
    yield _packed("gpu", (256, 9216, 2048, 512, 12288, 1024, 1536, 5888), 32, 8, 128, causal=True)


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        _dense("smoke", 3, 17, 17, 4, 2, 64, causal=True),
        _dense("smoke", 4, 19, 23, 4, 2, 64),
        _dense("smoke", 2, 9, 33, 6, 1, 32, causal=True, return_lse=True),
        _dense("smoke", 2, 37, 20, 2, 2, 40, window=(7, 3), softcap=5.0),
        _packed("smoke", (5, 0, 33, 1), 4, 2, 64, causal=True, return_lse=True),
        _dense("edge", 1, 1, 1, 1, 1, 32, causal=True),
        _dense("edge", 0, 5, 5, 2, 1, 32),
        _dense("edge", 1, 0, 5, 2, 1, 32),
        _dense("edge", 1, 5, 0, 2, 1, 32, return_lse=True),
        _dense("edge", 2, 65, 131, 3, 1, 96, window=(20, -1)),
        _dense("edge", 1, 70, 70, 2, 1, 256, causal=True, scale=0.3),
        _dense("edge", 1, 5, 7, 2, 1, 32, causal=True, return_lse=True),
        _packed("edge", (3, 4), 2, 1, 32, window=(1, 0), softcap=2.0),
        Case("edge", {"lengths": (4, 0, 7), "key_lengths": (2, 3, 40), "heads": 2, "kv_heads": 2, "head_dim": 56,
                      "causal": True, "return_lse": True}),
        *_model_cases(),
    ),
    eager={"SDPA enable_gqa": _eager(True), "SDPA expanded keys": _eager(False)},
    batched=("q", "k", "v"),
    bytes=_bytes,
    flops=_flops,
    magnitude=_magnitude,
    rowwise=False,
    domain={"batch": (0, 2, 1), "queries": (0, 70, 1), "keys": (0, 70, 1), "head_dim": (32, 136, 8)},
)
