"""More than 2^31 elements: real 4 GiB bfloat16 tensors through every cpp operator, one operator at a time."""

import gc

import pytest
import torch
from shared import OPS, sample_of

from internlm2_kernels._registry import Case, Sample
from internlm2_kernels.testing import run

PERIOD = 1024  # the large tensors repeat these rows, so the small call gives every row of the large result
WIDE = {"rms_norm": {"cols": 4096}, "swiglu": {"cols": 2048, "packed": True}, "rope_table": {"head_dim": 8192},
        "apply_rope": {"heads": 32, "kv_heads": 1, "head_dim": 128, "positions": "int64"},
        "qkv_rope": {"heads": 30, "kv_heads": 1, "head_dim": 128, "positions": "int64"},
        "flash_attention": {"queries": 4, "keys": 3, "heads": 16, "kv_heads": 1, "head_dim": 64, "causal": True}}
ELSEWHERE = ("paged_attention",)  # its cache, not its tokens, is what grows: tests/ops/test_paged_attention.py


def tiled(op, sample: Sample, times: int) -> Sample:
    repeat = lambda v: v.repeat(times, *([1] * (v.dim() - 1)))
    return Sample({n: repeat(v) if n in op.batched and isinstance(v, torch.Tensor) and v.shape[0] == PERIOD else v
                   for n, v in sample.inputs.items()}, sample.grad)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.name not in ELSEWHERE], ids=lambda op: op.name)
def test_beyond_two_to_the_31(op, generator):
    assert op.name in WIDE, f"state the sizes at which {op.name} passes 2^31 elements"
    torch.utils.deterministic.fill_uninitialized_memory = False  # the comparison below covers every element
    counted = {"rms_norm": "rows", "swiglu": "rows", "rope_table": "rows", "flash_attention": "batch"}.get(op.name, "tokens")
    dims = {counted: PERIOD, **WIDE[op.name]}
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32
    small = sample_of(op, Case("large", dims), dtype, "cpu", generator)
    times = 2**31 // (PERIOD * 4096) + 1
    large = tiled(op, small, times)
    upstream_row = {n: torch.randn(1, *v.shape[1:], generator=generator).to(v.dtype)
                    for n, v in run(op, small, "cpp").items()} if small.grad else {}
    grow = lambda rows: {n: v.expand(rows, *v.shape[1:]) for n, v in upstream_row.items()}
    want = run(op, small, "cpp", grow(PERIOD))
    got = run(op, large, "cpp", grow(PERIOD * times))
    assert max(v.numel() for v in [*large.inputs.values(), *got.values()] if isinstance(v, torch.Tensor)) > 2**31
    for name, value in want.items():
        if value.shape[0] != PERIOD:
            continue  # a sum over all rows is another number, held to the ladder elsewhere
        for i in range(times):
            assert torch.equal(got[name][i * PERIOD: (i + 1) * PERIOD], value), f"{name}, repeat {i}"
    del got, large
    gc.collect()
    torch.utils.deterministic.fill_uninitialized_memory = True
