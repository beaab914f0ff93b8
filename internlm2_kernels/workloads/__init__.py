"""What tests, benchmarks and `doctor` run an operator on: NAME.py belongs to ops/NAME.py and defines `WORKLOAD`.

`Op.workload` imports the module at its first use: importing internlm2_kernels imports none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One problem size. Its kind is smoke (for every check), edge (unusual sizes), model (for benchmarks) or gpu (for
    benchmarks on a GPU, where it replaces model).

    `passes` and `dtypes` limit what the benchmark measures, because some sizes take minutes; empty means everything.
    """

    kind: str
    dims: dict[str, Any]
    passes: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def __str__(self) -> str:
        return "-".join(f"{key}{value}" for key, value in self.dims.items())


@dataclass(frozen=True)
class Sample:
    """The arguments of a public function by name. `grad` names those that require a gradient."""

    inputs: dict[str, Any]
    grad: tuple[str, ...] = ()

    def to(self, dtype: torch.dtype) -> "Sample":
        """A copy with every floating-point tensor converted to `dtype` (the gold run uses float64)."""
        convert = lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        return Sample({name: convert(value) for name, value in self.inputs.items()}, self.grad)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Inputs of one operator, what it is compared with, and what it costs.

    eager       the PyTorch compositions that users would write: the error ladder compares with the first, the benchmark
                measures all
    batched     the arguments whose first dimension counts rows or tokens, each computed by itself (`cos` and `sin` only
                where they have one row a token)
    bytes       bytes(dims, element_size, direction), direction `forward` or `backward`: each input and output counts once
    flops       flops(dims, direction)
    magnitude   the size of cancelling terms, by output or argument name, where the gold itself cancels
    rowwise     each row or token is computed by itself, under any leading dimensions
    contiguous  the arguments that must be contiguous: anything else is an error
    copies      the aten operators that a call uses outside its kernels: to copy inputs, where it updates in place, or to make
                a few numbers that do not grow with its inputs
    domain      limits of dims for drawn sizes: lowest, highest, step
    """

    sample: Callable[[Case, torch.dtype, torch.device, torch.Generator], Sample]
    cases: tuple[Case, ...]
    eager: dict[str, Callable]
    batched: tuple[str, ...]
    bytes: Callable[[dict, int, str], int]
    flops: Callable[[dict, str], int]
    magnitude: Callable[[Sample, dict], dict[str, float]] | None = None
    rowwise: bool = True
    contiguous: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    domain: dict[str, tuple[int, int, int]] = field(default_factory=dict)
