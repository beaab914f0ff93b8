"""python -m tools.peers: hot-loop instructions of our kernels beside those of other Triton libraries, compiled the same way.

The peers are liger-kernel and flash-attn-triton, whose attention kernels are those of Triton's fused-attention tutorial with
dropout added (switched off here). The installed packages are loaded when the command runs; nothing of them is stored but the
counts. The figures are static: one thread's instructions for one element (of the scores, for attention), read from the machine
code. They say nothing about memory traffic, and no kernel is run. A kernel that makes several passes counts all of them.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import sass
from .compile_kernels import TRITON_ARCHS, launches, specialize, triton_tool

TABLE = Path(__file__).with_name("static_peers.json")
EXAMPLES = """examples:
  python -m tools.peers            print the recorded comparison
  python -m tools.peers --write    compile both sides and record the counts; needs the packages:
                                   pip install --no-deps --target FOLDER liger-kernel flash-attn-triton
                                   PYTHONPATH=FOLDER python -m tools.peers --write"""
FIELDS = ("instructions", *sass.KINDS)


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is launched, and how many elements one thread processes in a piece of its code."""

    function: Any
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    elements: Callable[[sass.Loop, int], float]
    loops: Callable[[list[sass.Instruction]], list[sass.Loop]]


def scores(rows: int, keys: int) -> Callable[[sass.Loop, int], float]:
    """Counts the elements of one thread, for a kernel whose loop computes a tile of rows x keys attention scores."""
    return lambda loop, threads: rows * keys / threads


def wide_accesses(name: str, tensors: int = 1) -> Callable[[sass.Loop, int], float]:
    """Counts the elements of one thread by its 128-bit instructions `name` (8 elements of 16 bits each), divided by the number
    of `tensors` that these read or write."""
    return lambda loop, threads: sum(i.is_a(name) and ".128" in i.text for i in loop.path) * 8 / tensors


def hot(code: list[sass.Instruction]) -> list[sass.Loop]:
    return [sass.hot_loop(code)]


def every_loop(code: list[sass.Instruction]) -> list[sass.Loop]:
    return [sass.Loop(loop, True) for loop in sass.innermost_loops(code)]


def count(kernels: list[Kernel], arch: str) -> dict[str, float]:
    """Instructions for one element, summed over the kernels and their loops."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    total = dict.fromkeys(FIELDS, 0.0)
    for kernel in kernels:
        source = ASTSource(kernel.function, kernel.signature, kernel.constants, kernel.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=kernel.options)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            (code,) = sass.disassemble(triton_tool("cuobjdump"), cubin).values()
        for loop in kernel.loops(code):
            elements = kernel.elements(loop, 32 * kernel.options["num_warps"])
            if elements:
                total = {field: total[field] + value / elements for field, value in loop.counts().items()}
    return {field: round(value, 2) for field, value in total.items()}


def ours(op: str, label: str, arch: str, names: tuple[str, ...], elements: Any, loops: Any = hot) -> list[Kernel]:
    """The kernels `names` of our operator in bfloat16, as launched for `label` in audited.py. Where `elements` is None, a loop
    computes the tile of scores whose size is in the launch's constants."""
    found = []
    for launch in launches(op, "bfloat16", arch):
        if launch.label.split(", launch")[0] == label and launch.kernel.__name__ in names:
            named = {launch.kernel.arg_names[index]: value for (index,), value in launch.constants.items()}
            found.append(Kernel(launch.kernel, launch.signature, launch.constants, launch.attributes, launch.options,
                                elements or scores(named["BLOCK_M"], named["BLOCK_N"]), loops))
    if not found:
        raise LookupError(f"{op}: no launch {label!r} of {names}")
    return found


def recorded(call: Callable[[], Any], elements: Any, loops: Any = hot) -> list[Kernel]:
    """The kernels that a function of another library launches, recorded instead of run."""
    from triton.runtime import JITFunction

    found = []

    def run(function, *args, grid, warmup, num_warps=4, num_stages=3, **named):
        arguments = inspect.signature(function.fn).bind(*args, **named)
        arguments.apply_defaults()
        found.append(Kernel(function, *specialize(function, arguments.arguments),
                            {"num_warps": num_warps, "num_stages": num_stages}, elements, loops))

    original, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = original
    return found


@functools.cache
def tutorial() -> Any:
    """The module of the tutorial's kernels, loaded without its package, which needs a GPU. The module imports descriptors that
    newer Triton has moved, and does not use them."""
    sys.modules.setdefault("triton.tools.experimental_descriptor", types.ModuleType("experimental_descriptor"))
    folder = importlib.util.find_spec("flash_attn_triton").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("attention_kernel", Path(folder) / "triton_kernel" / "attention_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tutorial_launch(backward: bool) -> None:
    """The tutorial's kernels for 8192 tokens, 32 heads of 128, causal; forward with the tile that ours has on sm_90."""
    kernels = tutorial()
    q = torch.empty(1, 32, 8192, 128, dtype=torch.bfloat16, device="meta")
    rows = torch.empty(1, 32, 8192, device="meta")
    if backward:
        kernels._attn_bwd[(1,)](q, q, q, 0.1, q, q, q, q, rows, rows, 0.0, 0, *q.stride(), 32, 8192, BLOCK_M1=32, BLOCK_N1=128,
                                BLOCK_M2=128, BLOCK_N2=32, BLK_SLICE_FACTOR=2, HEAD_DIM=128, USE_DROPOUT=False, CAUSAL=True,
                                IS_BF16=True, num_warps=4, num_stages=5)
    else:
        kernels._attn_fwd.fn[(1,)](q, q, q, 0.1, 0.0, 0, rows, q, *(4 * q.stride()), 1, 32, 8192, HEAD_DIM=128, BLOCK_M=128,
                                   BLOCK_N=64, STAGE=3, USE_DROPOUT=False, IS_BF16=True, num_warps=8, num_stages=3)


def liger_cross_entropy() -> None:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    logits = torch.zeros(8, 92544, dtype=torch.bfloat16, requires_grad=True)
    cross_entropy_forward(logits, torch.zeros(8, dtype=torch.int64), None, -100, 0.0, 0.0, "mean", None, False)


def liger_swiglu(backward: bool) -> None:
    from liger_kernel.ops import swiglu

    x = torch.zeros(8, 8192, dtype=torch.bfloat16)
    swiglu.swiglu_backward(x, x, x) if backward else swiglu.swiglu_forward(x, x)


def unmasked_loops(code: list[sass.Instruction]) -> list[sass.Loop]:
    """The tutorial's backward has a masked loop and an unmasked one for dk and dv, and two for dq. The unmasked ones have the
    larger tile, and thus more exponentials."""
    loops = [sass.Loop(sass.hot_path(loop), True) for loop in sass.innermost_loops(code)]  # in the order of their addresses
    half = len(loops) // 2
    return [max(part, key=lambda x: x.count("MUFU")) for part in (loops[:half], loops[half:])]


def comparisons(arch: str) -> Iterator[tuple[str, str, list[Kernel], list[Kernel]]]:
    """Yields each comparison: (what is compared, the peer's name, our kernels, the peer's kernels)."""
    version = functools.cache(importlib.metadata.version)
    triton_tutorial = f"flash-attn-triton {version('flash-attn-triton')} (Triton's tutorial)"
    liger, loads = f"liger-kernel {version('liger-kernel')}", wide_accesses("LDG")
    forward, dkdv, dq = (f"flash_attention_{name}_kernel" for name in ("fwd", "bwd_dkdv", "bwd_dq"))
    yield ("attention forward, d 128", triton_tutorial, ours("flash_attention", "d 128", arch, (forward,), None),
           recorded(lambda: tutorial_launch(False), scores(128, 64)))
    yield ("attention backward, d 128", triton_tutorial,
           ours("flash_attention", "d 128", arch, (dkdv, dq), None),
           recorded(lambda: tutorial_launch(True), scores(128, 32), unmasked_loops))
    yield ("cross-entropy and its gradient, V 92544", liger,
           ours("cross_entropy", "vocabulary 92544, gradient", arch, ("cross_entropy_fwd_kernel",), loads, every_loop),
           recorded(liger_cross_entropy, loads, every_loop))
    for name, backward, tensors in (("forward", False, 2), ("backward", True, 3)):
        kernel, loads = f"swiglu_{'bwd' if backward else 'fwd'}_kernel", wide_accesses("LDG", tensors)
        yield (f"swiglu {name}, 8192 columns", liger, ours("swiglu", "cols 8192", arch, (kernel,), loads),
               recorded(lambda backward=backward: liger_swiglu(backward), loads))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.peers", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="compile both sides and record the counts")
    if parser.parse_args(argv).write:
        import triton

        rows = [{"what": what, "peer": peer, "arch": f"sm_{arch}", "ours": count(our_kernels, arch),
                 "theirs": count(their_kernels, arch)}
                for arch in TRITON_ARCHS for what, peer, our_kernels, their_kernels in comparisons(arch)]
        lines = ",\n".join(json.dumps(row) for row in rows)
        note = "static: compiled, not run; instructions of one thread for one element; written by python -m tools.peers --write"
        TABLE.write_text(f'{{"note": "{note}",\n"triton": "{triton.__version__}",\n"rows": [\n{lines}\n]}}\n')
    print_table()
    return 0


def print_table() -> None:
    from rich.console import Console
    from rich.table import Table

    recorded_rows = json.loads(TABLE.read_text())
    table = Table(title=f"static: compiled, not run (triton {recorded_rows['triton']}); instructions of one thread for one "
                        "element, ours / peer")
    for name in ("kernel", "peer", "arch", "all", "tensor", "FFMA", "FMUL, FADD", "MUFU"):
        table.add_column(name, overflow="fold")
    for row in recorded_rows["rows"]:
        table.add_row(row["what"], row["peer"], row["arch"],
                      *(f"{row['ours'][field]:.2f} / {row['theirs'][field]:.2f}" for field in FIELDS))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
