"""The CUDA C++ kernels and their bindings, run on the CPU by tests/support/cuda_emulator: right values without a GPU."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from internlm2_kernels._registry import _C

pytestmark = pytest.mark.slow  # builds all CUDA sources with g++, then emulates every thread
FOLDER = Path(__file__).parents[1] / "support" / "cuda_emulator"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("cuda_emulator_build", FOLDER / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    if _C is None or shutil.which("g++") is None or build.cuda_include() is None:
        pytest.skip("needs the compiled library, g++ and the headers of the CUDA toolkit")
    return build.build(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("check", ("rms_norm", "rms_norm_shapes", "qkv_rope", "qkv_rope_shapes", "alignment", "caches"))
def test_emulated(library, check):
    done = subprocess.run([sys.executable, str(FOLDER / "checks.py"), str(library), check], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
