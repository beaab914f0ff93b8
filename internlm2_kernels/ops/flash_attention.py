"""Grouped-query attention without the matrix of scores, on dense and packed sequences, forward and backward."""

import torch

from .._autocast import autocast
from .._autograd import distinct, once_differentiable
from .._checks import (
    check_boundaries,
    check_cu_seqlens,
    check_flag,
    check_float,
    check_longest,
    check_same,
    fail,
    last_stride_1,
)
from .._device_errors import Index
from .._native import native
from .._registry import Op
from ._attention import SHAPES, attend, check_bound, check_heads, check_options


def sequences_of(q, k, v, cu_q, cu_k):
    """(q [S_q, H, d], k [S_k, G, d], v [S_k, G, d]) of every sequence."""
    if cu_q is None:
        return list(zip(q, k, v, strict=True))
    split = lambda t, cu: t.split((cu[1:] - cu[:-1]).tolist())
    return list(zip(split(q, cu_q), split(k, cu_k), split(v, cu_k), strict=True))


def on_sequences(one, q, k, v, cu_q, cu_k, return_lse):
    """Calls the function `one(q, k, v)` -> (out, lse) for every sequence, and joins the results to those of the operator."""
    results = [one(*sequence) for sequence in sequences_of(q, k, v, cu_q, cu_k)]
    if not results:
        out, lse = q * 1, q[..., 0].transpose(-1, -2).float()
    elif cu_q is None:
        out, lse = (torch.stack(part) for part in zip(*results, strict=True))
    else:
        out, lse = torch.cat([o for o, _ in results]), torch.cat([x for _, x in results], 1)
    return (out, lse) if return_lse else out


def reference(q, k, v, *, causal=False, scale=None, window=None, softcap=0.0, cu_seqlens_q=None, cu_seqlens_k=None,
              max_seqlen_q=None, max_seqlen_k=None, return_lse=False):
    scale, left, right, softcap = check_options("flash_attention", q.shape[-1], scale, window, softcap)
    wide = torch.promote_types(q.dtype, torch.float32)

    def one(*sequence):
        out, lse = attend(*(t.to(wide) for t in sequence), left, 0 if causal else right, scale, softcap)
        return out.to(q.dtype), lse

    return on_sequences(one, q, k, v, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, return_lse)


def _fake_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left, window_right, scale, softcap):
    lse = q.shape[:-3] + (q.shape[-2], q.shape[-3])
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_bwd(dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left,
              window_right, scale, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


FLASH_ATTENTION = Op(
    name="flash_attention",
    source="arXiv:2205.14135 algorithm 1, arXiv:2307.08691 (FlashAttention-2)",
    summary="grouped-query attention, dense and packed, without the matrix of scores",
    reference=reference,
    schemas={
        "fwd": "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q,"
               " int max_seqlen_k, int window_left, int window_right, float scale, float softcap)"
               " -> (Tensor out, Tensor lse)",
        "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, Tensor? cu_seqlens_q,"
               " Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, int window_left, int window_right, float scale,"
               " float softcap) -> (Tensor dq, Tensor dk, Tensor dv)",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    outputs=("out", "lse"),
    autocast=True,
    isas=("avx2", "avx512", "avx512_bf16", "amx"),
    indices={f"cu_seqlens_{x}": Index(bit, f"values that start at 0, never fall and end at the tokens of {x}",
                                      "all results of the call are NaN") for x, bit in (("q", 1 << 3), ("k", 1 << 4))},
)
_FWD, _BWD = FLASH_ATTENTION.overloads["fwd"], FLASH_ATTENTION.overloads["bwd"]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, options, backend):
        cu_k = cu_q if cu_k is None else cu_k
        out, lse = native(_FWD[backend], q, k, v, cu_q, cu_k, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable("flash_attention")
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return None, None, None, None, None, None, None
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else last_stride_1(dout)
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv = _BWD[ctx.backend](dout, q, k, v, out, lse, dlse, cu_q, cu_k, *ctx.options)
        return dq, dk, dv, None, None, None, None


def _check_layout(q, k, v, cu_q, cu_k):
    """Checks that q, k and v are packed if there are cu_seqlens, and dense otherwise. Returns (cu_seqlens_q, cu_seqlens_k)."""
    if cu_q is None:
        if cu_k is not None:
            fail(ValueError, "flash_attention", "cu_seqlens_k", "None where cu_seqlens_q is None", "a tensor")
        layout, shape = "dense (no cu_seqlens_q)", "[B, S, heads, head_dim]"
    else:
        given, cu_q = cu_q, check_cu_seqlens("flash_attention", "cu_seqlens_q", cu_q, q, "q")
        cu_k = cu_q if cu_k is None or cu_k is given else check_cu_seqlens("flash_attention", "cu_seqlens_k", cu_k, q, "q")
        if cu_k.shape != cu_q.shape:
            fail(ValueError, "flash_attention", "cu_seqlens_k", f"as many entries as cu_seqlens_q, {cu_q.shape[0]}",
                 cu_k.shape[0])
        layout, shape = "packed (with cu_seqlens_q)", "[T, heads, head_dim]"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != (4 if cu_q is None else 3):
            fail(ValueError, "flash_attention", name, f"{layout}: {shape}", list(tensor.shape))
    if v.shape != k.shape:
        fail(ValueError, "flash_attention", "v", f"the shape of k, {list(k.shape)}", list(v.shape))
    if cu_q is None and q.shape[0] != k.shape[0]:
        fail(ValueError, "flash_attention", "k", f"the batch size of q, {q.shape[0]}", k.shape[0])
    return cu_q, cu_k


def flash_attention(q, k, v, *, causal=False, scale=None, window=None, softcap=0.0, cu_seqlens_q=None, cu_seqlens_k=None,
                    max_seqlen_q=None, max_seqlen_k=None, return_lse=False, backend=None):
    """Attention: out_i = sum_j p_ij v_j, where p_i is the softmax of s_ij = scale q_i . k_j over the unmasked keys j.

    Shapes:   dense: q [B, S_q, H, d], k and v [B, S_k, G, d] -> out like q, lse [B, H, S_q].
              packed: q [T_q, H, d], k and v [T_k, G, d], cu_seqlens_q and cu_seqlens_k int32 [sequences + 1] (by default
              equal) -> out like q, lse [H, T_q]. H is a multiple of G, and query head h uses key head h // (H / G). d is a
              multiple of 8 from 32 to 256. Only the last stride must be 1: slices of a packed projection are not copied
    Mask:     query i of a sequence is at position i + S_k - S_q. causal masks the keys after it; window=(left, right) masks
              the keys before position - left and after position + right, where -1 is no limit. A fully masked row has out 0,
              lse -inf and dq 0, and adds nothing to dk and dv, even if it holds NaN
    Options:  scale (default d^-0.5). softcap c > 0 replaces s by c tanh(s / c). return_lse also returns
              lse_i = log sum_j exp(s_ij), in float32 and differentiable. max_seqlen_q and max_seqlen_k help to choose tiles
    Dtypes:   float32 | bfloat16 | float16 | float64, all equal; autocast casts the inputs. Scores, softmax and sums are in
              float32 (float64 for float64); out and each gradient are rounded once. Triton multiplies the probabilities in the
              inputs' dtype; cpp does so in float32, or in bfloat16 on processors with bfloat16 products
    NaN:      NaN or infinity in k or v stays in its sequence and group of heads, but it can pass the mask, because masked
              values are multiplied by 0: from v into out and all gradients, from k into the gradients
    Backward: saves q, k, v, out and lse (4 bytes for each query and head) and recomputes the scores. triton needs 16 H bytes a
              token of scratch, cpp 4 H d for dq in float32. A second derivative, functorch and forward mode need
              backend="reference". Deterministic: yes; the forward is batch-invariant
    Errors:   ValueError and TypeError. On CUDA wrong cu_seqlens make all results of the call NaN, and `check()` reports them
    Cost:     4 d H flops for each pair of query and unmasked key forward, 10 d H backward (14 with triton).
              Source: arXiv:2205.14135, arXiv:2307.08691
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float("flash_attention", name, tensor)
    q, k, v = autocast(q, k, v)
    check_same("flash_attention", "k", k, q, "q")
    check_same("flash_attention", "v", v, q, "q")
    check_flag("flash_attention", "causal", causal)
    check_flag("flash_attention", "return_lse", return_lse)
    cu_q, cu_k = _check_layout(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_heads("flash_attention", q, k, "k")
    scale, left, right, softcap = check_options("flash_attention", q.shape[-1], scale, window, softcap)
    right = 0 if causal else right
    max_q = check_bound("flash_attention", "max_seqlen_q", max_seqlen_q)
    max_k = check_bound("flash_attention", "max_seqlen_k", max_seqlen_k)
    if cu_q is None and q.shape[0]:
        check_longest("flash_attention", "max_seqlen_q", max_q, q.shape[1])
        check_longest("flash_attention", "max_seqlen_k", max_k, k.shape[1])
    chosen = FLASH_ATTENTION.select(q, backend)
    if q.device.type == "meta":
        chosen = SHAPES
    elif chosen == "reference":
        if cu_q is not None:
            check_boundaries("flash_attention", "cu_seqlens_q", cu_q, q.shape[0], longest=max_q)
            check_boundaries("flash_attention", "cu_seqlens_k", cu_k, k.shape[0], longest=max_k)
        return reference(q, k, v, scale=scale, window=(left, right), softcap=softcap, cu_seqlens_q=cu_q,
                         cu_seqlens_k=cu_k, return_lse=return_lse)
    q, k, v = last_stride_1(q), last_stride_1(k), last_stride_1(v)
    options = max_q, max_k, left, right, scale, softcap
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # A compiled graph refuses an input that occurs twice, so cu_k is None where it is cu_q itself.
        out, lse = _FlashAttention.apply(*distinct(q, k, v), cu_q, None if cu_k is cu_q else cu_k, options, chosen)
    else:
        out, lse = native(_FWD[chosen], q, k, v, cu_q, cu_k, *options)
    return (out, lse) if return_lse else out
