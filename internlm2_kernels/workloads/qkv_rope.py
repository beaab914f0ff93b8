"""Workload of `qkv_rope`."""

import torch

from ..ops.qkv_rope import reference, split_heads
from . import Sample, Workload
from .apply_rope import eager_rotate_half, rope_case, sample_tables


def _eager_composition(qkv, cos, sin, positions=None, *, num_heads, num_kv_heads, cache=None):
    q, k, v = split_heads(qkv, num_heads, num_kv_heads)
    return (*eager_rotate_half(q, k, cos, sin, positions), v)


def _sample(case, dtype, device, generator):
    dims = case.dims
    cos, sin, positions = sample_tables(dims, dtype, device, generator)
    width = (dims["heads"] + 2 * dims["kv_heads"]) * dims["head_dim"]
    qkv = torch.randn(dims["tokens"], width, generator=generator, device=device).to(dtype)
    return Sample({"qkv": qkv, "cos": cos, "sin": sin, "positions": positions, "num_heads": dims["heads"],
                   "num_kv_heads": dims["kv_heads"]}, ("qkv",))


def _bytes(dims, size, direction):
    return 2 * dims["tokens"] * (dims["heads"] + 2 * dims["kv_heads"]) * dims["head_dim"] * size + (
        dims["tokens"] * dims["head_dim"] * 4)


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        rope_case("smoke", 5, 4, 2, 64),
        rope_case("smoke", 33, 6, 1, 96, positions="int32"),
        rope_case("smoke", 17, 4, 4, 128, positions="int64"),
        rope_case("edge", 0, 2, 1, 32, positions="int64"),
        rope_case("edge", 1, 1, 1, 2),
        rope_case("edge", 65, 12, 2, 34, positions="int64"),
        *(rope_case(kind, tokens, heads, 8, 128, positions="int64") for kind, tokens in (("model", 4096), ("gpu", 16384))
          for heads in (16, 32, 48)),
    ),
    eager={"float32 halves": reference, "rotate_half": _eager_composition},
    batched=("qkv", "positions", "cos", "sin"),
    bytes=_bytes,
    flops=lambda dims, direction: 3 * dims["tokens"] * (dims["heads"] + dims["kv_heads"]) * dims["head_dim"],
)
