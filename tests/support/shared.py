"""What the shared checks have in common: samples by case, the choice of backend and instruction set, derived inputs."""

import contextlib

import torch
from cells import SETS
from torch.utils._python_dispatch import TorchDispatchMode

from internlm2_kernels._registry import _C, OPS, Op
from internlm2_kernels.testing import draw_upstream, run
from internlm2_kernels.workloads import Case, Sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def instruction_set(isa: str):
    """Selects the build for one instruction set inside the block. A name that is no instruction set changes nothing."""
    if isa not in SETS:
        yield
        return
    previous = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        yield
    finally:
        _C.set_cpu_isa(previous)


def small_cases(op: Op) -> list[Case]:
    return [case for case in op.workload.cases if case.kind in ("smoke", "edge")]


def smoke_cases(op: Op) -> list[Case]:
    return [case for case in op.workload.cases if case.kind == "smoke"]


def sample_of(op: Op, case: Case, dtype: torch.dtype, device, generator) -> Sample:
    return op.workload.sample(case, dtype, torch.device(device), generator)


def forward_backward(op: Op, sample: Sample, backend: str, generator) -> dict[str, torch.Tensor]:
    return run(op, sample, backend, draw_upstream(op, sample, 1.0, generator))


def assert_bitwise(got: dict, want: dict, label: str = "") -> None:
    assert got.keys() == want.keys(), (label, got.keys(), want.keys())
    for name in want:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype, (label, name)
        different = bits(got[name]) != bits(want[name])
        assert not different.any(), f"{label}: {name} differs in {int(different.sum())} of {different.numel()} elements"


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns as integers, so that 0.0 and -0.0 differ; all NaN values count as equal."""
    if not x.is_floating_point():
        return x
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x.isnan(), float("nan"), x).contiguous().view(integers)


def replaced(sample: Sample, **inputs) -> Sample:
    return Sample({**sample.inputs, **inputs}, sample.grad)


def rows_between(op: Op, sample: Sample, count: int, begin: int, end: int) -> Sample:
    """The sample restricted to its rows [begin, end)."""
    part = {name: value[begin:end] for name, value in sample.inputs.items()
            if name in op.workload.batched and isinstance(value, torch.Tensor) and value.shape[0] == count}
    return replaced(sample, **part)


def row_count(case: Case) -> int:
    """The number of rows that the first dimension of the batched arguments counts; 0 for a case that has none."""
    return next((case.dims[key] for key in ("rows", "tokens", "batch") if key in case.dims), 0)


def widened(case: Case) -> Case:
    """The case with its dimensions raised to a size that the kernels distribute over threads."""
    larger = {"rows": 1031, "tokens": 1031, "queries": 300, "keys": 300, "targets": 1031, "pairs": 300,
              "sequences": 300, "elements": 300000}
    dims = {key: larger.get(key, value) for key, value in case.dims.items()}
    if "cached" in dims:
        dims["cached"] = tuple(length + 5000 for length in dims["cached"])
    return Case("wide", dims)


class Recorder(TorchDispatchMode):
    """Records every operator that is dispatched, and for the operators of this package detached copies of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copy = lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v
        if func.namespace == "internlm2":
            self.calls.append((func, tuple(copy(a) for a in args)))
        else:
            self.calls.append((func, ()))
        return func(*args, **(kwargs or {}))


class Written(TorchDispatchMode):
    """Collects in `arguments`, by name, the arguments that registered functions of this package have written to."""

    def __init__(self):
        super().__init__()
        self.arguments = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "internlm2":
            pairs = zip(func._schema.arguments, args, strict=False)
            self.arguments |= {a.name: value for a, value in pairs if a.alias_info is not None and a.alias_info.is_write}
        return result


def counted(op: Op, sample: Sample, backend: str) -> dict[str, float]:
    """What the counters that `op.workload.counters` names hold after one call."""
    with Written() as written, torch.no_grad():
        op.public(**sample.inputs, backend=backend)
    values = {name: written.arguments[name] for name in op.workload.counters(sample)}
    return {name: float(value[0] if isinstance(value, list) else value) for name, value in values.items()}


def strided_copies(x: torch.Tensor):
    """Pairs (name, tensor equal to x with other strides): a slice of a larger tensor, a transposed tensor, last stride 2."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 13), float("nan") if x.is_floating_point() else -1,
                      dtype=x.dtype, device=x.device)
    wide[..., 5: 5 + x.shape[-1]] = x
    yield "sliced", wide[..., 5: 5 + x.shape[-1]]
    if x.dim() >= 2:
        yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
        rows = torch.stack((x, torch.full_like(x, 7)), 1)
        yield "every other row", rows[:, 0]
    double = torch.stack((x, torch.full_like(x, 7)), -1)
    yield "last stride 2", double[..., 0]


__all__ = [name for name in dir() if not name.startswith("_")] + ["OPS"]
