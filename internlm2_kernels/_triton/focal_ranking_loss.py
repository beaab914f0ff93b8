"""Focal ranking loss of pairs. Contract: ops/focal_ranking_loss.py. Elementwise: one kernel forward, one backward."""

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch_elements
from .functions import _exponential, _sigmoid, _softplus

BLOCK = 1024


@triton.jit
def _focal(d, gamma):
    """(loss, derivative of the loss) for the difference d = chosen - rejected."""
    s = _sigmoid(-d)
    nll = _softplus(-d)
    # (2 s)^gamma is exp(gamma log(2 s)), with 2 s <= 1. Below d = -87 s is 0, and the weight is 0 unless gamma is 0.
    weight = tl.where(gamma == 0.0, 1.0, _exponential(gamma * (0.6931471805599453 - _softplus(d))))
    ahead = d > 0.0
    loss = tl.where(ahead, weight * nll, nll)
    slope = tl.where(ahead, -weight * (s + gamma * (1.0 - s) * nll), -s)
    return loss, slope


@triton.jit
def focal_ranking_loss_fwd_kernel(chosen_ptr, rejected_ptr, loss_ptr, size, gamma, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    chosen = tl.load(chosen_ptr + index, mask=mask, other=0.0).to(tl.float32)
    rejected = tl.load(rejected_ptr + index, mask=mask, other=0.0).to(tl.float32)
    loss, _ = _focal(chosen - rejected, gamma)
    tl.store(loss_ptr + index, loss, mask=mask)


@triton.jit
def focal_ranking_loss_bwd_kernel(dloss_ptr, chosen_ptr, rejected_ptr, dchosen_ptr, drejected_ptr, size, gamma,
                                  BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    chosen = tl.load(chosen_ptr + index, mask=mask, other=0.0).to(tl.float32)
    rejected = tl.load(rejected_ptr + index, mask=mask, other=0.0).to(tl.float32)
    _, slope = _focal(chosen - rejected, gamma)
    d = tl.load(dloss_ptr + index, mask=mask, other=0.0) * slope
    tl.store(dchosen_ptr + index, d.to(dchosen_ptr.dtype.element_ty), mask=mask)
    tl.store(drejected_ptr + index, (-d).to(drejected_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, chosen, rejected, gamma, **tensors):
    check_dtype("focal_ranking_loss", "chosen", chosen)
    check_dtype("focal_ranking_loss", "rejected", rejected)
    launch_elements(kernel, chosen, BLOCK, dict(chosen_ptr=chosen, rejected_ptr=rejected, gamma=gamma, **tensors))


def focal_ranking_loss_fwd(chosen, rejected, gamma):
    loss = torch.empty(chosen.shape, dtype=torch.float32, device=chosen.device)
    _launch(focal_ranking_loss_fwd_kernel, chosen, rejected, gamma, loss_ptr=loss)
    return loss


def focal_ranking_loss_bwd(dloss, chosen, rejected, gamma):
    dchosen, drejected = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (chosen, rejected))
    _launch(focal_ranking_loss_bwd_kernel, chosen, rejected, gamma, dloss_ptr=dloss, dchosen_ptr=dchosen,
            drejected_ptr=drejected)
    return dchosen, drejected
