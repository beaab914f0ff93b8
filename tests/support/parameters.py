"""Parameters and fixtures of the shared checks; a module that imports them has its tests run over the registry.

What a test takes decides how often it runs:

- `op, variant, backend`: once for every backend, and for `cpp` once for each instruction set. For properties of the kernels;
- `op, backend`: once for every backend, `cpp` with the instruction set that the library chooses by itself, Triton not in its
  interpreter. For properties of what lies above the kernels (dispatch, autograd, fakes), which all of them share;
- `op`: once for each operator.

Tests that take `native` leave out `reference`, which is PyTorch's own composition.
"""

import inspect
from importlib import import_module
from importlib.util import find_spec

import pytest
from cells import variants
from shared import OPS, instruction_set

from internlm2_kernels._registry import INTERPRETED

# Tile sizes for Triton's interpreter, which takes as long for a tile with few rows in use as for a full one. Smaller tiles are
# faster, and short sequences then fill several of them.
INTERPRETED_TILES = {"gae": {"BLOCK": 32}}


def pytest_generate_tests(metafunc):
    takes = inspect.signature(metafunc.function).parameters
    device = metafunc.config.getoption("--device")
    kept = lambda op, backend: backend in op.backends and (backend != "reference" or "native" not in takes)
    if "variant" in takes:
        pairs = [(op, variant) for op in OPS.values() for variant in variants(device, op) if kept(op, variant[0])]
        metafunc.parametrize("op,variant", pairs, ids=[f"{op.name}-{'-'.join(filter(None, v))}" for op, v in pairs])
    elif "backend" in takes:
        pairs = [(op, backend) for op in OPS.values() for backend in above_the_kernels(op, device) if kept(op, backend)]
        metafunc.parametrize("op,backend", pairs, ids=[f"{op.name}-{backend}" for op, backend in pairs])
    elif "op" in takes:
        metafunc.parametrize("op", OPS.values(), ids=list(OPS))


def above_the_kernels(op, device):
    """The backends for tests of what lies above the kernels, each once. `triton` is left out where `cpp` is there: on a CPU it
    runs in Triton's interpreter, which is slow.
    """
    backends = dict.fromkeys(backend for backend, _ in variants(device, op))
    if "cpp" in backends:
        backends.pop("triton", None)
    return list(backends)


@pytest.fixture
def native():
    """A test that takes this runs for kernels only and not for `reference` (see the top of the file)."""


@pytest.fixture
def backend(variant, monkeypatch):
    small_tiles(monkeypatch)
    with instruction_set(variant[1]):
        yield variant[0]


def small_tiles(monkeypatch):
    """Sets the tile sizes of INTERPRETED_TILES until the end of the test, where Triton is interpreted."""
    if not INTERPRETED or find_spec("triton") is None:
        return
    for name, constants in INTERPRETED_TILES.items():
        module = import_module(f"internlm2_kernels._triton.{name}")
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
