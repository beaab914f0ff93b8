"""More than 2^31 elements: real 4 GiB bfloat16 tensors through every cpp operator, one operator at a time.

Losses, rewards, heads and the optimizer: test_large_losses.py, test_large_parameters.py. More of attention, packed sequences
and paged caches: ops/test_attention_long.py.
"""

from dataclasses import dataclass, field

import large
import pytest
import test_large_losses  # noqa: F401
import test_large_parameters  # noqa: F401
import torch
from shared import OPS, sample_of

from internlm2_kernels.testing import run
from internlm2_kernels.workloads import Case, Sample

PERIOD = 1024  # the large tensors repeat these rows, so the small call gives every row of the large result


@dataclass(frozen=True)
class Wide:
    """Sizes at which an operator's tensors exceed 2^31 elements. `gib` is the memory that the test takes; `counted` names the
    dimension that counts the rows. An argument in `expanded` is one row, expanded without taking memory; `same` maps an
    argument to another one whose memory it shares.
    """

    op: str
    counted: str
    dims: dict
    gib: int = 17
    backward: bool = True
    batched: tuple[str, ...] = ()  # in addition to the operator's own
    expanded: tuple[str, ...] = ()
    same: dict[str, str] = field(default_factory=dict)
    name: str = ""


TOKENS = {"head_dim": 128, "positions": "int64"}
WIDE = [
    Wide("rms_norm", "rows", {"cols": 4096}),
    Wide("swiglu", "rows", {"cols": 2048, "packed": True}),
    Wide("rope_table", "rows", {"head_dim": 8192}),
    Wide("apply_rope", "tokens", {"heads": 32, "kv_heads": 1, **TOKENS}),
    Wide("qkv_rope", "tokens", {"heads": 30, "kv_heads": 1, **TOKENS}),
    # Forward only: the backward of attention keeps dq in float32 as well, which with q and out would not fit into 24 GiB.
    Wide("flash_attention", "batch", {"queries": 4, "keys": 3, "heads": 16, "kv_heads": 1, "head_dim": 64, "causal": True},
         gib=10, backward=False, name="q, out"),
    Wide("flash_attention", "batch", {"queries": 2, "keys": 64, "heads": 1, "kv_heads": 1, "head_dim": 64, "causal": True},
         gib=14, same={"v": "k"}, name="k, v, dk, dv"),
    Wide("flash_attention", "batch", {"queries": 4, "keys": 3, "heads": 16, "kv_heads": 1, "head_dim": 64, "causal": True},
         gib=19, expanded=("q",), name="out, dq"),
    Wide("paged_attention", "", {"new": (1,) * PERIOD, "cached": (0, 1, 2, 6) * (PERIOD // 4), "heads": 32, "kv_heads": 8,
                                 "head_dim": 128, "block_size": 4}, gib=11, batched=("q", "block_table", "seq_lens")),
]


def repeated(wide: Wide, sample: Sample, times: int) -> Sample:
    """The sample with its rows repeated `times` times; arguments that have no rows stay as they are."""
    batched = (*OPS[wide.op].workload.batched, *wide.batched)
    inputs = {n: v for n, v in sample.inputs.items() if n not in wide.same}
    for name, value in inputs.items():
        if name in wide.expanded:
            inputs[name] = value[:1].expand(PERIOD * times, *value.shape[1:])
        elif name in batched and isinstance(value, torch.Tensor) and value.shape[0] == PERIOD:
            inputs[name] = value.repeat(times, *([1] * (value.dim() - 1)))
    inputs |= {name: inputs[other] for name, other in wide.same.items()}
    return Sample({name: inputs[name] for name in sample.inputs}, sample.grad if wide.backward else ())


def free_gib() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20


@pytest.mark.slow
def test_every_operator_has_its_sizes():
    sized = {wide.op for wide in WIDE} | large.COVERED  # `covers` fills it when the test modules are imported
    assert sized == set(OPS), "state the sizes at which the operator passes 2^31 elements"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wide", WIDE, ids=lambda wide: f"{wide.op} {wide.name}".strip())
def test_beyond_two_to_the_31(wide, generator, as_it_comes):
    if (free := free_gib()) < wide.gib:
        pytest.skip(f"takes {wide.gib} GiB of memory, {free:.0f} are free")
    op = OPS[wide.op]
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32
    case = Case("large", {**({wide.counted: PERIOD} if wide.counted else {}), **wide.dims})
    drawn = sample_of(op, case, dtype, "cpu", generator)
    times = 2**31 // (PERIOD * 4096) + 1
    small, large = repeated(wide, drawn, 1), repeated(wide, drawn, times)
    upstream_row = {n: torch.randn(1, *v.shape[1:], generator=generator).to(v.dtype)
                    for n, v in run(op, small, "cpp").items()} if small.grad else {}
    grow = lambda rows: {n: v.expand(rows, *v.shape[1:]) for n, v in upstream_row.items()}
    want = run(op, small, "cpp", grow(PERIOD))
    got = run(op, large, "cpp", grow(PERIOD * times))
    assert max(v.numel() for v in [*large.inputs.values(), *got.values()] if isinstance(v, torch.Tensor)) > 2**31
    for name, value in want.items():
        if value.shape[0] != PERIOD:
            continue  # a sum over all rows differs from the small call's; other tests check it
        assert value.isfinite().all() and value.any(), name
        for i in range(times):
            assert torch.equal(got[name][i * PERIOD: (i + 1) * PERIOD], value), f"{name}, repeat {i}"
