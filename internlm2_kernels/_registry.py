"""The registry: one `Op` per operator, from which dispatch, tests, benchmarks and documentation are derived.

An operator has *passes* (its registered functions: `fwd`, `bwd`, ...) and *backends*. Every pair of a pass and a backend is one
overload in the torch library `internlm2`, for example `internlm2::rms_norm_fwd.cpp`. Implementations are found by name:

- `reference` is the contract file's plain PyTorch function; it is differentiated by PyTorch and needs no overload;
- `cpp` and `cuda` are registered by the compiled library `_C`;
- `triton` is the function `NAME_PASS` of `internlm2_kernels/_triton/NAME.py`, imported at its first call.

After a release, a pass whose results or arguments change must take a new name. Inductor's cache on disk and exported programs
know a registered function by its name only, and would keep using the graph of the older version.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad as _forward_ad

from ._device_errors import Index, declare
from ._native import _C, NATIVE_ERROR

if TYPE_CHECKING:
    from .workloads import Workload

BACKENDS = ("reference", "cpp", "triton", "cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS: dict[str, "Op"] = {}

_library = torch.library.Library("internlm2", "FRAGMENT")
_forced: str | None = None  # the backend of `use_backend`. A module global, because Dynamo cannot guard a ContextVar
_entries: list[list[str | None]] = []  # [backend] of each open `use_backend` block, in the order in which the blocks began
_entries_lock = threading.Lock()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, eq=False)
class Op:
    """The contract of one operator. CONTRIBUTING.md explains how to add an operator.

    schemas, fakes  the schema (types of arguments and results) and the fake implementation (shapes and dtypes of results,
                    without data) of every registered function, keyed by pass
    outputs         the names of what the public function returns
    isas            the instruction sets for which `cpp` is compiled separately
    autocast        whether autocast casts the floating-point inputs, except caches, to its dtype
    indices         the arguments that hold indices, whose values kernels check on the device
    """

    name: str
    source: str
    summary: str
    reference: Callable
    schemas: dict[str, str]
    fakes: dict[str, Callable]
    outputs: tuple[str, ...]
    backends: tuple[str, ...] = ("reference", "cpp", "triton")
    dtypes: tuple[torch.dtype, ...] = FLOATS
    directions: tuple[str, ...] = ("forward", "backward")
    isas: tuple[str, ...] = ("avx2", "avx512")
    autocast: bool = False
    indices: dict[str, Index] = field(default_factory=dict)
    overloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    usable: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in OPS:
            raise ValueError(f"operator {self.name} is registered twice")
        for pass_name, schema in self.schemas.items():
            for backend in self.backends[1:]:
                self._define(pass_name, schema, backend)
        for device in ("cpu", "cuda"):
            self.usable[device] = tuple(b for b in _ORDER[device] if why_not(self, b, device) is None)
        declare(self.name, self.indices)
        OPS[self.name] = self

    @functools.cached_property
    def public(self) -> Callable:
        """The public function: the function NAME of the module internlm2_kernels.ops.NAME."""
        return getattr(importlib.import_module(f"internlm2_kernels.ops.{self.name}"), self.name)

    @functools.cached_property
    def workload(self) -> "Workload":
        """The inputs and costs that tests, benchmarks and `doctor` use; imported at its first use."""
        return importlib.import_module(f"internlm2_kernels.workloads.{self.name}").WORKLOAD

    def _define(self, pass_name: str, schema: str, backend: str) -> None:
        qualified = f"{self.name}_{pass_name}"
        _library.define(f"{qualified}.{backend}{schema}")
        if backend == "triton":
            launcher = _lazy_launcher(self.name, qualified)
            _library.impl(f"{qualified}.triton", launcher, "CUDA")
            if INTERPRETED:
                _library.impl(f"{qualified}.triton", launcher, "CPU")
        torch.library.register_fake(f"internlm2::{qualified}.{backend}", self.fakes[pass_name], lib=_library)
        packet = getattr(torch.ops.internlm2, qualified)
        self.overloads.setdefault(pass_name, {})[backend] = getattr(packet, backend)

    def select(self, tensor: torch.Tensor, backend: str | None) -> str:
        """The backend for this call: `backend` if it is given, otherwise that of `use_backend`, otherwise the first one of
        _ORDER that is usable on the device of `tensor`."""
        wanted = backend if backend is not None else _forced
        device = tensor.device.type
        usable = self.usable.get(device, ("reference",))
        if wanted is None:
            if device == "cuda" and tensor.dtype == torch.float64:  # the GPU kernels do not take float64
                return "reference"
            wanted = usable[0]
        elif not isinstance(wanted, str) or wanted not in usable:
            raise_unusable(self, wanted, device)
        if wanted != "reference":
            if _forward_ad._current_level >= 0:
                raise RuntimeError(f"{self.name}: backend={wanted!r} has no forward-mode derivative (jvp, jacfwd); "
                                   "inside a dual level use backend='reference'")
            if torch._C._are_functorch_transforms_active():  # the transforms would lose the gradient silently
                raise RuntimeError(f"{self.name}: backend={wanted!r} does not take part in functorch transforms (vmap, grad, "
                                   "jacrev, ...); inside them use backend='reference'")
        return wanted


# The backends that the automatic choice tries for each type of device, in this order.
_ORDER = {"cpu": ("cpp", "reference", "triton"), "cuda": ("triton", "cuda", "reference")}


def _lazy_launcher(name: str, qualified: str) -> Callable:
    """A function that calls the Triton launcher `name` and imports its module at the first call, because importing the package
    must not import Triton."""
    launcher = None

    def call(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(f"internlm2_kernels._triton.{name}"), qualified)
        return launcher(*args)

    return call


def why_not(op: Op, backend: str, device: str) -> str | None:
    """Why `backend` cannot run `op` on tensors of `device`; None if it can."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        return f"there is no such backend; there are {', '.join(BACKENDS)}"
    if backend not in op.backends:
        return f"{op.name} has no {backend} implementation; it has {', '.join(op.backends)}"
    if backend == "cpp":
        if device != "cpu":
            return f"it runs on CPU tensors, not on {device}"
        return NATIVE_ERROR or (_not_compiled(op, backend) if _C.best_cpu_isa() else "this processor has no AVX2")
    if backend == "cuda":
        if device != "cuda":
            return f"it runs on CUDA tensors, not on {device}"
        if NATIVE_ERROR:
            return NATIVE_ERROR
        return _not_compiled(op, backend) if _C.build_info()["cuda"] else "the compiled library was built without nvcc"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device == "cpu" and not INTERPRETED:
            return "it runs on CUDA tensors (on CPU only under TRITON_INTERPRET=1, for tests)"
    return None


def _not_compiled(op: Op, backend: str) -> str | None:
    missing = [f"{op.name}_{p}.{backend}" for p in op.schemas if f"{op.name}_{p}.{backend}" not in _C.signatures()]
    return f"the compiled library is older than this source and lacks {', '.join(missing)}" if missing else None


def raise_unusable(op: Op, backend: str, device: str) -> None:
    raise ValueError(f"{op.name}: backend={backend!r} cannot run here: {why_not(op, backend, device)}")


class use_backend(contextlib.ContextDecorator):  # noqa: N801, since it is used like a function
    """Run every operator inside the block on `backend`: reference, cpp, triton or cuda; None: the automatic choice.

    An operator that cannot run there raises `ValueError` with the reason. The setting holds for the whole process, because
    `torch.compile` cannot guard a thread-local value and would silently keep an old one. Of several open blocks the one that
    began last counts. The same object may open several blocks, also one inside another.
    """

    def __init__(self, backend: str | None) -> None:
        _check_name("backend", backend)
        self.backend = backend
        self.entries: list[list[str | None]] = []  # of the blocks that this object has opened

    def __enter__(self) -> None:
        entry = [self.backend]
        self.entries.append(entry)
        _enter(entry)

    def __exit__(self, *_: object) -> None:
        _leave(self.entries.pop())


def _lock() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _entries_lock  # Dynamo cannot trace a lock


def _enter(entry: list[str | None]) -> None:
    global _forced
    with _lock():
        _entries.append(entry)
        _forced = entry[0]


def _leave(entry: list[str | None]) -> None:
    """Removes the entry of a `use_backend` block that ends. Blocks of several threads may end in any order; among the open
    blocks the one that began last decides."""
    global _forced
    with _lock():
        _entries[:] = [other for other in _entries if other is not entry]
        _forced = (_entries or [[_BY_ENVIRONMENT]])[-1][0]


def _check_name(origin: str, backend: str | None) -> None:
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {backend!r}")


_BY_ENVIRONMENT = os.environ.get("INTERNLM2_KERNELS_BACKEND")
_check_name("INTERNLM2_KERNELS_BACKEND", _BY_ENVIRONMENT)
_forced = _BY_ENVIRONMENT
