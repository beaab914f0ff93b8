"""python -m internlm2_kernels doctor | ops [NAME ...] [--explain]

  python -m internlm2_kernels doctor                  what is installed, what loaded or why not, a self-test of each operator
  python -m internlm2_kernels ops                     operators and the backends that can run here
  python -m internlm2_kernels ops rms_norm --explain  what is chosen for a CPU and for a CUDA tensor, and why not the others
"""

import argparse
import importlib.metadata
import importlib.util
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
    for title, rows in (("Versions", versions()), ("Devices", devices()), ("Loaded", library())):
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
