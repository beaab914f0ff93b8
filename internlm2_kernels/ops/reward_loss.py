"""The reward model's loss from hidden states: head, focal ranking loss and log barrier in one call."""

import torch

from .._autograd import once_differentiable
from .._checks import check_device, check_float, check_same, fail, last_stride_1
from .._registry import Case, Op, Sample, without_autocast
from . import focal_ranking_loss as focal
from . import log_barrier_penalty as barrier
from ._attention import check_cu_seqlens
from ._losses import accumulator, check_lengths, check_number, flattened
from .apply_rope import native

MARGIN = 1e-3


def _loss_of(rewards, gamma, penalty_weight, bound, ranking, penalty):
    if not rewards.numel():
        return rewards.sum()
    return (ranking(rewards[0::2], rewards[1::2], gamma=gamma).mean()
            + penalty_weight * penalty(rewards, bound=bound, margin=MARGIN).mean())


def _form(ranking, penalty):
    def from_last(last_hidden, head_weight, *, gamma=2.0, penalty_weight=0.02, bound=5.0):
        acc = accumulator(last_hidden.dtype)
        rewards = last_hidden.to(acc) @ head_weight.to(acc)
        return _loss_of(rewards, gamma, penalty_weight, bound, ranking, penalty), rewards

    def packed(hidden, head_weight, cu_seqlens, **options):
        return from_last(hidden[cu_seqlens[1:].long() - 1], head_weight, **options)

    return packed, from_last


reference, reference_from_last = map(without_autocast, _form(focal.reference, barrier.reference))
_eager, _eager_from_last = _form(focal._eager, barrier._eager)


def _fake_fwd(hidden, head_weight, cu_seqlens, gamma, penalty_weight, bound, margin):
    return _fake_fwd_from_last(hidden.new_empty((cu_seqlens.shape[0] - 1, hidden.shape[1])), head_weight)


def _fake_fwd_from_last(last_hidden, head_weight, *options):
    acc = accumulator(last_hidden.dtype)
    each = lambda: last_hidden.new_empty((last_hidden.shape[0],), dtype=acc)
    return last_hidden.new_empty((), dtype=acc), each(), each()


def _fake_bwd(dloss, drewards, hidden, head_weight, cu_seqlens, slopes, needs_dhidden, needs_dweight):
    return _fake_bwd_from_last(dloss, drewards, hidden, head_weight, slopes, needs_dhidden, needs_dweight)


def _fake_bwd_from_last(dloss, drewards, hidden, head_weight, slopes, needs_dhidden, needs_dweight):
    return (hidden.new_empty((hidden.shape[0] if needs_dhidden else 0, hidden.shape[1])),
            head_weight.new_empty((head_weight.shape[0] if needs_dweight else 0,)))


def _sample(packed):
    def sample(case, dtype, device, generator):
        pairs, cols = case.dims["pairs"], case.dims["cols"]
        lengths = torch.randint(1, 2 * case.dims.get("length", 1), (2 * pairs,), generator=generator, device=device)
        cu = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        hidden = draw(int(cu[-1]) if packed else 2 * pairs, cols).to(dtype)
        head_weight = (case.dims.get("spread", 1) * draw(cols) * cols**-0.5).to(dtype)
        options = {"gamma": case.dims["gamma"]} if "gamma" in case.dims else {}
        inputs = {"hidden" if packed else "last_hidden": hidden, "head_weight": head_weight}
        return Sample(inputs | ({"cu_seqlens": cu} if packed else {}) | options, tuple(inputs))

    return sample


def _magnitude(sample, upstream):
    """Rewards are sums over D with terms of both signs, whose errors the losses' curvatures multiply: the barrier's is large
    near the bound."""
    hidden = next(iter(sample.inputs.values()))
    weight, cu = sample.inputs["head_weight"], sample.inputs.get("cu_seqlens")
    if not hidden.numel():
        return {}
    last = hidden if cu is None else hidden[cu[1:].long() - 1]
    size, typical = float((last.abs() @ weight.abs()).max()), float((last.square() @ weight.square()).max().sqrt())
    near = float((5 - (last @ weight).abs().clamp(max=5 * (1 - MARGIN))).min())
    sizes = {"rewards": size, "loss": size * (1 + 0.02 / near)}
    if upstream:
        slope = 1 / len(last) * (1 + 0.02 / near + typical * (0.5 + 0.02 / near**2))
        each = float(upstream["loss"].abs()) * slope + float(upstream["rewards"].abs().max())
        sizes |= {"d_hidden": each * float(weight.abs().max()), "d_last_hidden": each * float(weight.abs().max()),
                  "d_head_weight": each * float(last.square().sum(0).sqrt().max())}
    return sizes


def _bytes(dims, size, direction):
    return 2 * dims["pairs"] * dims["cols"] * size * (1 if direction == "forward" else 2) + dims["cols"] * size


_OPTIONS = "float gamma, float penalty_weight, float bound, float margin"
_SOURCE = "arXiv:2403.17297 section 4.2.1 eq. 1 to 3"
_SHARED = dict(outputs=("loss", "rewards"), bytes=_bytes, magnitude=_magnitude, rowwise=False, source=_SOURCE,
               flops=lambda dims, direction: (4 if direction == "forward" else 8) * dims["pairs"] * dims["cols"])

REWARD_LOSS = Op(
    name="reward_loss",
    summary="reward head, focal ranking loss and log barrier from packed hidden states",
    reference=reference,
    public=lambda *args, **kwargs: reward_loss(*args, **kwargs),
    schemas={
        "fwd": f"(Tensor hidden, Tensor head_weight, Tensor cu_seqlens, {_OPTIONS})"
               " -> (Tensor loss, Tensor rewards, Tensor slopes)",
        "bwd": "(Tensor? dloss, Tensor? drewards, Tensor hidden, Tensor head_weight, Tensor cu_seqlens, Tensor slopes,"
               " bool needs_dhidden, bool needs_dweight) -> (Tensor dhidden, Tensor dhead_weight)",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    sample=_sample(True),
    cases=(
        Case("smoke", {"pairs": 3, "cols": 64, "length": 5}),
        Case("smoke", {"pairs": 20, "cols": 129, "length": 3, "gamma": 1.0}),
        Case("edge", {"pairs": 0, "cols": 16, "length": 1}),
        Case("edge", {"pairs": 1, "cols": 1, "length": 1}),
        Case("edge", {"pairs": 70, "cols": 33, "length": 2, "spread": 10}),
        Case("model", {"pairs": 64, "cols": 2048, "length": 128}),
    ),
    eager={"gather, matmul, losses": _eager},
    batched=("hidden",),
    domain={"pairs": (0, 40, 1), "length": (1, 6, 1)},
    **_SHARED,
)
REWARD_LOSS_FROM_LAST = Op(
    name="reward_loss_from_last",
    summary="reward head, focal ranking loss and log barrier from the last hidden states",
    reference=reference_from_last,
    public=lambda *args, **kwargs: reward_loss_from_last(*args, **kwargs),
    schemas={
        "fwd": f"(Tensor last_hidden, Tensor head_weight, {_OPTIONS}) -> (Tensor loss, Tensor rewards, Tensor slopes)",
        "bwd": "(Tensor? dloss, Tensor? drewards, Tensor last_hidden, Tensor head_weight, Tensor slopes, bool needs_dhidden,"
               " bool needs_dweight) -> (Tensor dlast_hidden, Tensor dhead_weight)",
    },
    fakes={"fwd": _fake_fwd_from_last, "bwd": _fake_bwd_from_last},
    sample=_sample(False),
    cases=(
        Case("smoke", {"pairs": 3, "cols": 64}),
        Case("smoke", {"pairs": 20, "cols": 129, "gamma": 1.0}),
        Case("edge", {"pairs": 0, "cols": 16}),
        Case("edge", {"pairs": 1, "cols": 1}),
        Case("edge", {"pairs": 70, "cols": 33, "spread": 10}),
        Case("model", {"pairs": 64, "cols": 2048}),
    ),
    eager={"matmul, losses": _eager_from_last},
    batched=("last_hidden",),
    domain={"pairs": (0, 40, 1)},
    **_SHARED,
)
_FWD, _BWD = REWARD_LOSS.overloads["fwd"], REWARD_LOSS.overloads["bwd"]
_FWD_LAST, _BWD_LAST = REWARD_LOSS_FROM_LAST.overloads["fwd"], REWARD_LOSS_FROM_LAST.overloads["bwd"]


def _gradients(ctx, dloss, drewards):
    hidden, head_weight, slopes, *where = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if dloss is None and drewards is None:
        return None, None, None, None, None
    drewards = None if drewards is None else drewards.contiguous()
    dhidden, dweight = (_BWD if where else _BWD_LAST)[ctx.backend](dloss, drewards, hidden, head_weight, *where, slopes,
                                                                  needs[0], needs[1])
    return dhidden if needs[0] else None, dweight if needs[1] else None, None, None, None


class _RewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, cu, options, backend):
        where = () if cu is None else (cu,)
        loss, rewards, slopes = native((_FWD_LAST if cu is None else _FWD)[backend], hidden, head_weight, *where, *options)
        ctx.save_for_backward(hidden, head_weight, slopes, *where)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return loss, rewards

    backward = staticmethod(once_differentiable("reward_loss")(_gradients))


class _RewardLossFromLast(_RewardLoss):
    backward = staticmethod(once_differentiable("reward_loss_from_last")(_gradients))


def _check(op, name, hidden, head_weight, gamma, penalty_weight, bound):
    check_float(op, name, hidden)
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        fail(ValueError, op, name, "shape [rows, D]", list(hidden.shape))
    check_float(op, "head_weight", head_weight)
    if head_weight.dtype != torch.float32 or hidden.dtype == torch.float64:
        check_same(op, "head_weight", head_weight, hidden, name)
    check_device(op, "head_weight", head_weight, hidden, name)
    if head_weight.dim() not in (1, 2) or head_weight.numel() != hidden.shape[1] or head_weight.shape[-1] != hidden.shape[1]:
        fail(ValueError, op, "head_weight", f"shape [{hidden.shape[1]}] or [1, {hidden.shape[1]}]", list(head_weight.shape))
    bound, margin = barrier.check_barrier(op, bound, MARGIN)
    weight = check_number(op, "penalty_weight", penalty_weight, "a finite number >= 0", lambda v: v >= 0)
    return last_stride_1(hidden), flattened(head_weight), (focal.check_gamma(op, gamma), weight, bound, margin)


def _run(hidden, head_weight, cu, options, backend):
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        return (_RewardLossFromLast if cu is None else _RewardLoss).apply(hidden, head_weight, cu, options, backend)
    if cu is None:
        return _FWD_LAST[backend](hidden, head_weight, *options)[:2]
    return native(_FWD[backend], hidden, head_weight, cu, *options)[:2]


def reward_loss(hidden, head_weight, cu_seqlens, *, gamma=2.0, penalty_weight=0.02, bound=5.0, backend=None):
    """loss = mean over pairs of focal_ranking_loss + penalty_weight mean over rewards of log_barrier_penalty.

    Shapes:   hidden [T, D], head_weight [D] or [1, D], cu_seqlens int32 [n + 1]: sequences alternate chosen, rejected, none is
              empty -> loss [], rewards [n]: reward_i = hidden[last token of i] . head_weight
    Dtypes:   hidden float32 | bfloat16 | float16 | float64, head_weight the same or float32; results float32 (float64)
    Backward: saves hidden, head_weight and d loss / d rewards (4 bytes a sequence). dhidden is dense: zero but for each
              sequence's last row; `reward_loss_from_last` has none of that cost. Both results are differentiable.
              Deterministic: yes
    Errors:   ValueError for shapes, an odd number of sequences, an empty sequence, cu_seqlens that do not rise from 0 to T
              (on CPU before memory is touched; on CUDA loss, rewards and gradients are NaN, and `internlm2_kernels.check()`
              says so); TypeError for a dtype. No sequences: loss 0
    Cost:     one registered call each way; reads n rows of hidden. The loss may be negative: the barrier is -2 log(bound) at
              0. With n / 2 pairs this is XTuner's 0.01 times the sum over all rewards divided by the pairs. Several ranks: sum,
              then divide by the all-reduced count.   Source: arXiv:2403.17297 section 4.2.1 eq. 1 to 3
    """
    hidden, head_weight, options = _check("reward_loss", "hidden", hidden, head_weight, gamma, penalty_weight, bound)
    cu = check_cu_seqlens("reward_loss", "cu_seqlens", cu_seqlens, hidden, "hidden")
    if cu.shape[0] % 2 == 0:
        fail(ValueError, "reward_loss", "cu_seqlens", "an even number of sequences, chosen and rejected in turn",
             cu.shape[0] - 1)
    chosen = REWARD_LOSS.select(hidden, backend)
    if chosen == "reference":
        check_lengths("reward_loss", cu, hidden.shape[0], 1)
        return reference(hidden, head_weight, cu, gamma=options[0], penalty_weight=options[1], bound=options[2])
    return _run(hidden, head_weight, cu, options, chosen)


def reward_loss_from_last(last_hidden, head_weight, *, gamma=2.0, penalty_weight=0.02, bound=5.0, backend=None):
    """`reward_loss` on gathered rows: last_hidden [n, D] holds each sequence's last token, chosen and rejected in turn.

    Shapes:   last_hidden [n, D], n even, head_weight [D] or [1, D] -> loss [], rewards [n]
    Dtypes:   last_hidden float32 | bfloat16 | float16 | float64, head_weight the same or float32; results float32 (float64)
    Backward: saves last_hidden, head_weight and d loss / d rewards (4 bytes a sequence). Deterministic: yes
    Errors:   ValueError for shapes or an odd n; TypeError for a dtype. No rows: loss 0
    Cost:     one registered call each way.   Source: arXiv:2403.17297 section 4.2.1 eq. 1 to 3
    """
    op = "reward_loss_from_last"
    last_hidden, head_weight, options = _check(op, "last_hidden", last_hidden, head_weight, gamma, penalty_weight, bound)
    if last_hidden.shape[0] % 2:
        fail(ValueError, op, "last_hidden", "an even number of rows, chosen and rejected in turn", last_hidden.shape[0])
    chosen = REWARD_LOSS_FROM_LAST.select(last_hidden, backend)
    if chosen == "reference":
        return reference_from_last(last_hidden, head_weight, gamma=options[0], penalty_weight=options[1], bound=options[2])
    return _run(last_hidden, head_weight, None, options, chosen)
