"""Builds internlm2_kernels/_C: pybind11 module, bindings on torch's stable ABI, AVX2 and AVX-512 kernels, CUDA objects.

USE_CPP=0 asks for pure Python, USE_CUDA=0 leaves the CUDA half out (1 insists on it), CUDA_ARCHS="80;90a" picks targets.
It writes its own build.ninja: torch's build helpers compile each source once with one set of flags, while a CPU kernel is
compiled once for each instruction set.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = sys.platform == "linux" and platform.machine() == "x86_64" and os.environ.get("USE_CPP", "1") != "0"
CXX = ("-O2 -fPIC -std=c++17 -fvisibility=hidden -fvisibility-inlines-hidden -fno-math-errno -fno-trapping-math "
       "-ffp-contract=off -Wall -Wno-unknown-pragmas -Wno-attributes")  # no contraction: fma only where the source calls it
AVX2 = "-mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2"
AVX512 = ("-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -DCPU_CAPABILITY=AVX512 "
          "-DCPU_CAPABILITY_AVX512 -Wno-maybe-uninitialized -Wno-uninitialized")  # gcc 12's intrinsics warn falsely
AVX512_BF16 = AVX512.replace("=AVX512", "=AVX512_BF16 -DCPU_CAPABILITY_AVX512_BF16 -mavx512bf16 -mavx512vnni")
AMX = AVX512_BF16.replace("=AVX512_BF16", "=AMX -DCPU_CAPABILITY_AMX -mamx-tile -mamx-bf16")


def cuda_home():
    """The toolkit behind nvcc (which may be a wrapper), or None."""
    nvcc = None if os.environ.get("USE_CUDA") == "0" else shutil.which("nvcc")
    if nvcc is None:
        if os.environ.get("USE_CUDA") == "1":
            raise SystemExit("USE_CUDA=1, but there is no nvcc on the PATH.")
        return None
    dry = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", dry, re.M).group(1)).resolve()


def instruction_sets(source):
    """The instruction sets named by the first line of a CPU kernel's source (`// Built for: avx2 avx512 ...`); avx2 and avx512
    where the line is missing."""
    first = source.read_text().partition("\n")[0]
    return first.removeprefix("// Built for: ").split() if first.startswith("// Built for: ") else ["avx2", "avx512"]


def ninja_file(torch_dir, torch_version, build):
    """The text of build.ninja. The objects are linked in the order of their instruction sets, then those of CUDA."""
    home = cuda_home()
    archs = [a for a in re.split("[; ,]+", os.environ.get("CUDA_ARCHS", "80;90a;100a")) if a] if home else []
    facts = f'-DINTERNLM2_BUILD_TORCH=\\"{torch_version}\\"' + (
        f' -DINTERNLM2_CUDA_ARCHS=\\"{";".join(archs)}\\"'.replace(";", "\\;") if archs else "")
    cxx = f"{CXX} -ffile-prefix-map={ROOT}/= -isystem {torch_dir}/include -isystem {sysconfig.get_path('include')}"
    gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
    libraries = f"-L{home}/lib64 -L{home}/lib -lcudart_static" if archs else ""
    objects, lines = [], ["ninja_required_version = 1.5", "rule cxx",
             f"  command = {os.environ.get('CXX', 'g++')} -MMD -MF $out.d {cxx} $flags -c $in -o $out",
             "  depfile = $out.d", "  deps = gcc", "rule cuda",
             f"  command = {home}/bin/nvcc -MMD -MF $out.d -O3 -std=c++17 {gencode} -Xcompiler -fPIC,-fvisibility=hidden"
             " -c $in -o $out", "  depfile = $out.d", "  deps = gcc", "rule link",
             f"  command = {os.environ.get('CXX', 'g++')} -shared $in -o $out -L{torch_dir}/lib -Wl,--no-as-needed -ltorch"
             f" -ltorch_cpu -Wl,--as-needed {libraries} -ldl -lrt -lpthread -Wl,--exclude-libs,ALL"
             f" -Wl,--version-script={build}/exports"]

    def add(rule, source, tag="", flags=""):
        objects.append(f"{build}/{source.relative_to(ROOT / 'csrc')}{tag}.o")
        lines.extend([f"build {objects[-1]}: {rule} {source}", f"  flags = {flags}"])

    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        add("cxx", source, flags=facts if source.name == "module.cpp" else "-DINTERNLM2_CUDA" if archs else "")
    for tag, flags in (("avx2", AVX2), ("avx512", AVX512), ("avx512_bf16", AVX512_BF16), ("amx", AMX)):
        for source in sorted((ROOT / "csrc/cpu").rglob("*.cpp")):
            if tag in instruction_sets(source):
                add("cxx", source, f".{tag}", flags)
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if archs else ():
        add("cuda", source)
    return "\n".join([*lines, f"build {build}/_C.so: link {' '.join(objects)} | {build}/exports", ""])


class Build(build_ext):
    def build_extension(self, ext):
        if (spec := importlib.util.find_spec("torch")) is None:  # found, not imported: importing it takes seconds
            raise SystemExit("internlm2-kernels is built against the installed torch, which is not to be seen from here: "
                             "use `pip install --no-build-isolation .` with torch installed, or USE_CPP=0.")
        compiler = os.environ.get("CXX", "g++").split()[0]
        if shutil.which(compiler) is None:
            raise SystemExit(f"internlm2-kernels needs a C++17 compiler ({compiler} is not on the PATH), or USE_CPP=0.")
        torch_dir = Path(spec.origin).parent
        version = re.search(r"__version__ = '(.*)'", (torch_dir / "version.py").read_text()).group(1)
        build = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}-torch{version.split('+')[0]}"
        build.mkdir(parents=True, exist_ok=True)
        for name, text in (("exports", "{ global: PyInit__C; local: *; };\n"),
                           ("build.ninja", ninja_file(torch_dir, version, build))):
            if not (build / name).exists() or (build / name).read_text() != text:
                (build / name).write_text(text)
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        subprocess.run([*ninja, "-C", str(build)], check=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / "_C.so", target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)  # a running process keeps the library that it has mapped


setup(ext_modules=[Extension("internlm2_kernels._C", [])] if NATIVE else [], cmdclass={"build_ext": Build})
