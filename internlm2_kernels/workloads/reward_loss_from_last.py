"""Workload of `reward_loss_from_last`."""

from ..ops._losses import accumulator
from ..ops._reward import loss_of
from . import Case, Workload
from ._reward import SHARED, sample_of
from .focal_ranking_loss import eager as eager_ranking
from .log_barrier_penalty import eager as eager_penalty


def eager(last_hidden, head_weight, *, gamma=2.0, penalty_weight=0.02, bound=5.0):
    acc = accumulator(last_hidden.dtype)
    rewards = last_hidden.to(acc) @ head_weight.to(acc)
    return loss_of(rewards, gamma, penalty_weight, bound, eager_ranking, eager_penalty), rewards


WORKLOAD = Workload(
    sample=sample_of(packed=False),
    cases=(
        Case("smoke", {"pairs": 3, "cols": 64}),
        Case("smoke", {"pairs": 20, "cols": 129, "gamma": 1.0}),
        Case("edge", {"pairs": 0, "cols": 16}),
        Case("edge", {"pairs": 1, "cols": 1}),
        Case("edge", {"pairs": 70, "cols": 33, "spread": 10}),
        Case("model", {"pairs": 64, "cols": 2048}),
    ),
    eager={"matmul, losses": eager},
    batched=("last_hidden",),
    domain={"pairs": (0, 40, 1)},
    **SHARED,
)
