"""Workload of `rope_table`."""

import torch

from ..ops.rope_table import reference
from . import Case, Sample, Workload


def _eager(length_or_positions, head_dim, *, base=1e6, scaling=None, angles="float64", device=None):
    """The tables by PyTorch's operators, one kernel each: the reference is already what users would write."""
    return reference(length_or_positions, head_dim, base=base, scaling=scaling, angles=angles, device=device)


def _sample(case, dtype, device, generator):
    dims = case.dims
    positions = torch.randint(0, 200_000, (dims["rows"],), generator=generator, device=device)
    if dims.get("positions") == "int32":
        positions = positions.to(torch.int32)
    inputs = {"length_or_positions": positions, "head_dim": dims["head_dim"]}
    for key in ("scaling", "angles"):
        if key in dims:
            inputs[key] = _SCALINGS[dims[key]] if key == "scaling" else dims[key]
    return Sample(inputs)


_SCALINGS = {
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 32768, "seq_len": 200_000},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
}


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 33, "head_dim": 64}),
        Case("smoke", {"rows": 17, "head_dim": 128, "scaling": "dynamic", "positions": "int32"}),
        Case("edge", {"rows": 0, "head_dim": 32}),
        Case("edge", {"rows": 1, "head_dim": 2}),
        Case("edge", {"rows": 5, "head_dim": 6, "scaling": "linear"}),
        Case("edge", {"rows": 9, "head_dim": 96, "scaling": "yarn"}),
        Case("edge", {"rows": 9, "head_dim": 128, "scaling": "llama3"}),
        Case("edge", {"rows": 9, "head_dim": 80, "scaling": "linear", "angles": "float32"}),
        Case("model", {"rows": 4096, "head_dim": 128}),
        Case("model", {"rows": 32768, "head_dim": 128}),
    ),
    eager={"torch": _eager},
    batched=("length_or_positions",),
    copies=("pow", "div", "reciprocal", "mul"),  # for the d/2 frequencies, which PyTorch computes outside the kernel
    bytes=lambda dims, size, direction: dims["rows"] * (8 + 4 * dims["head_dim"]),
    flops=lambda dims, direction: 3 * dims["rows"] * dims["head_dim"],
    domain={"head_dim": (4, 140, 2)},  # at least 4, because dynamic scaling divides by d - 2
)
