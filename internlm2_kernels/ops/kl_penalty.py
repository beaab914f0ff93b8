"""Estimators of the divergence between policy and reference, token by token."""

import torch

from .._autocast import promoted
from .._autograd import distinct, once_differentiable
from .._checks import check_choice, check_float, check_mask, check_vector
from .._registry import Op
from ._losses import accumulator, flattened

ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


def reference(logprobs, ref_logprobs, *, mask=None, estimator="k1"):
    acc = accumulator(logprobs.dtype)
    # The mask is applied to the inputs: applied to the results, it would give NaN gradients, 0 times an infinite derivative.
    if mask is not None:
        logprobs, ref_logprobs = logprobs.masked_fill(~mask, 0), ref_logprobs.masked_fill(~mask, 0)
    x = logprobs.to(acc) - ref_logprobs.to(acc)
    return x if estimator == "k1" else x.square() / 2 if estimator == "k2" else torch.expm1(-x) + x


KL_PENALTY = Op(
    name="kl_penalty",
    source="J. Schulman, Approximating KL divergence (2020), joschu.net/blog/kl-approx.html",
    summary="k1, k2, k3 estimators of the KL divergence, token by token",
    reference=reference,
    schemas={
        "fwd": "(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, int estimator) -> Tensor",
        "bwd": "(Tensor dkl, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, int estimator, bool needs_ref)"
               " -> (Tensor dlogprobs, Tensor dref)",
    },
    fakes={"fwd": lambda a, b, mask, estimator: a.new_empty(a.shape, dtype=accumulator(a.dtype)),
           "bwd": lambda dkl, a, b, mask, estimator, needs_ref: (a.new_empty(a.shape),
                                                                 a.new_empty(a.shape if needs_ref else (0,)))},
    outputs=("kl",),
)
_FWD, _BWD = KL_PENALTY.overloads["fwd"], KL_PENALTY.overloads["bwd"]


class _KLPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, mask, estimator, backend):
        ctx.save_for_backward(logprobs, ref_logprobs, mask)
        ctx.estimator, ctx.backend = estimator, backend
        return _FWD[backend](logprobs, ref_logprobs, mask, estimator)

    @staticmethod
    @once_differentiable("kl_penalty")
    def backward(ctx, dkl):
        needs_ref = ctx.needs_input_grad[1]
        dlogprobs, dref = _BWD[ctx.backend](dkl.contiguous(), *ctx.saved_tensors, ctx.estimator, needs_ref)
        return dlogprobs, dref if needs_ref else None, None, None, None


def kl_penalty(logprobs, ref_logprobs, *, mask=None, estimator="k1", backend=None):
    """With x = logprobs - ref_logprobs: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x.

    Shapes:   logprobs, ref_logprobs, mask [...] -> kl [...]. Masked tokens (mask False or 0) have kl 0 and gradient 0,
              whatever they and the upstream gradient hold: infinities and NaN have no influence
    Dtypes:   float32 | bfloat16 | float16 | float64, both equal; mask bool, or numbers of which all but 0 count; computed and
              returned in float32 (float64). k3 is infinite where exp(-x) overflows
    Backward: saves its inputs. The derivative by logprobs is 1 for k1, x for k2 and 1 - exp(-x) for k3; that by ref_logprobs
              is its negative. Deterministic: yes
    Errors:   ValueError for a shape, a device or estimator; TypeError for a dtype
    Cost:     one launch each way; the forward reads two tensors (and the mask) and writes one.
              Source: joschu.net/blog/kl-approx.html
    """
    logprobs, ref_logprobs = promoted(logprobs, ref_logprobs)
    check_float("kl_penalty", "logprobs", logprobs)
    other = check_vector("kl_penalty", "ref_logprobs", ref_logprobs, logprobs.shape, logprobs, "logprobs")
    mask = None if mask is None else check_mask("kl_penalty", mask, logprobs, "logprobs")
    check_choice("kl_penalty", "estimator", estimator, tuple(ESTIMATORS))
    chosen = KL_PENALTY.select(logprobs, backend)
    if chosen == "reference":
        return reference(logprobs, ref_logprobs, mask=mask, estimator=estimator)
    flat, other, code = flattened(logprobs), flattened(other), ESTIMATORS[estimator]
    mask = None if mask is None else flattened(mask)
    if torch.is_grad_enabled() and (flat.requires_grad or other.requires_grad):
        return _KLPenalty.apply(*distinct(flat, other), mask, code, chosen).view(logprobs.shape)
    return _FWD[chosen](flat, other, mask, code).view(logprobs.shape)
