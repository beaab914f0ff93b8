"""The operating system is asked for permission to use AMX tiles at the first call of a kernel, not when the library loads.

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
int main(int argc, char**) {
  refusal = argc > 1 ? -1 : 0;  // with an argument the operating system refuses
  const bool quiet = best_isa() == Isa::amx && asked == 0;
  const bool chosen = isa() == (refusal ? Isa::avx512_bf16 : Isa::amx) && asked == 1;
  const bool lower = set_isa("avx2") && isa() == Isa::avx2 && asked == 1;
  const bool again = set_isa("amx") == !refusal && asked == 2 && isa() == (refusal ? Isa::avx2 : Isa::amx);
  std::printf("%d %d %d %d\\n", quiet, chosen, lower, again);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None or not SOURCE.exists(), reason="needs g++ and the sources")
@pytest.mark.parametrize("arguments", ((), ("refuse",)), ids=("granted", "refused"))
def test_permission_is_asked_for_at_the_first_call(tmp_path, arguments):
    (tmp_path / "program.cpp").write_text(PROGRAM.replace("SOURCE", f'"{SOURCE}"'))
    subprocess.run(["g++", "-std=c++17", "-I", SOURCE.parent, "-o", tmp_path / "program", tmp_path / "program.cpp", "-pthread"],
                   check=True)
    done = subprocess.run([tmp_path / "program", *arguments], capture_output=True, text=True, check=True, env={})
    assert done.stdout == "1 1 1 1\n"
