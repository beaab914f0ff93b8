"""Shared set-up of all tests: Triton's interpreter where there is no GPU, fresh memory filled with NaN, a seed from each test's
name, and the count of the cells (operator / backend / direction / dtype / instruction set, see support/cells.py) that ran.
"""

import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

# pytest puts the folder of this file on the path, where `tests/triton` would answer to `import triton` on a system without
# Triton. What tests import lies in tests/support, which pyproject.toml puts on the path.
if (folder := str(Path(__file__).parent)) in sys.path:
    sys.path.remove(folder)

# Read when torch is imported. OpenMP's threads otherwise spin while they wait for work, which with several processes on the
# same cores takes five times the processor time of the tests themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
CELLS = pytest.StashKey[set]()


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the shared operator checks run")
    parser.addoption("--seed", type=int, default=0, help="other random inputs in every test (0: the same at every run)")
    parser.addoption("--examples", type=int, default=40, help="how many sizes Hypothesis draws for each operator and backend")
    parser.addoption("--require-cells", action="store_true",
                     help="fail unless every operator x backend x direction x dtype x instruction set of the registry ran")


def pytest_configure(config):
    config.stash[CELLS] = set()
    if not hasattr(config, "workerinput"):
        # Inductor's cache on disk identifies our operators by their names alone, so it would reuse a graph that it compiled
        # for an earlier version of this package. Every test run therefore has a cache of its own, shared by its workers.
        cache = tempfile.mkdtemp(prefix="internlm2-inductor-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
        # Inductor would start a pool of compiling processes, each of which imports torch, for graphs of one kernel.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton or internlm2_kernels
        import interpreter

        interpreter.install()
    import torch

    torch.set_num_threads(2)
    # Fresh memory of torch and of the extension is filled with NaN: an output element that no kernel writes fails a test.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    """Reorders the tests of the error ladder so that those with the same float64 gold (support/gold.py) follow each other."""
    shared = [i for i, item in enumerate(items) if getattr(item, "originalname", "") == "test_ladder"]
    by_gold = lambda item: [str(item.callspec.params[name]) for name in ("dtype", "direction")]
    ordered = sorted((items[i] for i in shared), key=lambda item: [item.callspec.params["op"].name, *by_gold(item)])
    for i, item in zip(shared, ordered, strict=True):
        items[i] = item


@pytest.fixture
def device(request):
    import torch

    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def seed(request):
    return request.config.getoption("--seed")


@pytest.fixture
def generator(request, device, seed):
    """Random numbers that differ between tests and are the same in every run of one test with the same `--seed`."""
    import torch

    return torch.Generator(device=device).manual_seed(zlib.crc32(request.node.nodeid.encode()) ^ seed)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """After a fault in a kernel CUDA refuses every call of the process. The worker then ends after this test, and xdist starts
    another one.
    """
    if item.config.getoption("--device") == "cuda" and hasattr(item.config, "workerinput"):
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid}: the device is lost to this process: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        _RAN.update(value for name, value in report.user_properties if name == "cell")


_RAN: set = set()


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--require-cells"):
        return
    import cells

    expected, elsewhere = cells.expected(config.getoption("--device"))
    terminalreporter.write_line(
        f"operator x backend x direction x dtype x instruction set: {len(_RAN & expected)} of {len(expected)} cells ran"
        f" and passed; {len(elsewhere)} more need another device ({', '.join(sorted({c.split('/')[1] for c in elsewhere}))})")
    for cell in sorted(expected - _RAN)[:20]:
        terminalreporter.write_line(f"  missing: {cell}", red=True)


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--require-cells") and not hasattr(session.config, "workerinput"):
        import cells

        expected, _ = cells.expected(session.config.getoption("--device"))
        if not expected <= _RAN and exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def as_it_comes():
    """Turns the filling of fresh memory with NaN off, for tests whose tensors nearly fill the machine's memory. They compare
    every element anyway.
    """
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
