"""Compiles every kernel for GPU architectures without a GPU, and reads from the machine code which resources it needs.

The functions of audited.py call the launchers of the package on tensors without storage, and the launches are recorded instead
of run. The audit therefore compiles exactly what the package launches.
"""

import ast
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from internlm2_kernels._triton import common

from . import sass

TRITON_ARCHS = ("80", "90", "100")
CUDA_ARCHS = ("80", "90a", "100a")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
# SHARED_LIMIT: bytes of shared memory that one block may request. _SHARED_TOTAL: bytes that a multiprocessor has, of which each
# block takes 1 KiB more than it requested (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {"80": 166_912, "90": 232_448, "100": 232_448}
_SHARED_TOTAL = {"80": 167_936, "90": 233_472, "100": 233_472}
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int8: "i8",
          torch.int32: "i32", torch.int64: "i64", torch.bool: "u1"}


@dataclass(frozen=True)
class Facts:
    """The resources of one compiled kernel.

    `loads` and `stores` count global accesses by their width in bits. `mma`, `wgmma` and `tcgen05` count tensor-core
    instructions; sm_80 has only `mma`, sm_90 also `wgmma`, sm_100 also `tcgen05`. `hot` is a text that counts the instructions
    of the hot loop for one thread: "loop" (or "all", for a kernel without loops), followed by five numbers: all instructions,
    tensor-core instructions, FFMA, FMUL and FADD together, MUFU.
    """

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
    hot: str


def occupancy(arch: str, registers: int, shared_bytes: int, threads: int) -> float:
    """The fraction of a multiprocessor's 64 warps that can be resident, as registers, shared memory and 32 blocks limit it."""
    warps = -(-threads // 32)
    by_registers = 65_536 // (-(-max(registers, 1) * 32 // 256) * 256 * warps)
    by_shared = _SHARED_TOTAL[arch.rstrip("a")] // (-(-shared_bytes // 128) * 128 + 1024)
    return round(min(by_registers, by_shared, 32, 64 // warps) * warps / 64, 3)


def read_ptx(text: str) -> dict[str, Any]:
    """Tensor-core instructions and the widths of global accesses in one kernel's PTX."""
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


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


# --- Triton ---


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the operator, the kernel, the configuration, and everything that decides its machine code."""

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
        """A digest of everything that decides the machine code except the compiler and the architecture."""
        return digest(*code_of(self.kernel), self.identity)


@functools.cache
def code_of(kernel: Any) -> tuple[str, ...]:
    """The source of a kernel, of all functions that it calls and of the constants that they use, without comments and
    docstrings: a change of these changes no machine code."""
    import triton
    import triton.language as tl

    found, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop()
        tree = ast.parse(textwrap.dedent(function.src))
        body = tree.body[0].body
        if ast.get_docstring(tree.body[0]) is not None and len(body) > 1:
            del body[0]
        names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & function.fn.__globals__.keys())
        values = {name: function.fn.__globals__[name] for name in names}
        constants = {name: value.value for name, value in values.items() if isinstance(value, tl.constexpr)}
        found[f"{function.fn.__module__}.{function.__name__}"] = f"{ast.unparse(tree)}\n{constants}"
        waiting += [value for value in values.values() if isinstance(value, triton.runtime.JITFunction)
                    and f"{value.fn.__module__}.{value.__name__}" not in found]
    return tuple(found[name] for name in sorted(found))


def specialize(kernel: Any, arguments: dict) -> tuple[dict, dict, dict]:
    """The types, constants and attributes that Triton's launcher derives from arguments: 1 and None become constants, and
    multiples of 16, such as the addresses of fresh tensors, are marked as divisible by 16."""
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
    """The distinct launches of an operator for an architecture, in the order of its function in audited.py."""
    from . import audited

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
        for label, call in getattr(audited, op)(DTYPES[dtype], meta):  # noqa: B007 (`record` reads `label` from here)
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
        (code,) = sass.disassemble(triton_tool("cuobjdump"), cubin).values()
    spills = {"spills_in_loops": sass.spills_in_loops(code)} if usage["stack"] else {}
    threads, shared = 32 * launch.options["num_warps"], compiled.metadata.shared
    facts = Facts(usage["registers"], usage["stack"], shared, threads,
                  occupancy(arch, usage["registers"], shared, threads), **read_ptx(compiled.asm["ptx"]),
                  hot=str(sass.hot_loop(code)))
    return {f"{launch.key}/sm_{arch}": asdict(facts) | spills | {"source": launch.source}}


def triton_tool(name: str) -> str:
    """A binary utility of the Triton wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


# --- CUDA C++ ---


def nvcc_version() -> str | None:
    """The version of the nvcc on the PATH, or None if there is none."""
    if shutil.which("nvcc") is None:
        return None
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", out).group(1)


def cuda_digest(source: str) -> str:
    """A digest of a .cu file and of all headers of this repository that it includes directly or indirectly."""
    found: dict[Path, str] = {}
    waiting = [Path(source)]
    while waiting:
        path = waiting.pop().resolve()
        if path not in found and path.exists():
            found[path] = path.read_text()
            waiting += [path.parent / name for name in re.findall(r'^\s*#include "(.+?)"', found[path], re.M)]
    return digest(*(found[path] for path in sorted(found)))


def compile_cuda(source: str, arch: str) -> dict[str, dict]:
    """Compiles one .cu file. All instances of a kernel template form one row with the worst numbers among them.

    Only static shared memory is counted: the machine code does not contain the dynamic amount that a launch requests.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.fatbin"
        built = subprocess.run(["nvcc", "-O3", "-std=c++17", "-gencode", f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]",
                                "-fatbin", "-o", str(binary), source], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"nvcc cannot compile {source} for sm_{arch}:\n{built.stderr}")
        cuobjdump = triton_tool("cuobjdump")
        usage = read_resources(cuobjdump, binary)
        code = sass.disassemble(cuobjdump, binary)
        ptx = subprocess.run([cuobjdump, "-ptx", str(binary)], check=True, capture_output=True, text=True).stdout
    bodies = {name: body for name, body in re.findall(r"\.entry (\S+?)\((.*?)(?=\.entry |\Z)", ptx, re.S)}
    rows: dict[str, list[Facts]] = {}
    for name, numbers in usage.items():
        if name not in bodies:
            continue
        # From sm_90 on the reported number includes the 1 KiB that CUDA reserves in every block; for sm_80 it does not.
        shared = max(0, numbers["shared"] - (0 if arch == "80" else 1024))
        bound = re.search(r"\.maxntid\s+(\d+)", bodies[name])
        threads = int(bound.group(1)) if bound else 1024
        rows.setdefault(_kernel_name(name), []).append(
            Facts(numbers["registers"], numbers["stack"], shared, threads,
                  occupancy(arch, numbers["registers"], shared, threads), **read_ptx(bodies[name]),
                  hot=str(sass.hot_loop(code[name]))))
    return {f"cuda/{Path(source).name}/{kernel}/sm_{arch}": {**_worst(all_facts), "instances": len(all_facts),
                                                              "source": cuda_digest(source)}
            for kernel, all_facts in rows.items()}


def _kernel_name(symbol: str) -> str:
    """The last identifier of a mangled (Itanium) kernel name, without its template arguments."""
    demangled = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    return re.search(r"(\w+)(?:<.*>)?\(", demangled.replace("(anonymous namespace)", "")).group(1)


def _worst(rows: list[Facts]) -> dict:
    """The highest use of every resource and the lowest occupancy; access widths and hot loop of the instance with the most
    registers."""
    heaviest = max(rows, key=lambda facts: facts.registers)
    return {**asdict(heaviest), "stack_bytes": max(r.stack_bytes for r in rows),
            "shared_bytes": max(r.shared_bytes for r in rows), "occupancy": min(r.occupancy for r in rows),
            **{name: max(getattr(r, name) for r in rows) for name in ("mma", "wgmma", "tcgen05")}}
