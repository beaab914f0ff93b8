"""The attention kernels for AMX, tested on any processor with AVX512_BF16. The sources of the AMX objects are compiled again
with emulated tile instructions (tests/support/amx_emulation.h) and linked with the other objects of the build. The tests of
attention and of linear then run on that library at instruction set amx. Where the processor has AMX, all fast tests use the
real instructions.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_native_build import lines, objects  # noqa: F401, a fixture

from internlm2_kernels._registry import _C

TESTS = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_C is None or _C.best_cpu_isa() not in ("avx512_bf16", "amx"),
                                                    reason="needs AVX512_BF16")]


@pytest.fixture(scope="module")
def library(objects, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("amx")
    module = pytest.importorskip("ninja", reason="needs ninja, which knows the commands of the build")
    commands = lines(Path(module.BIN_DIR) / "ninja", "-C", objects, "-t", "commands", objects / "_C.so")
    again = {path: folder / path.name for path in [*(objects / "cpu").rglob("*.amx.o"), objects / "runtime.cpp.o"]}
    assert len(again) == 6

    def compile_one(path):
        command = next(c for c in commands if c.endswith(f" -o {path}"))
        run(command.replace(str(path), str(again[path])) + f" '-DINTERNLM2_EMULATE_AMX=\"{TESTS}/support/amx_emulation.h\"'")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, again))
    link = next(c for c in commands if " -shared " in c)
    for path, emulated in again.items():
        assert f" {path} " in link
        link = link.replace(f" {path} ", f" {emulated} ")
    run(link.replace(f"-o {objects}/_C.so", f"-o {folder}/_C.so"))
    return folder / "_C.so"


def run(command):
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Tests that run for every instruction set, here at amx only: the error ladder; equal bits with one and two threads, in any
# batch, and in decode as in prefill. Memory around the inputs is filled with NaN.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file,among", (("shared/test_ops.py", "test_ladder"),
                                        ("shared/test_ops_bits.py", "test_bitwise_repeatable"),
                                        ("ops/test_flash_attention.py", "test_packed_is_batch_invariant"),
                                        ("ops/test_linear.py", "test_a_row_has_its_bits_in_every_batch"),
                                        ("ops/test_paged_attention.py", "test_a_decoded_token_has_the_bits_of_prefill")))
def test_emulated(library, file, among):
    environment = os.environ | {"INTERNLM2_TEST_LIBRARY": str(library), "PYTHONPATH": str(TESTS / "support")}
    chosen = "amx and not float32 and (bfloat16 or not float16) and not fullgraph and not opcheck and not export"
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "amx_emulated", "-p", "no:cacheprovider", "-rp", "-k", chosen,
                           str(TESTS / file)], env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED") and f"::{among}[" in line]
    assert any("bfloat16" in line for line in passed), done.stdout


def test_the_tiles_are_what_is_tested(library):
    """The tests above do run the tile kernels: at amx results differ in their last bits from those at avx512_bf16, because sums
    have another order. The emulated library never chooses amx by itself.
    """
    code = (f"import sys; sys.path.insert(0, {str(TESTS / 'support')!r}); import amx_emulated, torch\n"
            "from internlm2_kernels import flash_attention, _C\n"
            "q = torch.randn(1, 200, 4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()\n"
            "call = lambda: flash_attention(q, q, q, causal=True, backend='cpp')\n"
            "print(_C.__file__, _C.cpu_isa(), _C.best_cpu_isa()); before = call(); _C.set_cpu_isa('amx'); after = call()\n"
            "assert not torch.equal(before, after); torch.testing.assert_close(before, after, atol=0.02, rtol=0.02)")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"INTERNLM2_TEST_LIBRARY": str(library)},
                          capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(library), "avx512_bf16", "amx"]
