"""PPO's clipped policy loss with the statistics that a trainer logs."""

import torch

from .._autograd import distinct, once_differentiable
from .._checks import check_float
from .._registry import Case, Op, Sample
from ._losses import accumulator, check_mask, check_number, check_vector, flattened, masked_mean, target

LOG_RATIO = 20.0  # beyond, exp would say nothing but how far


def _terms(logprobs, old_logprobs, advantages, mask, clip):
    acc = accumulator(logprobs.dtype)
    x = (logprobs.to(acc) - old_logprobs.to(acc)).masked_fill(~mask, 0).clamp(-LOG_RATIO, LOG_RATIO)
    advantages = advantages.to(acc).masked_fill(~mask, 0)
    return x, x.exp() * advantages, x.exp().clamp(1 - clip, 1 + clip) * advantages


def reference(logprobs, old_logprobs, advantages, mask, *, clip=0.2):
    x, free, clipped = _terms(logprobs, old_logprobs, advantages, mask, clip)
    loss = -masked_mean(torch.where(clipped < free, clipped, free), mask)
    with torch.no_grad():
        return loss, masked_mean((clipped < free).to(x.dtype), mask), masked_mean(torch.expm1(x) - x, mask)


def _eager(logprobs, old_logprobs, advantages, mask, *, clip=0.2):
    x, free, clipped = _terms(logprobs, old_logprobs, advantages, mask, clip)
    loss = -masked_mean(torch.minimum(free, clipped), mask)
    with torch.no_grad():
        return loss, masked_mean((clipped < free).to(x.dtype), mask), masked_mean(x.exp() - 1 - x, mask)


def _fake_fwd(logprobs, old_logprobs, advantages, mask, clip):
    return tuple(logprobs.new_empty((), dtype=accumulator(logprobs.dtype)) for _ in range(4))


def draw_mask(case, device, generator):
    share = case.dims.get("counted", 0.7)
    return torch.rand(case.dims["targets"], generator=generator, device=device) < share


def _sample(case, dtype, device, generator):
    draw = lambda size: size * torch.randn(case.dims["targets"], generator=generator, device=device)
    logprobs = draw(1) - 2
    inputs = {"logprobs": logprobs.to(dtype), "old_logprobs": (logprobs + draw(0.3)).to(dtype), "advantages": draw(1).to(dtype)}
    options = {"clip": case.dims["clip"]} if "clip" in case.dims else {}
    return Sample({**inputs, "mask": draw_mask(case, device, generator), **options}, ("logprobs",))


def _magnitude(sample, upstream):
    """The loss is a mean of terms of both signs."""
    advantages = sample.inputs["advantages"]
    size = float(advantages.abs().max()) * 4 if advantages.numel() else 1.0
    return {"loss": size, "approx_kl": 1.0, "clip_fraction": 1.0}


PPO_POLICY_LOSS = Op(
    name="ppo_policy_loss",
    source="arXiv:1707.06347 eq. 7",
    summary="PPO's clipped policy loss with clip fraction and approximate KL",
    reference=reference,
    public=lambda *args, **kwargs: _flat(ppo_policy_loss(*args, **kwargs)),
    schemas={
        "fwd": "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, float clip)"
               " -> (Tensor loss, Tensor clip_fraction, Tensor approx_kl, Tensor count)",
        "bwd": "(Tensor dloss, Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor count, float clip)"
               " -> Tensor",
    },
    fakes={"fwd": _fake_fwd, "bwd": lambda dloss, logprobs, *rest: logprobs.new_empty(logprobs.shape)},
    outputs=("loss", "clip_fraction", "approx_kl"),
    sample=_sample,
    cases=(
        Case("smoke", {"targets": 37}),
        Case("smoke", {"targets": 1031, "clip": 0.1}),
        Case("edge", {"targets": 0}),
        Case("edge", {"targets": 1, "counted": 1.0}),
        Case("edge", {"targets": 65, "counted": 0.0}),
        Case("model", {"targets": 16384}),
    ),
    eager={"exp, clamp, minimum": _eager},
    batched=("logprobs", "old_logprobs", "advantages", "mask"),
    bytes=lambda dims, size, direction: dims["targets"] * ((3 if direction == "forward" else 4) * size + 1),
    flops=lambda dims, direction: 20 * dims["targets"],
    magnitude=_magnitude,
    rowwise=False,
    domain={"targets": (0, 300, 1)},
)
_FWD, _BWD = PPO_POLICY_LOSS.overloads["fwd"], PPO_POLICY_LOSS.overloads["bwd"]


def _flat(result):
    return result[0], *result[1].values()


class _PPOPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, old_logprobs, advantages, mask, clip, backend):
        loss, clip_fraction, approx_kl, count = _FWD[backend](logprobs, old_logprobs, advantages, mask, clip)
        ctx.save_for_backward(logprobs, old_logprobs, advantages, mask, count)
        ctx.clip, ctx.backend = clip, backend
        ctx.mark_non_differentiable(clip_fraction, approx_kl)
        ctx.set_materialize_grads(False)
        return loss, clip_fraction, approx_kl

    @staticmethod
    @once_differentiable("ppo_policy_loss")
    def backward(ctx, dloss, *_):
        if dloss is None:
            return None, None, None, None, None, None
        return _BWD[ctx.backend](dloss, *ctx.saved_tensors, ctx.clip), None, None, None, None, None


def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, *, clip=0.2, backend=None):
    """loss = -mean over the mask of min(r A, clamp(r, 1 - clip, 1 + clip) A), r = exp(clamp(logp - old_logp, -20, 20)).

    Shapes:   logprobs, old_logprobs, advantages, mask [...] -> loss [], stats: clip_fraction [] (of the tokens that count, how
              many take the clipped term), approx_kl [] (mean of r - 1 - log r)
    Dtypes:   float32 | bfloat16 | float16 | float64, all equal; mask bool, or numbers of which all but 0 count; computed in
              float32 (float64), in which loss and statistics are
    Backward: saves its inputs and the count. To logprobs only: advantages and old_logprobs are targets. No gradient where the
              clipped term is the smaller or the log-ratio beyond 20. What is masked may be NaN and has no influence; if nothing
              counts, loss and gradients are 0. Deterministic: yes
    Errors:   ValueError for a shape, a device or clip; TypeError for a dtype
    Cost:     one registered call each way, statistics included.   Source: arXiv:1707.06347 eq. 7
    """
    check_float("ppo_policy_loss", "logprobs", logprobs)
    others = [target(check_vector("ppo_policy_loss", name, tensor, logprobs.shape, logprobs, "logprobs"))
              for name, tensor in (("old_logprobs", old_logprobs), ("advantages", advantages))]
    mask = flattened(check_mask("ppo_policy_loss", mask, logprobs, "logprobs"))
    clip = check_number("ppo_policy_loss", "clip", clip, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    chosen = PPO_POLICY_LOSS.select(logprobs, backend)
    flat = flattened(logprobs)
    if chosen == "reference":
        loss, clip_fraction, approx_kl = reference(flat, *others, mask, clip=clip)
    elif torch.is_grad_enabled() and flat.requires_grad:
        loss, clip_fraction, approx_kl = _PPOPolicyLoss.apply(*distinct(flat, *others), mask, clip, chosen)
    else:
        loss, clip_fraction, approx_kl, _ = _FWD[chosen](flat, *others, mask, clip)
    return loss, {"clip_fraction": clip_fraction, "approx_kl": approx_kl}
