"""Inputs of the error ladder (testing.py's check of errors against a float64 gold) with their gold and the eager baseline's
errors, computed once for all backends and instruction sets.

The inputs depend on operator, case and dtype alone. conftest.py orders the tests so that those of one operator and dtype
follow each other in one process, which computes the float64 reference and the eager baseline for the first of them.
"""

import functools
import zlib
from dataclasses import dataclass

import torch
from shared import OPS, sample_of, small_cases

from internlm2_kernels.testing import Standard, draw_upstream, standard
from internlm2_kernels.workloads import Case, Sample

DRAWS = 3  # random draws of the inputs of one case; the ladder pools their errors


@dataclass(frozen=True)
class Input:
    """One random draw: the arguments, the upstream gradients (empty for a forward), and in `by` the gold and the baseline that
    the results are compared with.
    """

    sample: Sample
    upstream: dict[str, torch.Tensor]
    by: Standard


@dataclass(frozen=True)
class Problem:
    """The draws of one case and one size of the upstream gradients (0: forward), whose errors are pooled."""

    case: Case
    scale: float
    inputs: tuple[Input, ...]


@functools.lru_cache(maxsize=4)
def problems(op_name: str, dtype: torch.dtype, direction: str, device: torch.device, seed: int) -> tuple[Problem, ...]:
    """All problems of the operator's smoke and edge cases."""
    op, found = OPS[op_name], []
    for case in small_cases(op):
        for scale in (1.0, 1e-4) if direction == "backward" else (0.0,):
            name = f"{op_name} {case} {dtype} {scale}"
            generator = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()) ^ seed)
            inputs = []
            for _ in range(DRAWS):
                sample = sample_of(op, case, dtype, device, generator)
                upstream = draw_upstream(op, sample, scale, generator) if scale else {}
                inputs.append(Input(sample, upstream, standard(op, sample, upstream)))
            found.append(Problem(case, scale, tuple(inputs)))
    return tuple(found)


def interpreted(found: tuple[Problem, ...], dtype: torch.dtype) -> tuple[Problem, ...]:
    """The selection of problems that run in Triton's interpreter, which takes up to seconds a call.

    Its kernels compute in float32 for every dtype. So float32 runs every case, the first with all draws; the 16-bit dtypes run
    the smoke cases, with one draw each; small upstream gradients run in float16, where they could be rounded to 0.
    """
    kept = []
    for problem in found:
        first, full = problem.case == found[0].case, dtype == torch.float32
        if problem.scale == 1e-4 and not (first and dtype == torch.float16):
            continue
        if problem.case.kind == "smoke" or full:
            kept.append(problem if first and full else Problem(problem.case, problem.scale, problem.inputs[:1]))
    return tuple(kept)
