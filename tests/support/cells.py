"""The cells of the shared checks (operator / backend / direction / dtype / instruction set), derived from the registry alone.
"""

import os
import platform
import sys

import torch

from internlm2_kernels import OPS
from internlm2_kernels._registry import _C

SETS = ("avx2", "avx512", "avx512_bf16", "amx")


def variants(device: str, op) -> list[tuple[str, str]]:
    """The pairs (backend, instruction set) that run on this device; on the CPU `cpp` has one for each build of `op`."""
    if device == "cuda":
        return [("reference", ""), ("triton", ""), ("cuda", "")]
    native = sys.platform == "linux" and platform.machine() == "x86_64" and os.environ.get("USE_CPP", "1") != "0"
    # Where the compiled library could be built but is not there, its avx2 cells are still expected, so that they are missed.
    best = _C.best_cpu_isa() if _C else "avx2" if native else ""
    sets = [isa for isa in SETS[: SETS.index(best) + 1 if best else 0] if isa in op.isas and _granted(isa)]
    return [("reference", ""), *(("cpp", isa) for isa in sets), ("triton", "interpreted")]


def _granted(isa: str) -> bool:
    """Whether the instruction set may be used: a sandbox may refuse the AMX tiles that the processor has."""
    if isa != "amx":
        return True
    previous = _C.cpu_isa()
    try:
        _C.set_cpu_isa(isa)
    except ValueError:
        return False
    _C.set_cpu_isa(previous)
    return True


def expected(device: str) -> tuple[set[str], set[str]]:
    """(cells that must run on this device, cells of backends that run on another device only)."""
    here, elsewhere = set(), set()
    for op in OPS.values():
        runnable = {backend for backend, _ in variants(device, op)} | ({"cpp"} if device == "cpu" else set())
        for direction in op.directions:
            for dtype in op.dtypes:
                for backend, isa in variants(device, op):
                    if backend in op.backends:
                        here.add(name(op, backend, direction, dtype, isa))
                for backend in set(op.backends) - runnable:
                    elsewhere.add(name(op, backend, direction, dtype, ""))
    return here, elsewhere


def name(op, backend: str, direction: str, dtype: torch.dtype, isa: str) -> str:
    return "/".join((op.name, backend, direction, str(dtype).removeprefix("torch."), isa or "-"))
