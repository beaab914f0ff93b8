"""The register peak: how many floating-point operations a second the processor's multiply-add instructions allow.

No matrix product can be faster than that, whereas another library's product can be beaten. registers.cpp holds the loops, which
are compiled into build/benchmarks/ with the compiler that builds the package.
"""

import ctypes
import hashlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("registers.cpp")
FOLDER = SOURCE.parents[1] / "build" / "benchmarks"
ISAS = ("avx2", "avx512", "avx512_bf16", "amx")  # a processor with one of them has all before it
SECONDS = 2e-3  # duration of one call: starting threads takes 0.1 ms, and a shared machine's speed drifts within seconds


@dataclass(frozen=True)
class Loop:
    """The multiply-add loop of one instruction set. A call runs `count` iterations on each of `threads` threads, `flops`
    floating-point operations in all."""

    library: ctypes.CDLL
    isa: str
    threads: int
    count: int
    flops: float

    def __call__(self) -> None:
        self.library.run(self.isa.encode(), self.count, self.threads)


def compiled(folder: Path = FOLDER) -> ctypes.CDLL:
    """The compiled loops, built on the first call for this source. Raises OSError or SubprocessError where that fails."""
    command = [*os.environ.get("CXX", "g++").split(), "-O2", "-std=c++17", "-fPIC", "-shared", "-pthread"]
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:12]
    path = folder / f"registers-{digest}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(SOURCE), "-o", str(partial)], check=True, capture_output=True, timeout=120)
        os.replace(partial, path)
    library = ctypes.CDLL(str(path))
    library.run.argtypes, library.run.restype = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int), ctypes.c_double
    return library


def loop(library: ctypes.CDLL, isa: str, threads: int) -> Loop:
    """The loop of one instruction set, with as many iterations as take about SECONDS."""
    count, took = 1000, 0.0
    while took < SECONDS / 2:
        count *= 2
        made = Loop(library, isa, threads, count, library.run(isa.encode(), count, threads))
        if made.flops < 0:
            raise OSError(f"the system does not let this process use {isa}")
        took = made.flops / rate(made, 5)  # the fastest of some calls, since other work may delay one
    count = max(1, int(count * SECONDS / took))
    return Loop(library, isa, threads, count, library.run(isa.encode(), count, threads))


def loops(best_isa: str, threads: int) -> dict[str, Loop]:
    """For each dtype the loop of the fastest instruction set that this machine offers, whether the kernels use it or not. Empty
    where there is none. bfloat16 has multiply-add instructions of its own; float16 is converted to float32."""
    offered = ISAS[:ISAS.index(best_isa) + 1] if best_isa else ()
    if not offered:
        return {}
    library = compiled()
    made = {isa: loop(library, isa, threads) for isa in offered}
    rates = {isa: rate(made[isa]) for isa in offered}
    fastest = lambda among: made[max((isa for isa in offered if isa in among), key=rates.__getitem__)]
    single = fastest(("avx2", "avx512"))
    return {"bfloat16": fastest(ISAS), "float32": single, "float16": single}


def rate(loop: Loop, calls: int = 25) -> float:
    """Operations a second, by the fastest of `calls` calls."""
    best = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        loop()
        best = min(best, time.perf_counter() - start)
    return loop.flops / best
