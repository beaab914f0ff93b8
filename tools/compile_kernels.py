"""Compiles every kernel for GPUs that need not be here, and reads off the machine code what it will take to run.

A Triton module's `audit(dtype, meta)` calls its own launchers on tensors without storage; the launches are recorded
instead of run. So what is compiled is what is shipped, whatever the launchers decide.
"""

import functools
import hashlib
import importlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from internlm2_kernels._triton import common

TRITON_ARCHS = ("80", "90", "100")
CUDA_ARCHS = ("80", "90a", "100a")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
# Shared memory a block may ask for and a multiprocessor holds, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {"80": 166_912, "90": 232_448, "100": 232_448}
_SHARED_TOTAL = {"80": 167_936, "90": 233_472, "100": 233_472}
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int8: "i8",
          torch.int32: "i32", torch.int64: "i64", torch.bool: "u1"}


@dataclass(frozen=True)
class Facts:
    """What one compiled kernel takes. `loads` and `stores` count global accesses by their width in bits; `mma`, `wgmma` and
    `tcgen05` count the tensor cores' instructions, of which sm_100 has the first and the last, sm_90 the first two."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    occupancy: float
    mma: int
    wgmma: int
    tcgen05: int
    loads: str
    stores: str


def occupancy(arch: str, registers: int, shared_bytes: int, threads: int) -> float:
    """The share of a multiprocessor's 64 warps that can be resident, by registers, shared memory and 32 blocks."""
    warps = -(-threads // 32)
    by_registers = 65_536 // (-(-max(registers, 1) * 32 // 256) * 256 * warps)
    by_shared = _SHARED_TOTAL[arch.rstrip("a")] // (-(-shared_bytes // 128) * 128 + 1024)
    return round(min(by_registers, by_shared, 32, 64 // warps) * warps / 64, 3)


def read_ptx(text: str) -> dict[str, Any]:
    """Matrix instructions and the widths of global accesses in one kernel's PTX."""
    widths: dict[str, Counter] = {"loads": Counter(), "stores": Counter()}
    for kind, modifiers, bits in re.findall(r"\b(ld|st)\.global((?:\.[\w:]+)*?)\.[bfsu](\d+)\b", text):
        vector = re.search(r"\.v(\d)", modifiers)
        widths["loads" if kind == "ld" else "stores"][int(bits) * int(vector.group(1) if vector else 1)] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)", text):
        widths["loads"][int(size, 0) * 8] += 1
    as_text = {name: " ".join(f"{n}x{bits}" for bits, n in sorted(counts.items(), reverse=True))
               for name, counts in widths.items()}
    products = {"mma": r"\bmma\.sync\b", "wgmma": r"\bwgmma\.mma_async\b", "tcgen05": r"\btcgen05\.mma\b"}
    return {**{name: len(re.findall(pattern, text)) for name, pattern in products.items()}, **as_text}


def read_resources(cuobjdump: str, cubin: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and static shared memory of every function of a cubin or fat binary."""
    out = subprocess.run([cuobjdump, "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True).stdout
    found = {}
    for name, usage in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", out):
        values = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        found[name] = {"registers": values["REG"], "stack": values["STACK"] + values.get("LOCAL", 0),
                       "shared": values["SHARED"]}
    return found


def spills_in_loops(cuobjdump: str, cubin: Path) -> int:
    """Stack accesses inside the innermost loops that multiply: what a spill costs is decided there, not around them."""
    out = subprocess.run([cuobjdump, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", out)]
    branches = [(at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in code]
    loops = [(int(to.group(1), 16), at) for at, to in branches if to and int(to.group(1), 16) < at]
    inside = lambda loop, pattern: sum(bool(re.search(pattern, text)) for at, text in code if loop[0] <= at <= loop[1])
    loops = [loop for loop in loops if inside(loop, r"MMA|FFMA")]
    innermost = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    return sum(inside(loop, r"\b(STL|LDL)\b") for loop in innermost)


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


# --- Triton ---


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the operator, the kernel, which configuration, and all that decides its machine code."""

    op: str
    label: str
    dtype: str
    kernel: Any
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    @property
    def key(self) -> str:
        return f"{self.op}/{self.kernel.__name__}/{self.label}/{self.dtype}"

    @property
    def identity(self) -> str:
        return repr((self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))

    @property
    def source(self) -> str:
        """A digest of all that the machine code is made from, but for compiler and architecture."""
        return digest(self.kernel.cache_key, self.identity)


def specialize(kernel: Any, arguments: dict) -> tuple[dict, dict, dict]:
    """Types, constants and divisibilities that Triton's launcher gives these arguments: 1 and None become constants,
    multiples of 16 (and all fresh tensors' addresses) are known as such."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if free and aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


@functools.cache
def launches(op: str, dtype: str, arch: str = "90") -> tuple[Launch, ...]:
    """The distinct launches of an operator's Triton module on an architecture, in its order."""
    module = importlib.import_module(f"internlm2_kernels._triton.{op}")
    found: dict[str, Launch] = {}
    calls: Counter = Counter()
    label = ""

    def record(kernel, arguments, options):
        calls[label, kernel] += 1
        which = label if calls[label, kernel] == 1 else f"{label}, launch {calls[label, kernel]}"
        launch = Launch(op, which, dtype, kernel, *specialize(kernel, arguments), options)
        found.setdefault(launch.identity, launch)

    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    common.record, common.recorded_architecture = record, int(arch)
    try:
        for label, call in module.audit(DTYPES[dtype], meta):  # noqa: B007 (`record` reads `label` from here)
            call()
    finally:
        common.record, common.recorded_architecture = None, 90
    return tuple(found.values())


def compile_triton(op: str, dtype: str, index: int, arch: str) -> dict[str, dict]:
    """Compiles one recorded launch; runs in a worker process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = launches(op, dtype, arch)[index]
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (usage,) = read_resources(triton_tool("cuobjdump"), cubin).values()
        spills = {"spills_in_loops": spills_in_loops(triton_tool("cuobjdump"), cubin)} if usage["stack"] else {}
    threads, shared = 32 * launch.options["num_warps"], compiled.metadata.shared
    facts = Facts(usage["registers"], usage["stack"], shared, threads,
                  occupancy(arch, usage["registers"], shared, threads), **read_ptx(compiled.asm["ptx"]))
    return {f"{launch.key}/sm_{arch}": asdict(facts) | spills | {"source": launch.source}}


def triton_tool(name: str) -> str:
    """A binary utility of the Triton wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


# --- CUDA C++ ---


def nvcc_version() -> str | None:
    """The version of the nvcc on the PATH, None without one."""
    if shutil.which("nvcc") is None:
        return None
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", out).group(1)


def cuda_digest(source: str) -> str:
    """A digest of a .cu file and of our headers that it includes, and they."""
    found: dict[Path, str] = {}
    waiting = [Path(source)]
    while waiting:
        path = waiting.pop().resolve()
        if path not in found and path.exists():
            found[path] = path.read_text()
            waiting += [path.parent / name for name in re.findall(r'^\s*#include "(.+?)"', found[path], re.M)]
    return digest(*(found[path] for path in sorted(found)))


def compile_cuda(source: str, arch: str) -> dict[str, dict]:
    """Compiles one .cu file; instances of one kernel template count as one row, its worst numbers.

    Shared memory is the static part: what a launch asks for dynamically does not stand in the machine code.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.fatbin"
        built = subprocess.run(["nvcc", "-O3", "-std=c++17", "-gencode", f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]",
                                "-fatbin", "-o", str(binary), source], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"nvcc cannot compile {source} for sm_{arch}:\n{built.stderr}")
        cuobjdump = triton_tool("cuobjdump")
        usage = read_resources(cuobjdump, binary)
        ptx = subprocess.run([cuobjdump, "-ptx", str(binary)], check=True, capture_output=True, text=True).stdout
    bodies = {name: body for name, body in re.findall(r"\.entry (\S+?)\((.*?)(?=\.entry |\Z)", ptx, re.S)}
    rows: dict[str, list[Facts]] = {}
    for name, numbers in usage.items():
        if name not in bodies:
            continue
        shared = max(0, numbers["shared"] - (0 if arch == "80" else 1024))  # from sm_90 on with the system's 1 KiB
        bound = re.search(r"\.maxntid\s+(\d+)", bodies[name])
        threads = int(bound.group(1)) if bound else 1024
        rows.setdefault(_kernel_name(name), []).append(
            Facts(numbers["registers"], numbers["stack"], shared, threads,
                  occupancy(arch, numbers["registers"], shared, threads), **read_ptx(bodies[name])))
    return {f"cuda/{Path(source).name}/{kernel}/sm_{arch}": {**_worst(all_facts), "instances": len(all_facts),
                                                              "source": cuda_digest(source)}
            for kernel, all_facts in rows.items()}


def _kernel_name(symbol: str) -> str:
    """The last identifier of a mangled (Itanium) kernel name, without its template arguments."""
    demangled = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    return re.search(r"(\w+)(?:<.*>)?\(", demangled.replace("(anonymous namespace)", "")).group(1)


def _worst(rows: list[Facts]) -> dict:
    """Highest use of every resource, lowest occupancy; access widths of the instance that uses most registers."""
    heaviest = max(rows, key=lambda facts: facts.registers)
    return {**asdict(heaviest), "stack_bytes": max(r.stack_bytes for r in rows),
            "shared_bytes": max(r.shared_bytes for r in rows), "occupancy": min(r.occupancy for r in rows),
            **{name: max(getattr(r, name) for r in rows) for name in ("mma", "wgmma", "tcgen05")}}
