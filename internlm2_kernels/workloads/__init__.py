"""The inputs on which tests, benchmarks and `doctor` run an operator: NAME.py belongs to ops/NAME.py and defines `WORKLOAD`.

`Op.workload` imports an operator's module at its first use: importing internlm2_kernels imports no workload.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One problem size. Its kind is smoke (small; every check runs it), edge (unusual sizes, for tests), model (the sizes of
    real models, for benchmarks) or gpu (for benchmarks on a GPU, which use these cases instead of the kind model).

    `passes` and `dtypes` limit which passes and dtypes the benchmark measures at this size, because some sizes take minutes;
    empty means all of them.
    """

    kind: str
    dims: dict[str, Any]
    passes: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def __str__(self) -> str:
        return "-".join(f"{key}{value}" for key, value in self.dims.items())


@dataclass(frozen=True)
class Sample:
    """The arguments of one call of an operator's public function, by name. `grad` names those that require a gradient."""

    inputs: dict[str, Any]
    grad: tuple[str, ...] = ()

    def to(self, dtype: torch.dtype) -> "Sample":
        """A copy with every floating-point tensor converted to `dtype` (the gold, the reference result, is run in float64)."""
        convert = lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        return Sample({name: convert(value) for name, value in self.inputs.items()}, self.grad)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Inputs of one operator, what it is compared with, and what it costs.

    eager       the PyTorch compositions that users would write, by name: the error ladder (internlm2_kernels/testing.py,
                which compares errors against a float64 gold) uses the first as its baseline, the benchmark measures all
    batched     the arguments whose first dimension counts rows or tokens, each computed by itself (`cos` and `sin` are
                batched only where they have one row for each token)
    bytes       bytes(dims, element_size, direction), direction `forward` or `backward`: the bytes that a call must read and
                write, each input and output counted once
    flops       flops(dims, direction): the floating-point operations of a call
    magnitude   magnitude(sample, upstream) in float64: the size of the terms that cancel in an output or gradient, by its name.
                The error ladder takes it as the scale of the allowed error where it is larger than max |gold|
    rowwise     whether each row or token is computed by itself, under any leading dimensions
    contiguous  the arguments that must be contiguous: the operator raises an error for any other layout
    copies      the aten operators that a call uses outside its kernels: to copy inputs, where it updates in place, or to make
                a few numbers that do not grow with its inputs
    counters    counters(sample): what the counters that a registered function updates in place, beside the outputs, hold after
                a call, by argument of that function
    domain      for tests that draw sizes at random: (lowest, highest, step) of each entry of a case's `dims`
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
    counters: Callable[[Sample], dict[str, float]] | None = None
    domain: dict[str, tuple[int, int, int]] = field(default_factory=dict)
