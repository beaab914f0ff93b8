"""python -m internlm2_kernels doctor | ops [NAME ...] [--explain]

  python -m internlm2_kernels doctor                  what is installed, what loaded or why not, what a large tensor costs,
                                                      a self-test of each operator
  python -m internlm2_kernels ops                     operators and the backends that can run here
  python -m internlm2_kernels ops rms_norm --explain  what is chosen for a CPU and for a CUDA tensor, and why not the others
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys


def versions() -> list[tuple[str, str]]:
    import torch

    from . import __version__
    rows = [("internlm2_kernels", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for name in ("triton", "numpy", "einops"):
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def devices() -> list[tuple[str, str]]:
    import torch

    rows = [("system", f"{platform.system()} {platform.release()} {platform.machine()}"), ("processor", processor()),
            ("threads", str(torch.get_num_threads()))]
    if not torch.cuda.is_available():
        rows.append(("GPU", "none visible to torch" if torch.backends.cuda.is_built() else "this torch is a CPU build"))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.1f} GiB"))
    return rows


def library() -> list[tuple[str, str]]:
    """Facts about the compiled library, or the reason why it was not loaded."""
    from ._registry import _C, INTERPRETED, NATIVE_ERROR

    triton = "found" if importlib.util.find_spec("triton") else "not installed: its operators are not usable"
    rows = [("triton", triton + (", interpreted on the CPU (TRITON_INTERPRET=1)" if INTERPRETED else ""))]
    if _C is None:
        return [("compiled library", f"not loaded: {NATIVE_ERROR}"), ("instruction set", "-"), *rows]
    info = _C.build_info()
    in_use, best = _C.cpu_isa(), _C.best_cpu_isa()
    return [("compiled library", f"{_C.__file__}, by {info['compiler']} against torch {info['torch']}"),
            ("instruction set", f"{in_use} in use, {best} the best here" if best else
             "none: this processor has no AVX2, the cpp backend is not usable"),
            ("CUDA half", f"sm_{info['cuda'].replace(';', ', sm_')}" if info["cuda"] else "built without nvcc"), *rows]


def fresh_tensor(size_bytes: int = 2**26, calls: int = 12) -> tuple[float, float | None]:
    """(bytes read and written per second, page faults a call) of `clone()` of a tensor: the median of the last calls, since an
    allocator may need some calls before it reuses a block. Faults are None where the system does not count them."""
    import statistics
    import time

    import torch

    try:
        import resource
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    except ImportError:  # Windows
        faults = None
    source, seconds, counts = torch.ones(size_bytes // 4), [], []
    for _ in range(calls):
        before, start = faults() if faults else 0, time.perf_counter()
        source.clone()
        seconds.append(time.perf_counter() - start)
        counts.append((faults() if faults else 0) - before)
    half = calls // 2
    return 2 * size_bytes / statistics.median(seconds[half:]), statistics.median(counts[half:]) if faults else None


def present_tensor(size_bytes: int = 2**26, calls: int = 12) -> float:
    """Bytes read and written per second when a tensor is copied into memory that is present."""
    import statistics
    import time

    import torch

    source, seconds = torch.ones(size_bytes // 4), []
    target = source.clone()
    for _ in range(calls):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * size_bytes / statistics.median(seconds[calls // 2:])


def huge_pages() -> str:
    """Whether this system and this process use pages of 2 MiB for large tensors."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            mode = file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"
    asked = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    return f"{mode}, torch asks for them" if asked else f"{mode}, torch does not ask for them (THP_MEM_ALLOC_ENABLE)"


def cpu_memory() -> list[tuple[str, str]]:
    """What a large fresh tensor costs in this process, now and after `memory.keep_freed_memory()`, and what would help."""
    from . import memory

    told = lambda rate, faults: f"{rate / 1e9:.1f} GB/s" + ("" if faults is None else f", {faults:,.0f} page faults a call")
    present, default = present_tensor(), fresh_tensor()
    done = memory.keep_freed_memory()
    kept = fresh_tensor()
    memory.release()
    rows = [("allocator", memory.report().allocator), ("huge pages", huge_pages()),
            ("copy 64 MiB", f"{told(present, None)} into memory that is present"),
            ("fresh 64 MiB", f"{told(*default)}, by clone()"),
            ("kept 64 MiB", f"{told(*kept)}, by clone() after keep_freed_memory()" if done.kept else done.what)]
    gain = kept[0] / default[0]
    if default[1] is not None and default[1] < 2**26 / 2**21 / 2:
        help_ = "nothing: a fresh tensor causes no page faults here"
    elif done.kept and gain > 1.2:
        help_ = f"internlm2_kernels.memory.keep_freed_memory(): large fresh tensors become {gain:.1f} times as fast"
    elif done.kept:
        help_ = "nothing that was tried: page faults cost little here"
    elif sys.platform == "linux":
        help_ = "tcmalloc in LD_PRELOAD, or THP_MEM_ALLOC_ENABLE=1 where huge pages are madvise or always"
    else:
        help_ = "no setting is known for this system"
    return [*rows, ("what helps", help_)]


def backend_table(explain: bool, names: list[str]) -> list[str]:
    """Lines that list, for each operator, its usable backends on each type of device, the automatic choice first. With
    `explain` also the reasons why other backends are not usable."""
    from ._registry import BACKENDS, OPS, why_not

    lines, names = [], names or list(OPS)
    width, backends = max(map(len, OPS)), max(len(" > ".join(op.usable["cpu"])) for op in OPS.values())
    for name in names:
        if name not in OPS:
            raise SystemExit(f"ops: NAME: expected one of {', '.join(OPS)}, got {name!r}")
        op = OPS[name]
        lines.append(f"{name:<{width}}  cpu: {' > '.join(op.usable['cpu']):<{backends}}  cuda: {' > '.join(op.usable['cuda'])}")
        if explain:
            lines.append(f"  {op.summary}; {op.source}")
            for device in ("cpu", "cuda"):
                lines.append(f"  on {device}: {op.usable[device][0]} is chosen, the first of its order that can run")
                lines += [f"    not {backend}: {why_not(op, backend, device)}" for backend in BACKENDS
                          if why_not(op, backend, device)]
    return lines


def self_test(report) -> bool:
    """Runs the smoke cases of every operator on every usable backend and checks them by the error ladder (testing.py)."""
    import torch

    from ._registry import OPS
    from .testing import Draw, draw_upstream, ladder, run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sound, width = True, max(map(len, OPS))
    for op in OPS.values():
        for where in {torch.device("cpu"), device}:
            for backend in op.usable[where.type]:
                worst, problem = 0.0, ""
                try:
                    for case in (c for c in op.workload.cases if c.kind == "smoke"):
                        for dtype in op.dtypes:
                            generator = torch.Generator(device=where).manual_seed(0)
                            sample = op.workload.sample(case, dtype, where, generator)
                            upstream = draw_upstream(op, sample, 1.0, generator)
                            rungs = ladder(op, [Draw(sample, run(op, sample, backend, upstream), upstream)])
                            worst = max([worst, *(rung.ratio for rung in rungs)])
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                passed = not problem and worst <= 1
                sound &= passed
                report(f"{op.name:<{width}}  {where.type:<5} {backend:<10} {'ok' if passed else 'FAILED'}   "
                       + (problem or f"largest error {worst:.2f} of what is allowed"))
    return sound


def doctor() -> int:
    for title, rows in (("Versions", versions()), ("Devices", devices()), ("Loaded", library()),
                        ("CPU memory", cpu_memory())):
        print(title)
        print("\n".join(f"  {name:<18} {value}" for name, value in rows))
    print("Operators, for each device the usable backends, the automatic choice first")
    print("\n".join(f"  {line}" for line in backend_table(False, [])))
    print("Self-test")
    sound = self_test(lambda line: print(f"  {line}", flush=True))
    print("all operators are sound" if sound else "AT LEAST ONE OPERATOR IS NOT SOUND: see the self-test above")
    return 0 if sound else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m internlm2_kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, devices, what loaded or why not, self-test; exit status 1 if one fails")
    ops = commands.add_parser("ops", help="operators x backends")
    ops.add_argument("names", nargs="*", metavar="NAME")
    ops.add_argument("--explain", action="store_true", help="why each backend is or is not chosen")
    args = parser.parse_args(argv)
    if args.command == "ops":
        print("\n".join(backend_table(args.explain, args.names)))
        return 0
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
