"""`python -m benchmarks.gpu` (`make gpu VENV=none`): build, check and measure on a machine with a GPU, in one command."""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("build", "checks", "sanitizer", "peaks", "bench", "train")
LIMITS_S = {"build": 180, "checks": 360, "sanitizer": 120, "peaks": 60, "bench": 570, "train": 300}  # all within 22 minutes
NEEDED_GIB = 8  # the largest benchmark row with its cold copies, and room for the checks
EXAMPLES = """phases, in this order:
  build    python setup.py build_ext --inplace, in this interpreter, without network
  checks   the shared checks of every operator on CUDA tensors, backends triton and cuda
  sanitizer  compute-sanitizer, memcheck and racecheck, over small cases of every CUDA kernel
  peaks    copy, read and bf16 matrix rates of this GPU: what everything is measured against
  bench    python -m benchmarks --device cuda, quick unless --full
  train    python -m internlm2 demo --device cuda: a training run, kernels beside plain PyTorch

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
    p.add_argument("--no-limit", action="store_true", help="let a phase take longer than its share of 22 minutes")
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


def stream(command: list[str], log: Path, limit_s: float | None, mode: str = "w") -> int:
    """Run `command` in the project's root, each line to the terminal and to `log` as it comes; its exit status, 124 where it
    was ended after `limit_s`."""
    print("$ " + " ".join(command), flush=True)
    with log.open(mode) as file, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                                 text=True, bufsize=1) as process:
        late = threading.Event()
        timer = threading.Timer(limit_s or threading.TIMEOUT_MAX, lambda: (late.set(), process.terminate()))
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
        except KeyboardInterrupt:
            process.terminate()
            raise
        finally:
            timer.cancel()
    return 124 if late.is_set() else process.returncode


def limit_of(args: argparse.Namespace, phase: str) -> float | None:
    return None if args.no_limit else LIMITS_S[phase]


def build(args: argparse.Namespace) -> int:
    return stream([sys.executable, "setup.py", "build_ext", "--inplace"], args.out / "build.log",
                  limit_of(args, "build"))


def checks(args: argparse.Namespace) -> int:
    chosen = ["-k", " or ".join(args.op)] if args.op else ["--require-cells"]
    tests = ["tests/test_ops.py", "tests/test_ops_bits.py", "tests/test_ops_autograd.py", "tests/ops"]
    return stream([sys.executable, "-u", "-m", "pytest", *tests, "--device", "cuda", *chosen], args.out / "checks.log",
                  limit_of(args, "checks"))


def sanitizer(args: argparse.Namespace) -> int:
    """A tool that is not there or does not run on this machine is said in a line and is no failure."""
    status, log = 0, args.out / "sanitizer.log"
    log.write_text("")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed here: left out", flush=True)
        return 0
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.sanitize",
                   *[part for name in args.op or () for part in ("--op", name)]]
        found = stream(command, log, limit_of(args, "sanitizer") and limit_of(args, "sanitizer") / 2, "a")
        if found and "not supported" in log.read_text().lower():
            print(f"compute-sanitizer refuses this machine: {check} left out", flush=True)
        else:
            status = status or found
    return status


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
    return stream(command, args.out / "bench.log", limit_of(args, "bench"))


def train(args: argparse.Namespace) -> int:
    return stream([sys.executable, "-u", "-m", "internlm2", "demo", "--device", "cuda", "--out", str(args.out / "demo")],
                  args.out / "train.log", limit_of(args, "train"))


RUN = {"build": build, "checks": checks, "sanitizer": sanitizer, "peaks": peaks, "bench": bench, "train": train}


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
        status = RUN[name](args)
        results.append(f"{name}: {'ok' if status == 0 else f'FAILED (exit status {status})'}, "
                       f"{time.perf_counter() - start:.0f} s")
        print(f"== {results[-1]}", flush=True)
        (args.out / "summary.txt").write_text("\n".join(results) + "\n")
    print("\n".join(["", *results, f"logs and records: {args.out}"]), flush=True)
    return int(any("FAILED" in line for line in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
