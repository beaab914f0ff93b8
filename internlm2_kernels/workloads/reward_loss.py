"""Workload of `reward_loss`."""

from . import Case, Workload
from ._reward import SHARED, sample_of
from .reward_loss_from_last import eager as eager_from_last


def _eager(hidden, head_weight, cu_seqlens, **options):
    return eager_from_last(hidden[cu_seqlens[1:].long() - 1], head_weight, **options)


WORKLOAD = Workload(
    sample=sample_of(packed=True),
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
    **SHARED,
)
