"""The operating system is asked for its leave to use AMX tiles when they are chosen, not when the library is loaded.

csrc/runtime.cpp is compiled into a program of its own, in which the processor has every instruction set and the system calls
are counted.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "runtime.cpp"
PROGRAM = """
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cstdint>
#include <cstdio>
static int asked = 0;
static long refusal = 0;
static long counted(long, long what, uint64_t* mask) { return what == 0x1021 ? (*mask = 3u << 17, 0) : -1; }
static long counted(long, long what, long feature) { return what == 0x1023 && feature == 18 ? (++asked, refusal) : -1; }
#define syscall counted
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(d) = ~0u, 1)
#define __builtin_cpu_supports(name) 1
#include SOURCE
using namespace internlm2;
int main() {
  const bool quiet = isa() == Isa::avx512_bf16 && best_isa() == Isa::amx && set_isa("avx2") && asked == 0;
  refusal = -1;
  const bool refused = !set_isa("amx") && asked == 1 && isa() == Isa::avx2;
  refusal = 0;
  const bool given = set_isa("amx") && asked == 2 && isa() == Isa::amx;
  std::printf("%d %d %d\\n", quiet, refused, given);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None or not SOURCE.exists(), reason="needs g++ and the sources")
def test_permission_is_asked_for_on_request_only(tmp_path):
    (tmp_path / "program.cpp").write_text(PROGRAM.replace("SOURCE", f'"{SOURCE}"'))
    subprocess.run(["g++", "-std=c++17", "-I", SOURCE.parent, "-o", tmp_path / "program", tmp_path / "program.cpp", "-pthread"],
                   check=True)
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True, env={})
    assert done.stdout == "1 1 1\n"
