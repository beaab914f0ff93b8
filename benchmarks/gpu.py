"""`python -m benchmarks.gpu` (`make gpu VENV=none`): build, check and measure on a machine with a GPU, in one command."""

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("build", "checks", "peaks", "bench")
NEEDED_GIB = 8  # the largest benchmark row with its cold copies, and room for the checks
EXAMPLES = """phases, in this order:
  build    python setup.py build_ext --inplace, in this interpreter, without network
  checks   the shared checks of every operator on CUDA tensors, backends triton and cuda
  peaks    copy, read and bf16 matrix rates of this GPU: what everything is measured against
  bench    python -m benchmarks --device cuda, quick unless --full

examples:
  python -m benchmarks.gpu
  python -m benchmarks.gpu --phases build,peaks --out /tmp/gpu
  python -m benchmarks.gpu --phases bench --full --op rms_norm
exit status: 0 all phases passed, 1 a phase failed, 2 there is no GPU to run on"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--phases", default=",".join(PHASES), help=f"comma-separated, of {', '.join(PHASES)} (default: all)")
    p.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for logs and records")
    p.add_argument("--full", action="store_true", help="benchmark every size instead of the first of each operator")
    p.add_argument("--op", action="append", metavar="NAME", help="check and benchmark only this operator (repeatable)")
    return p


def unusable() -> str | None:
    """Why there is no GPU to run on, in one line; None if there is one."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in this interpreter"
    import torch
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device (no GPU, or its driver does not answer)"
        free, total = torch.cuda.mem_get_info(0)
    except (RuntimeError, AssertionError) as error:
        return f"the GPU does not answer: {str(error).splitlines()[0]}"
    if free < NEEDED_GIB * 2**30:
        return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU memory are free, {NEEDED_GIB} are needed"
    return None


def stream(command: list[str], log: Path) -> int:
    """Run `command` in the project's root, each line to the terminal and to `log` as it comes; its exit status."""
    print("$ " + " ".join(command), flush=True)
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                                 text=True, bufsize=1) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
        except KeyboardInterrupt:
            process.terminate()
            raise
    return process.returncode


def build(args: argparse.Namespace) -> int:
    return stream([sys.executable, "setup.py", "build_ext", "--inplace"], args.out / "build.log")


def checks(args: argparse.Namespace) -> int:
    chosen = ["-k", " or ".join(args.op)] if args.op else ["--require-cells"]
    tests = ["tests/test_ops.py", "tests/test_ops_bits.py", "tests/test_ops_autograd.py", "tests/ops"]
    return stream([sys.executable, "-u", "-m", "pytest", *tests, "--device", "cuda", *chosen], args.out / "checks.log")


def peaks(args: argparse.Namespace) -> int:
    import torch

    from internlm2_kernels.timing import measure_peaks

    from .record import gpu_state
    device = torch.device("cuda")
    measured = measure_peaks(device)
    lines = [f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}",
             f"copy   {measured.copy_bytes_per_s / 1e12:8.3f} TB/s   (clone of 1 GiB, bytes read plus written)",
             f"read   {measured.read_bytes_per_s / 1e12:8.3f} TB/s   (sum of 1 GiB)",
             f"matrix {measured.matmul_flops_per_s / 1e12:8.1f} TFLOP/s (bf16, 8192 cubes, random data)", gpu_state()]
    (args.out / "peaks.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    torch.cuda.empty_cache()
    return 0


def bench(args: argparse.Namespace) -> int:
    options = [*([] if args.full else ["--quick"]), *[part for name in args.op or () for part in ("--op", name)]]
    command = [sys.executable, "-u", "-m", "benchmarks", "--device", "cuda", "--out", str(args.out / "results"), *options]
    return stream(command, args.out / "bench.log")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    args.out = args.out.resolve()
    phases = [name for name in args.phases.split(",") if name]
    unknown = [name for name in phases if name not in PHASES]
    if unknown or not phases:
        parser().error(f"--phases: expected some of {', '.join(PHASES)}, got {args.phases!r}")
    reason = unusable()
    if reason:
        print(f"python -m benchmarks.gpu: no GPU to run on: {reason}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in PHASES:
        if name not in phases:
            continue
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        status = {"build": build, "checks": checks, "peaks": peaks, "bench": bench}[name](args)
        results.append(f"{name}: {'ok' if status == 0 else f'FAILED (exit status {status})'}, "
                       f"{time.perf_counter() - start:.0f} s")
        print(f"== {results[-1]}", flush=True)
        (args.out / "summary.txt").write_text("\n".join(results) + "\n")
    print("\n".join(["", *results, f"logs and records: {args.out}"]), flush=True)
    return int(any("FAILED" in line for line in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
