"""The reward model's loss from packed hidden states: head, focal ranking loss and log barrier in one call."""

import torch

from .._autocast import without_autocast
from .._checks import check_boundaries, check_cu_seqlens, fail
from .._device_errors import Index
from .._registry import Op
from ._losses import accumulator
from ._reward import OPTIONS, SOURCE, checked, gradient_shapes, loss_of, passes, reward_shapes, run


@without_autocast
def reference(hidden, head_weight, cu_seqlens, *, gamma=2.0, penalty_weight=0.02, bound=5.0):
    acc = accumulator(hidden.dtype)
    rewards = hidden[cu_seqlens[1:].long() - 1].to(acc) @ head_weight.to(acc)
    return loss_of(rewards, gamma, penalty_weight, bound), rewards


REWARD_LOSS = Op(
    name="reward_loss",
    source=SOURCE,
    summary="reward head, focal ranking loss and log barrier from packed hidden states",
    reference=reference,
    schemas={
        "fwd": f"(Tensor hidden, Tensor head_weight, Tensor cu_seqlens, {OPTIONS})"
               " -> (Tensor loss, Tensor rewards, Tensor slopes)",
        "bwd": "(Tensor? dloss, Tensor? drewards, Tensor hidden, Tensor head_weight, Tensor cu_seqlens, Tensor slopes,"
               " bool needs_dhidden, bool needs_dweight) -> (Tensor dhidden, Tensor dhead_weight)",
    },
    fakes={
        "fwd": lambda hidden, head_weight, cu, *options: reward_shapes(hidden, cu.shape[0] - 1),
        "bwd": lambda dloss, drewards, hidden, head_weight, cu, slopes, *needs: gradient_shapes(hidden, head_weight, *needs),
    },
    outputs=("loss", "rewards"),
    indices={"cu_seqlens": Index(1 << 11, "values that start at 0, rise by at least 1 and end at the tokens of hidden",
                                 "all results of the call are NaN")},
)


class _RewardLoss(torch.autograd.Function):
    forward, backward = passes(REWARD_LOSS)


def reward_loss(hidden, head_weight, cu_seqlens, *, gamma=2.0, penalty_weight=0.02, bound=5.0, backend=None):
    """loss = mean over pairs of focal_ranking_loss + penalty_weight * mean over rewards of log_barrier_penalty.

    Shapes:   hidden [T, D], head_weight [D] or [1, D], cu_seqlens int32 [n + 1] of sequences that alternate chosen, rejected,
              none of them empty -> loss [], rewards [n] with reward_i = hidden[last token of i] . head_weight
    Dtypes:   hidden float32 | bfloat16 | float16 | float64, head_weight the same or float32 (under autocast they are promoted);
              results float32 (float64)
    Backward: saves hidden, head_weight and d loss / d rewards (4 bytes a sequence). dhidden is dense, with zeros except in
              each sequence's last row; `reward_loss_from_last` does not have that cost. Both results are differentiable.
              Deterministic: yes
    Errors:   ValueError for wrong shapes or cu_seqlens, an odd number of sequences or an empty one (on CUDA cu_seqlens make all
              results NaN, and `check()` reports them); TypeError for a wrong dtype. Without sequences the loss is 0
    Cost:     one call of a registered function each way; it reads n rows of hidden. The loss may be negative: the barrier is
              -2 log(bound) at 0. The penalty term is XTuner's 0.01 times the sum over all rewards, divided by the number of
              pairs. On several ranks, divide the sum of the losses by the all-reduced number of pairs.
              Source: arXiv:2403.17297 section 4.2.1 eq. 1 to 3
    """
    hidden, head_weight, options = checked("reward_loss", "hidden", hidden, head_weight, gamma, penalty_weight, bound)
    cu = check_cu_seqlens("reward_loss", "cu_seqlens", cu_seqlens, hidden, "hidden")
    if cu.shape[0] % 2 == 0:
        fail(ValueError, "reward_loss", "cu_seqlens", "an even number of sequences, chosen and rejected in turn",
             cu.shape[0] - 1)
    chosen = REWARD_LOSS.select(hidden, backend)
    if chosen == "reference":
        check_boundaries("reward_loss", "cu_seqlens", cu, hidden.shape[0], shortest=1)
        return reference(hidden, head_weight, cu, gamma=options[0], penalty_weight=options[1], bound=options[2])
    return run(REWARD_LOSS, _RewardLoss, hidden, head_weight, cu, options, chosen)
