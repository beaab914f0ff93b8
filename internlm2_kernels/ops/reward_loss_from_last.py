"""The reward model's loss from each sequence's last hidden state: head, focal ranking loss and log barrier in one call."""

import torch

from .._autocast import without_autocast
from .._checks import fail
from .._registry import Op
from ._losses import accumulator
from ._reward import OPTIONS, SOURCE, checked, gradient_shapes, loss_of, passes, reward_shapes, run


@without_autocast
def reference(last_hidden, head_weight, *, gamma=2.0, penalty_weight=0.02, bound=5.0):
    acc = accumulator(last_hidden.dtype)
    rewards = last_hidden.to(acc) @ head_weight.to(acc)
    return loss_of(rewards, gamma, penalty_weight, bound), rewards


REWARD_LOSS_FROM_LAST = Op(
    name="reward_loss_from_last",
    source=SOURCE,
    summary="reward head, focal ranking loss and log barrier from the last hidden states",
    reference=reference,
    schemas={
        "fwd": f"(Tensor last_hidden, Tensor head_weight, {OPTIONS}) -> (Tensor loss, Tensor rewards, Tensor slopes)",
        "bwd": "(Tensor? dloss, Tensor? drewards, Tensor last_hidden, Tensor head_weight, Tensor slopes, bool needs_dhidden,"
               " bool needs_dweight) -> (Tensor dlast_hidden, Tensor dhead_weight)",
    },
    fakes={
        "fwd": lambda last_hidden, head_weight, *options: reward_shapes(last_hidden, last_hidden.shape[0]),
        "bwd": lambda dloss, drewards, hidden, head_weight, slopes, *needs: gradient_shapes(hidden, head_weight, *needs),
    },
    outputs=("loss", "rewards"),
)


class _RewardLossFromLast(torch.autograd.Function):
    forward, backward = passes(REWARD_LOSS_FROM_LAST)


def reward_loss_from_last(last_hidden, head_weight, *, gamma=2.0, penalty_weight=0.02, bound=5.0, backend=None):
    """`reward_loss` on gathered rows: last_hidden [n, D] holds each sequence's last token, chosen and rejected in turn.

    Shapes:   last_hidden [n, D] with an even n, head_weight [D] or [1, D] -> loss [], rewards [n]
    Dtypes:   last_hidden float32 | bfloat16 | float16 | float64, head_weight the same or float32 (under autocast they are
              promoted); results float32 (float64)
    Backward: saves last_hidden, head_weight and d loss / d rewards (4 bytes a sequence). Deterministic: yes
    Errors:   ValueError for wrong shapes or an odd n; TypeError for a wrong dtype. Without rows the loss is 0
    Cost:     one call of a registered function each way.   Source: arXiv:2403.17297 section 4.2.1 eq. 1 to 3
    """
    op = "reward_loss_from_last"
    last_hidden, head_weight, options = checked(op, "last_hidden", last_hidden, head_weight, gamma, penalty_weight, bound)
    if last_hidden.shape[0] % 2:
        fail(ValueError, op, "last_hidden", "an even number of rows, chosen and rejected in turn", last_hidden.shape[0])
    chosen = REWARD_LOSS_FROM_LAST.select(last_hidden, backend)
    if chosen == "reference":
        return reference(last_hidden, head_weight, gamma=options[0], penalty_weight=options[1], bound=options[2])
    return run(REWARD_LOSS_FROM_LAST, _RewardLossFromLast, last_hidden, head_weight, None, options, chosen)
