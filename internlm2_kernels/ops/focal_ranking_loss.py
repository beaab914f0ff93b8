"""The focal ranking loss of a reward model, pair by pair."""

import math

import torch
import torch.nn.functional as F

from .._autocast import promoted
from .._autograd import once_differentiable
from .._checks import check_float, check_number, check_vector
from .._registry import Op
from ._losses import accumulator


def reference(chosen, rejected, *, gamma=2.0):
    acc = accumulator(chosen.dtype)
    d = chosen.to(acc) - rejected.to(acc)
    # At d = 0, where training starts if the head is initialised to zero, torch.where makes the derivative of the weight 0.
    # (2 sigmoid(-d))^gamma is computed from its logarithm, whose derivative stays finite where the sigmoid underflows.
    weight = torch.where(d > 0, torch.exp(gamma * (math.log(2) - F.softplus(d))), 1.0)
    return weight * F.softplus(-d)


FOCAL_RANKING_LOSS = Op(
    name="focal_ranking_loss",
    source="arXiv:2403.17297 section 4.2.1 eq. 1",
    summary="focal ranking loss of pairs of rewards",
    reference=reference,
    schemas={
        "fwd": "(Tensor chosen, Tensor rejected, float gamma) -> Tensor",
        "bwd": "(Tensor dloss, Tensor chosen, Tensor rejected, float gamma) -> (Tensor dchosen, Tensor drejected)",
    },
    fakes={"fwd": lambda chosen, rejected, gamma: chosen.new_empty(chosen.shape, dtype=accumulator(chosen.dtype)),
           "bwd": lambda dloss, chosen, rejected, gamma: (chosen.new_empty(chosen.shape), chosen.new_empty(chosen.shape))},
    outputs=("loss",),
)
_FWD, _BWD = FOCAL_RANKING_LOSS.overloads["fwd"], FOCAL_RANKING_LOSS.overloads["bwd"]


class _FocalRankingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, rejected, gamma, backend):
        ctx.save_for_backward(chosen, rejected)
        ctx.gamma, ctx.backend = gamma, backend
        return _FWD[backend](chosen, rejected, gamma)

    @staticmethod
    @once_differentiable("focal_ranking_loss")
    def backward(ctx, dloss):
        return *_BWD[ctx.backend](dloss.contiguous(), *ctx.saved_tensors, ctx.gamma), None, None


def check_gamma(op, gamma):
    return check_number(op, "gamma", gamma, "a number from 0 to 100", lambda v: 0 <= v <= 100)


def focal_ranking_loss(chosen, rejected, *, gamma=2.0, backend=None):
    """Focal ranking loss of pairs: loss = -(1 - 2 max(0, P - 1/2))^gamma log P, with P = sigmoid(d) and d = chosen - rejected.

    Shapes:   chosen, rejected [...] rewards -> loss [...]
    Dtypes:   float32 | bfloat16 | float16 | float64, both equal (under autocast they are promoted); computed and returned in
              float32 (float64). log P is computed as -softplus(-d), and the factor for P > 1/2 as (2 sigmoid(-d))^gamma, so
              that no digits cancel
    Backward: saves its inputs. The gradient includes the factor's: d loss / d d is -sigmoid(-d) for d <= 0, and
              -(2s)^gamma (s + gamma (1 - s) softplus(-d)) with s = sigmoid(-d) for d > 0. Deterministic: yes
    Errors:   ValueError for a wrong shape, device or gamma; TypeError for a wrong dtype
    Cost:     one launch each way.   Source: arXiv:2403.17297 section 4.2.1 eq. 1
    """
    chosen, rejected = promoted(chosen, rejected)
    check_float("focal_ranking_loss", "chosen", chosen)
    shape = chosen.shape
    flat_rejected = check_vector("focal_ranking_loss", "rejected", rejected, shape, chosen, "chosen").view(-1)
    gamma = check_gamma("focal_ranking_loss", gamma)
    backend = FOCAL_RANKING_LOSS.select(chosen, backend)
    if backend == "reference":
        return reference(chosen, rejected, gamma=gamma)
    flat = chosen.contiguous().view(-1)
    if torch.is_grad_enabled() and (flat.requires_grad or flat_rejected.requires_grad):
        return _FocalRankingLoss.apply(flat, flat_rejected, gamma, backend).view(shape)
    return _FWD[backend](flat, flat_rejected, gamma).view(shape)
