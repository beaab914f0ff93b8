"""Log-probabilities of given tokens under a linear head, and the head's entropy, without its logits in memory."""

import torch

from .._autocast import without_autocast
from .._autograd import distinct, once_differentiable
from .._checks import check_flag, check_labels, check_number, check_values, last_stride_1
from .._device_errors import Index
from .._native import native
from .._registry import Op
from ._head import as_matrix, check_head, gradient_shapes
from ._losses import accumulator


def _results(logprobs, entropy, hits, return_entropy, return_hits):
    wanted = (logprobs, *([entropy] if return_entropy else []), *([hits] if return_hits else []))
    return wanted if len(wanted) > 1 else logprobs


@without_autocast
def reference(hidden, weight, tokens, *, temperature=1.0, return_entropy=False, return_hits=False):
    acc = accumulator(hidden.dtype)
    logits = hidden.to(acc) @ weight.to(acc).T / temperature
    logp = torch.log_softmax(logits, -1)
    logprobs = logp.gather(-1, tokens.long()[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1) if return_entropy else None
    hits = (logits.argmax(-1) == tokens) & ~logp.isnan().any(-1) if return_hits else None
    return _results(logprobs, entropy, hits, return_entropy, return_hits)


def _fake_fwd(hidden, weight, tokens, inv_temperature, softcap, vocab_start, vocab_size, needs_entropy, needs_sum, needs_hits):
    acc = accumulator(hidden.dtype)
    each = lambda wanted=True, dtype=acc: hidden.new_empty((tokens.shape[0] if wanted else 0,), dtype=dtype)
    lse = hidden.new_empty((*tokens.shape, 2), dtype=acc)  # maximum, log of sum exp(l - maximum)
    return each(), lse, each(needs_entropy), each(needs_hits, torch.bool), each(needs_sum)


def _fake_bwd(dlogprobs, dentropy, dlse, dsum, hidden, weight, tokens, lse, entropy, inv_temperature, softcap, vocab_start,
              vocab_size, needs_dhidden, needs_dweight):
    shape_h, shape_w = gradient_shapes(hidden, weight, needs_dhidden, needs_dweight)
    return hidden.new_empty(shape_h), weight.new_empty(shape_w)


LINEAR_LOGPROBS = Op(
    name="linear_logprobs",
    source="log softmax of a linear head at one token: arXiv:2411.09009 section 4",
    summary="log-probabilities and entropy under a linear head, logits never in memory",
    reference=reference,
    schemas={
        "fwd": "(Tensor hidden, Tensor weight, Tensor tokens, float inv_temperature, float softcap, int vocab_start,"
               " int vocab_size, bool needs_entropy, bool needs_sum, bool needs_hits)"
               " -> (Tensor logprobs, Tensor lse, Tensor entropy, Tensor hits, Tensor sum)",
        "bwd": "(Tensor? dlogprobs, Tensor? dentropy, Tensor? dlse, Tensor? dsum, Tensor hidden, Tensor weight, Tensor tokens,"
               " Tensor lse, Tensor? entropy, float inv_temperature, float softcap, int vocab_start, int vocab_size,"
               " bool needs_dhidden, bool needs_dweight) -> (Tensor dhidden, Tensor dweight)",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    outputs=("logprobs", "entropy"),
    autocast=True,
    isas=("avx2", "avx512", "avx512_bf16", "amx"),
    indices={"tokens": Index(1 << 10, "values from 0 to V - 1", "the results of those tokens are NaN")},
)
FWD, BWD = LINEAR_LOGPROBS.overloads["fwd"], LINEAR_LOGPROBS.overloads["bwd"]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, inv_temperature, needs_entropy, needs_hits, backend):
        ctx.options = inv_temperature, 0.0, 0, weight.shape[0]
        logprobs, lse, entropy, hits, _ = native(FWD[backend], hidden, weight, tokens, *ctx.options, needs_entropy, False,
                                                 needs_hits)
        ctx.save_for_backward(hidden, weight, tokens, lse, entropy if needs_entropy else None)
        ctx.backend = backend
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, hits

    @staticmethod
    @once_differentiable("linear_logprobs")
    def backward(ctx, dlogprobs, dentropy, _):
        hidden, weight, tokens, lse, entropy = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if dlogprobs is None and dentropy is None:
            return (None,) * 7
        dlogprobs, dentropy = (None if d is None else d.contiguous() for d in (dlogprobs, dentropy))
        dhidden, dweight = BWD[ctx.backend](dlogprobs, dentropy if entropy is not None else None, None, None, hidden, weight,
                                            tokens, lse, entropy, *ctx.options, needs[0], needs[1])
        return dhidden if needs[0] else None, dweight if needs[1] else None, *[None] * 5


def linear_logprobs(hidden, weight, tokens, *, temperature=1.0, return_entropy=False, return_hits=False, backend=None):
    """log p_t(token_t) with p_t = softmax(hidden_t weight^T / temperature), and the entropy -sum_j p_tj log p_tj on request.

    Shapes:   hidden [..., D], weight [V, D], tokens [...] int64 or int32 -> logprobs [...]. return_entropy adds entropy [...],
              in nats; return_hits adds hits [...] bool, last: whether the token is the arg-max, of equal logits the first.
              hits is False where logits are NaN, and has no gradient
    Dtypes:   hidden and weight float32 | bfloat16 | float16 | float64, both equal; autocast casts them. All sums and results
              are float32 (float64)
    Backward: saves hidden, weight, tokens, lse and entropy (12 bytes a token) and recomputes the logits: four products in all.
              dweight is summed in float32, 4 V D bytes. A frozen hidden or weight costs no product. Deterministic: yes; the
              forward is batch-invariant
    Errors:   ValueError and TypeError. On CUDA the results of a token outside [0, V) are NaN, and `check()` reports it
    Cost:     2 T D V flops for each product. Scratch: one chunk of scores, independent of T.
              Source: arXiv:2411.09009 section 4
    """
    hidden, weight = check_head("linear_logprobs", hidden, weight)
    shape = hidden.shape[:-1]
    tokens = check_labels("linear_logprobs", "tokens", tokens, shape, hidden, "hidden")
    temperature = check_number("linear_logprobs", "temperature", temperature, "a number from 1e-6 to 1e6",
                               lambda v: 1e-6 <= v <= 1e6)
    check_flag("linear_logprobs", "return_entropy", return_entropy)
    check_flag("linear_logprobs", "return_hits", return_hits)
    chosen = LINEAR_LOGPROBS.select(hidden, backend)
    if chosen == "reference":
        check_values("linear_logprobs", "tokens", tokens, 0, weight.shape[0])
        return reference(hidden, weight, tokens, temperature=temperature, return_entropy=return_entropy,
                         return_hits=return_hits)
    flat, weight, tokens = as_matrix(hidden), last_stride_1(weight), tokens.view(-1)
    wanted = return_entropy, return_hits
    if torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad):
        logprobs, entropy, hits = _LinearLogprobs.apply(*distinct(flat, weight), tokens, 1 / temperature, *wanted, chosen)
    else:
        logprobs, _, entropy, hits, _ = native(FWD[chosen], flat, weight, tokens, 1 / temperature, 0.0, 0, weight.shape[0],
                                               wanted[0], False, wanted[1])
    return _results(logprobs.view(shape), entropy.view(shape) if return_entropy else None,
                    hits.view(shape) if return_hits else None, *wanted)
