"""KL divergence estimators for each token. Contract: ops/kl_penalty.py. Elementwise: one kernel forward, one backward."""

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch_elements
from .functions import _expm1, _expm1_less_x

BLOCK = 1024


@triton.jit
def _log_ratio(logprobs_ptr, ref_ptr, mask_ptr, index, size):
    """(x, counts): counts is True for the tokens inside the mask, and x is logprobs - ref_logprobs there and 0 elsewhere."""
    known = index < size
    x = tl.load(logprobs_ptr + index, mask=known, other=0.0).to(tl.float32)
    x -= tl.load(ref_ptr + index, mask=known, other=0.0).to(tl.float32)
    counts = known
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + index, mask=known, other=0) != 0
        x = tl.where(counts, x, 0.0)
    return x, counts


@triton.jit
def kl_penalty_fwd_kernel(logprobs_ptr, ref_ptr, mask_ptr, kl_ptr, size, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x, _ = _log_ratio(logprobs_ptr, ref_ptr, mask_ptr, index, size)
    if ESTIMATOR == 1:
        kl = x
    elif ESTIMATOR == 2:
        kl = 0.5 * x * x
    else:
        kl = _expm1_less_x(0.0 - x)
    tl.store(kl_ptr + index, kl, mask=index < size)


@triton.jit
def kl_penalty_bwd_kernel(dkl_ptr, logprobs_ptr, ref_ptr, mask_ptr, dlogprobs_ptr, dref_ptr, size, ESTIMATOR: tl.constexpr,
                          BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    x, counts = _log_ratio(logprobs_ptr, ref_ptr, mask_ptr, index, size)
    d = tl.where(counts, tl.load(dkl_ptr + index, mask=mask, other=0.0), 0.0)
    if ESTIMATOR == 2:
        d = d * x
    elif ESTIMATOR == 3:
        d = d * -_expm1(0.0 - x)
    tl.store(dlogprobs_ptr + index, d.to(dlogprobs_ptr.dtype.element_ty), mask=mask)
    if dref_ptr is not None:
        tl.store(dref_ptr + index, (0.0 - d).to(dref_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, logprobs, ref_logprobs, mask, estimator, **tensors):
    check_dtype("kl_penalty", "logprobs", logprobs)
    check_dtype("kl_penalty", "ref_logprobs", ref_logprobs)
    mask = None if mask is None else mask.view(torch.int8)
    launch_elements(kernel, logprobs, BLOCK,
                    dict(logprobs_ptr=logprobs, ref_ptr=ref_logprobs, mask_ptr=mask, ESTIMATOR=estimator, **tensors))


def kl_penalty_fwd(logprobs, ref_logprobs, mask, estimator):
    kl = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
    _launch(kl_penalty_fwd_kernel, logprobs, ref_logprobs, mask, estimator, kl_ptr=kl)
    return kl


def kl_penalty_bwd(dkl, logprobs, ref_logprobs, mask, estimator, needs_ref):
    dlogprobs = torch.empty(logprobs.shape, dtype=logprobs.dtype, device=logprobs.device)
    dref = torch.empty(ref_logprobs.shape if needs_ref else (0,), dtype=ref_logprobs.dtype, device=logprobs.device)
    _launch(kl_penalty_bwd_kernel, logprobs, ref_logprobs, mask, estimator, dkl_ptr=dkl, dlogprobs_ptr=dlogprobs,
            dref_ptr=dref if needs_ref else None)
    return dlogprobs, dref
