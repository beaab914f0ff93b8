"""Parameters and fixtures of the shared checks; a module that imports them has its tests run over the registry."""

import pytest
from cells import variants
from shared import OPS, instruction_set


def pytest_generate_tests(metafunc):
    """`op` and `variant` (backend, instruction set) from the registry; tests that take `native` see cpp and triton only."""
    if "variant" in metafunc.fixturenames:
        pairs = [(op, variant) for op in OPS.values() for variant in variants(metafunc.config.getoption("--device"), op)
                 if variant[0] in op.backends and (variant[0] != "reference" or "native" not in metafunc.fixturenames)]
        metafunc.parametrize("op,variant", pairs, ids=[f"{op.name}-{'-'.join(filter(None, v))}" for op, v in pairs])
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", OPS.values(), ids=list(OPS))


@pytest.fixture
def native():
    """Marks a test as one of compiled backends: `reference` is PyTorch's own composition."""


@pytest.fixture
def backend(variant):
    with instruction_set(variant[1]):
        yield variant[0]
