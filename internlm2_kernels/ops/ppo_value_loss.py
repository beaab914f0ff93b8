"""PPO's value loss, clipped or not, with the statistics that a trainer logs."""

import torch

from .._autograd import distinct, once_differentiable
from .._checks import check_float
from .._registry import Case, Op, Sample
from ._losses import accumulator, check_mask, check_number, check_vector, flattened, masked_mean, target
from .ppo_policy_loss import draw_mask


def reference(values, old_values, returns, mask, *, clip=None):
    acc = accumulator(values.dtype)
    v, old, r = (t.to(acc).masked_fill(~mask, 0) for t in (values, old_values, returns))
    free = (v - r).square()
    # clamp of the difference, so that clipped equals free to the bit where nothing is clipped
    clipped = free if clip is None else torch.where((v - old).abs() <= clip, free,
                                                    (old + (v - old).clamp(-clip, clip) - r).square())
    loss = 0.5 * masked_mean(torch.where(clipped > free, clipped, free), mask)
    with torch.no_grad():
        spread = lambda x: masked_mean((x - masked_mean(x, mask)).square(), mask)
        variance = spread(r)
        explained = torch.where(variance > 0, 1 - spread(r - v) / torch.where(variance > 0, variance, 1), 0)
        return loss, masked_mean((clipped > free).to(acc), mask), explained


def _eager(values, old_values, returns, mask, *, clip=None):
    acc = accumulator(values.dtype)
    v, old, r = (t.to(acc) for t in (values, old_values, returns))
    free = (v - r).square()
    clipped = free if clip is None else (torch.clamp(v, old - clip, old + clip) - r).square()
    count = mask.sum().clamp(min=1)
    loss = 0.5 * (torch.maximum(free, clipped) * mask).sum() / count
    with torch.no_grad():
        fraction = ((clipped > free) & mask).sum() / count
        if not mask.any():
            return loss, fraction.to(acc), torch.zeros_like(loss)
        error, target = (r - v)[mask], r[mask]
        variance = target.var(correction=0)
        explained = torch.where(variance > 0, 1 - error.var(correction=0) / variance, 0)
        return loss, fraction.to(acc), explained


def _fake_fwd(values, old_values, returns, mask, clip):
    return tuple(values.new_empty((), dtype=accumulator(values.dtype)) for _ in range(4))


def _sample(case, dtype, device, generator):
    draw = lambda size: size * torch.randn(case.dims["targets"], generator=generator, device=device)
    values = draw(1)
    inputs = {"values": values.to(dtype), "old_values": (values + draw(0.3)).to(dtype), "returns": (values + draw(1)).to(dtype)}
    options = {"clip": case.dims["clip"]} if "clip" in case.dims else {}
    return Sample({**inputs, "mask": draw_mask(case, device, generator), **options}, ("values",))


PPO_VALUE_LOSS = Op(
    name="ppo_value_loss",
    source="arXiv:1707.06347 eq. 9; clipped form: arXiv:2005.12729 section 3",
    summary="PPO's value loss with explained variance and clip fraction",
    reference=reference,
    public=lambda *args, **kwargs: _flat(ppo_value_loss(*args, **kwargs)),
    schemas={
        "fwd": "(Tensor values, Tensor old_values, Tensor returns, Tensor mask, float clip)"
               " -> (Tensor loss, Tensor clip_fraction, Tensor explained_variance, Tensor count)",
        "bwd": "(Tensor dloss, Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor count, float clip)"
               " -> Tensor",
    },
    fakes={"fwd": _fake_fwd, "bwd": lambda dloss, values, *rest: values.new_empty(values.shape)},
    outputs=("loss", "clip_fraction", "explained_variance"),
    sample=_sample,
    cases=(
        Case("smoke", {"targets": 37}),
        Case("smoke", {"targets": 1031, "clip": 0.2}),
        Case("edge", {"targets": 0}),
        Case("edge", {"targets": 1, "counted": 1.0}),
        Case("edge", {"targets": 65, "counted": 0.0, "clip": 0.1}),
        Case("model", {"targets": 16384, "clip": 0.2}),
    ),
    eager={"square, clamp, maximum": _eager},
    batched=("values", "old_values", "returns", "mask"),
    bytes=lambda dims, size, direction: dims["targets"] * ((3 if direction == "forward" else 4) * size + 1),
    flops=lambda dims, direction: 15 * dims["targets"],
    magnitude=lambda sample, upstream: {"explained_variance": 4.0, "clip_fraction": 1.0, "loss": 1.0},
    rowwise=False,
    domain={"targets": (0, 300, 1)},
)
_FWD, _BWD = PPO_VALUE_LOSS.overloads["fwd"], PPO_VALUE_LOSS.overloads["bwd"]


def _flat(result):
    return result[0], *result[1].values()


class _PPOValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, old_values, returns, mask, clip, backend):
        loss, clip_fraction, explained, count = _FWD[backend](values, old_values, returns, mask, clip)
        ctx.save_for_backward(values, old_values, returns, mask, count)
        ctx.clip, ctx.backend = clip, backend
        ctx.mark_non_differentiable(clip_fraction, explained)
        ctx.set_materialize_grads(False)
        return loss, clip_fraction, explained

    @staticmethod
    @once_differentiable("ppo_value_loss")
    def backward(ctx, dloss, *_):
        if dloss is None:
            return None, None, None, None, None, None
        return _BWD[ctx.backend](dloss, *ctx.saved_tensors, ctx.clip), None, None, None, None, None


def ppo_value_loss(values, old_values, returns, mask, *, clip=None, backend=None):
    """loss = 0.5 mean over the mask of (v - R)^2; with clip c, of max((v - R)^2, (old + clamp(v - old, -c, c) - R)^2).

    Shapes:   values, old_values, returns, mask [...] -> loss [], stats: clip_fraction [] (of the tokens that count, how many
              take the clipped term), explained_variance [] (1 - Var(R - v) / Var(R) over the mask, 0 where Var(R) is 0)
    Dtypes:   float32 | bfloat16 | float16 | float64, all equal; mask bool, or numbers of which all but 0 count; computed in
              float32 (float64), in which loss and statistics are
    Backward: saves its inputs and the count. To values only: old_values and returns are targets. No gradient where the clipped
              term is the larger. What is masked may be NaN and has no influence; if nothing counts, loss and gradients are 0.
              Deterministic: yes
    Errors:   ValueError for a shape, a device or clip; TypeError for a dtype
    Cost:     one registered call each way, statistics included.   Source: arXiv:1707.06347 eq. 9, arXiv:2005.12729 section 3
    """
    check_float("ppo_value_loss", "values", values)
    others = [target(check_vector("ppo_value_loss", name, tensor, values.shape, values, "values"))
              for name, tensor in (("old_values", old_values), ("returns", returns))]
    mask = flattened(check_mask("ppo_value_loss", mask, values, "values"))
    if clip is not None:
        clip = check_number("ppo_value_loss", "clip", clip, "None or a finite number >= 0", lambda v: v >= 0)
    chosen = PPO_VALUE_LOSS.select(values, backend)
    flat, limit = flattened(values), -1.0 if clip is None else clip
    if chosen == "reference":
        loss, clip_fraction, explained = reference(flat, *others, mask, clip=clip)
    elif torch.is_grad_enabled() and flat.requires_grad:
        loss, clip_fraction, explained = _PPOValueLoss.apply(*distinct(flat, *others), mask, limit, chosen)
    else:
        loss, clip_fraction, explained, _ = _FWD[chosen](flat, *others, mask, limit)
    return loss, {"clip_fraction": clip_fraction, "explained_variance": explained}
