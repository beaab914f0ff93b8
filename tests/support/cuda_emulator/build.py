"""Builds csrc/cuda and its bindings with g++ for the CPU. The library registers the `.cuda` overloads for CPU tensors."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SCOPE = """class CudaScope {
 public:
  explicit CudaScope(const Tensor&) {}
  int device() const { return 0; }
  void* stream() const { return nullptr; }
};
"""
WORD = """#include "runtime.h"
namespace {
int word;
const bool known = (internlm2::set_error_word(0, &word), true);
}
extern "C" __attribute__((visibility("default"))) int* error_word() { return &word; }
"""


def cuda_include() -> Path | None:
    """The headers of the CUDA toolkit behind nvcc, or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.M)
    include = Path(top.group(1)).resolve() / "include" if top else Path("/nowhere")
    return include if (include / "cuda_bf16.h").exists() else None


def _replace(text: str, pattern: str, by: str) -> str:
    out, count = re.subn(pattern, lambda match: match.expand(by), text, flags=re.S)
    assert count, f"the source no longer has {pattern}"
    return out


def _sources(folder: Path) -> list[Path]:
    """Copies the sources to `folder`, with kernel launches, the stream and the registration replaced by the emulator's. The
    code of the kernels is unchanged.
    """
    (folder / "cuda").mkdir(parents=True)
    for header in [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")]:
        shutil.copy(header, folder / header.relative_to(CSRC))
    stable, common = folder / "stable.h", folder / "cuda" / "common.cuh"
    stable.write_text(_replace(stable.read_text(), r"class CudaScope \{.*?\n\};\n", SCOPE.replace("\\", r"\\")))
    common.write_text(_replace(common.read_text(), r"#include <cstdint>", f'#include "{HERE}/emulator.h"\n#include <cstdint>'))
    sources = []
    for kernel in CSRC.glob("cuda/*.cu"):
        text = _replace(kernel.read_text(), r"(\w+_kernel(?:<[^;]*?>)?)<<<(.+?), (\w+), 0, \w+>>>\(([^;]*)\);",
                        r"emulator::launch(\2, \3, [&] { \1(\4); });")
        binding = (CSRC / f"{kernel.stem}.cpp").read_text()
        binding = _replace(binding, r"STABLE_TORCH_LIBRARY_IMPL\(internlm2, CPU.*?\n\}\n", "")
        binding = _replace(binding, r"\(internlm2, CUDA, m\)", "(internlm2, CPU, m)")
        for name, source in ((f"cuda/{kernel.stem}.cu.cpp", text), (f"{kernel.stem}.cpp", binding)):
            (folder / name).write_text(source)
            sources.append(folder / name)
    shutil.copy(CSRC / "runtime.cpp", folder)
    (folder / "word.cpp").write_text(WORD)
    return [*sources, folder / "runtime.cpp", folder / "word.cpp"]


def build(folder: Path) -> Path:
    """Builds the shared library in `folder`."""
    torch_dir = Path(torch.__file__).parent
    flags = ["-O1", "-std=c++20", "-fPIC", "-w", "-ffp-contract=off", "-DINTERNLM2_CUDA", "-DINTERNLM2_CPU(...)=((void)0)",
             "-isystem", str(torch_dir / "include"), "-isystem", str(cuda_include())]

    def compile_one(source: Path) -> Path:
        out = source.with_suffix(".o")
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, _sources(folder / "src")))
    library = folder / "emulated.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(library), f"-L{torch_dir}/lib", "-ltorch",
                    "-ltorch_cpu", "-lpthread"], check=True)
    return library
