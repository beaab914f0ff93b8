"""`python3 -m benchmarks.gpu` (`make gpu`): build, check and measure on a machine with a GPU, in one command.

It runs in the active interpreter, without a virtual environment and without a network.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("build", "checks", "sanitizer", "peaks", "bench", "train")
FURTHER = ("counters",)
# Groups of phases with the seconds that each group shares; without counters they add up to 22 minutes.
SHARES = ((("build", "checks"), 360), (("sanitizer",), 120), (("peaks", "bench"), 600), (("train",), 240), (("counters",), 240))
REPORT_S = 45.0  # reserved at the end of the benchmarks' time for the running row and the report
SILENT_S = 180.0  # a benchmark that prints nothing for so long is taken to hang: it is ended, and resumed after that operator
GRACE_S = 20.0  # between SIGINT, which asks a process to end, and SIGKILL
LARGEST_LOG_BYTES = 12 * 2**20
LATE, SILENT, DEVICE_LOST = 124, 125, 3
NEEDED_GIB = {"checks": 8, "sanitizer": 4, "peaks": 8, "bench": 30, "train": 8, "counters": 30}
NEEDED_MODULES = {"build": ("setuptools", "ninja"), "checks": ("pytest", "hypothesis", "einops", "pytest_timeout"),
                  "bench": ("rich", "matplotlib", "pytest_benchmark", "psutil"),
                  "train": ("rich", "matplotlib", "safetensors", "sentencepiece")}
# The shared checks and the tests of GPU kernels; the rest of tests/ needs no GPU.
TESTS = ("tests/shared", "tests/triton/test_triton_kernels.py", "tests/triton/test_triton_attention.py",
         "tests/triton/test_triton_lists.py", "tests/triton/test_triton_losses.py", "tests/ops/test_linear_logprobs.py",
         "tests/ops/test_errors.py", "tests/ops/test_errors_losses.py")
METRICS = ("gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
           "sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__inst_executed_pipe_tensor.sum",
           "sm__warps_active.avg.pct_of_peak_sustained_active", "launch__registers_per_thread",
           "l1tex__data_bank_conflicts_pipe_lsu.sum")
EXAMPLES = """phases, in this order:
  build      python setup.py build_ext --inplace, in this interpreter
  checks     the shared checks of every operator on CUDA tensors, backends triton and cuda, fresh random inputs
  sanitizer  compute-sanitizer, memcheck and racecheck, over small cases of every CUDA kernel
  peaks      copy, read and matrix rates of this GPU: what everything is measured against
  bench      python -m benchmarks --device cuda, bfloat16, the most important sizes first
  train      python -m internlm2 demo --device cuda: a training run, kernels beside plain PyTorch
  counters   (only where asked for) ncu over one call of each operator at its benchmark sizes

build and checks share 6 minutes, yardsticks and benchmarks 10, everything 22; what one leaves the next may use. A phase
that runs out of time keeps what it has: every row is on disk as soon as it is measured, and --resume goes on from there.

in two calls of at most 10 minutes, results in $OUT (for the second the first one's are copied back to $OUT before):
  python3 -m benchmarks.gpu --phases build,checks,sanitizer --minutes 9.5 --out "$OUT"
  python3 -m benchmarks.gpu --phases build,peaks,bench --minutes 9.5 --resume --out "$OUT"
further examples:
  python3 -m benchmarks.gpu
  python3 -m benchmarks.gpu --phases bench --op rms_norm --op swiglu --full
  python3 -m benchmarks.gpu --phases checks --op flash_attention --seed 7
  python3 -m benchmarks.gpu --phases counters --op flash_attention
exit status: 0 all phases passed, 1 a phase failed, 2 it cannot run here"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__, epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--phases", default=",".join(PHASES), help=f"comma-separated, of {', '.join(PHASES + FURTHER)} "
                   f"(default: all but {', '.join(FURTHER)})")
    p.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for results: at most 8 files")
    p.add_argument("--minutes", type=float, default=22.0, help="for all phases together (default: 22)")
    p.add_argument("--no-limit", action="store_true", help="let phases take as long as they need")
    p.add_argument("--resume", action="store_true", help="benchmark only what the record in --out lacks")
    p.add_argument("--full", action="store_true", help="benchmark float32 too")
    p.add_argument("--seed", type=int, help="of the checks' random inputs (default: another at every run)")
    p.add_argument("--commit", metavar="ID", help="the commit to record where git does not know this copy of the tree")
    p.add_argument("--op", action="append", metavar="NAME", help="check and benchmark only this operator (repeatable)")
    return p


def unusable(phases: list[str]) -> str | None:
    """Why these phases cannot run here, in one line; None if they can."""
    needed = dict.fromkeys(("torch", *(name for phase in phases for name in NEEDED_MODULES.get(phase, ()))))
    missing = [name for name in needed if importlib.util.find_spec(name) is None
               and not (name == "ninja" and shutil.which(name))]
    if missing:
        return f"not installed in this interpreter: {', '.join(missing)}"
    reason = _gpu_missing(max((NEEDED_GIB.get(phase, 0) for phase in phases), default=0))
    return reason and f"no GPU to run on: {reason}"


def _gpu_missing(gib: int) -> str | None:
    import torch
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        with warnings.catch_warnings(record=True) as caught:  # torch only warns of a driver that is too old
            warnings.simplefilter("always")
            there = torch.cuda.is_available()
        if not there:
            why = str(caught[0].message).splitlines()[0] if caught else "no GPU, or its driver does not answer"
            return f"torch {torch.__version__} sees no CUDA device ({why})"
        major, minor = torch.cuda.get_device_capability(0)
        free, total = torch.cuda.mem_get_info(0)
    except (RuntimeError, AssertionError) as error:
        return f"the GPU does not answer: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if major < 8:
        return f"{torch.cuda.get_device_name(0)} has compute capability {major}.{minor}, 8.0 is needed"
    if free < gib * 2**30:
        return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU memory are free, {gib} are needed"
    return None


class Log:
    """The file that collects what all phases print, and the summary beside it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path, self.summary = folder, folder / "log.txt", []

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")

    def note(self, text: str) -> None:
        """Print a line and add it to the summary."""
        self.say(text)
        self.summary.append(text)
        (self.folder / "summary.txt").write_text("\n".join(self.summary) + "\n")

    def stream(self, command: list[str], limit_s: float | None, silent_s: float | None = None, **env: str) -> tuple[int, str]:
        """Run `command` in the project's root and pass each line on to the terminal and the log as it comes.

        Returns (exit status, output). The status is LATE where the command was ended after `limit_s`, and SILENT where it
        printed nothing for `silent_s`. PYTHONUNBUFFERED is set in the environment, which a process that restarts itself
        keeps: if it buffered its output, it would seem silent while it works.
        """
        self.say("$ " + " ".join([*(f"{k}={v}" for k, v in env.items()), *command]))
        lines = []
        with self.path.open("a") as file, subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | env, start_new_session=True) as process:
            watch = Watch(process, limit_s, silent_s)
            try:
                for line in process.stdout:
                    watch.heard = time.monotonic()
                    print(line, end="", flush=True)
                    lines.append(line)
                    if file.tell() < LARGEST_LOG_BYTES:
                        file.write(line)
                        file.flush()
                process.wait()
            except BaseException:
                watch.end(0)
                raise
            finally:
                watch.stop.set()
        return watch.verdict or process.returncode, "".join(lines)


class Watch(threading.Thread):
    """Ends a process and all that it started: first by SIGINT, on which it can still write its report, then by SIGKILL."""

    def __init__(self, process: subprocess.Popen, limit_s: float | None, silent_s: float | None) -> None:
        super().__init__(daemon=True)
        self.process, self.silent_s = process, silent_s
        self.heard, self.stop, self.verdict = time.monotonic(), threading.Event(), 0
        self.until = None if limit_s is None else self.heard + limit_s
        self.start()

    def run(self) -> None:
        while not self.stop.wait(0.2):
            now = time.monotonic()
            late = self.until is not None and now > self.until
            if late or (self.silent_s is not None and now - self.heard > self.silent_s):
                self.end(LATE if late else SILENT)
                return

    def end(self, verdict: int) -> None:
        self.verdict = verdict
        self.process.send_signal(signal.SIGINT)  # at SIGINT pytest lists its failures so far, and the benchmarks write a report
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # the process leads a group of its own: this ends its children too
        except ProcessLookupError:
            pass


def each(args: argparse.Namespace) -> list[str]:
    return [part for name in args.op or () for part in ("--op", name)]


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1]


def build(args: argparse.Namespace, log: Log, limit_s: float | None) -> int:
    return log.stream([sys.executable, "setup.py", "build_ext", "--inplace"], limit_s)[0]


def checks(args: argparse.Namespace, log: Log, limit_s: float | None) -> int:
    """The shared checks in many processes on one GPU, because most of their time goes into compiling kernels on the CPU.

    Inductor is limited to one compile thread in each process, and Hypothesis draws few sizes, since most of them need
    kernels of their own.
    """
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    parallel = ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "200"]
    parallel = parallel if importlib.util.find_spec("xdist") else []
    chosen = ["-k", " or ".join(args.op)] if args.op else ["--require-cells"]
    return log.stream([sys.executable, "-u", "-m", "pytest", *TESTS, "--device", "cuda", "--seed", str(seed), "--examples",
                       "8", "--timeout", "300", "--durations", "15", "-rfE", *parallel, *chosen], limit_s,
                      TORCHINDUCTOR_COMPILE_THREADS="1")[0]


def sanitizer(args: argparse.Namespace, log: Log, limit_s: float | None) -> int:
    """Run compute-sanitizer over small cases. Where the tool is missing or refuses to run, a printed line says so, and the
    phase does not count as failed."""
    tool, status = shutil.which("compute-sanitizer"), 0
    if tool is None:
        log.note("compute-sanitizer is not installed here: left out")
        return 0
    for check, end in (("memcheck", "ERROR SUMMARY"), ("racecheck", "RACECHECK SUMMARY")):
        # Without PyTorch's caching allocator every tensor is its own allocation, so an access beyond it is found.
        found, text = log.stream([tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-u", "-m",
                                  "benchmarks.sanitize", *each(args)], limit_s and limit_s / 2,
                                 PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if found not in (0, LATE) and end not in text:
            log.note(f"compute-sanitizer refuses to run here: {check} left out ({last_line(text)})")
        elif found == LATE:
            findings = "Invalid" in text or "hazard" in text
            log.note(f"{check}: ended after its time, {'with findings' if findings else 'without a finding until then'}")
            status = status or int(findings)
        else:
            log.note(f"{check}: {'clean' if found == 0 else f'exit status {found}'}")
            status = status or found
    return status


def counters(args: argparse.Namespace, log: Log, limit_s: float | None) -> int:
    """Record the hardware counters of one call of each kernel with ncu, which is told not to change the GPU's clocks."""
    tool = shutil.which("ncu")
    if tool is None:
        log.note("ncu is not installed here: counters left out")
        return 0
    names = "|".join(args.op) if args.op else "flash|rms|cross|swiglu|rope|paged|adamw|linear"
    found, text = log.stream([tool, "--clock-control", "none", "--metrics", ",".join(METRICS), "--kernel-name",
                              f"regex:{names}", sys.executable, "-u", "-m", "benchmarks.sanitize", "--kind", "gpu", "--kind",
                              "model", "--dtype", "bfloat16", "--backend", "triton", "--backend", "cuda", *each(args)], limit_s)
    if found and "gpu__time_duration" not in text:
        log.note(f"ncu refuses to run here: counters left out ({last_line(text)})")
        return 0
    return 0 if found == LATE else found


def peaks(args: argparse.Namespace, log: Log, limit_s: float | None) -> int:
    status, text = log.stream([sys.executable, "-c", PEAKS], limit_s)
    if status == 0:
        log.note(text.strip())
    return status


PEAKS = """import torch
from benchmarks.record import gpu_state
from tools.timing import measure_peaks
device = torch.device("cuda")
p = measure_peaks(device)
print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
print(f"copy   {p.copy_bytes_per_s / 1e12:8.3f} TB/s   (1 GiB into present memory, bytes read plus written)")
print(f"read   {p.read_bytes_per_s / 1e12:8.3f} TB/s   (sum of 1 GiB)")
print(f"matrix {p.matmul_flops_per_s / 1e12:8.1f} TFLOP/s (bf16, 8192 cubes, random data)")
print(f"matrix {p.matmul_float32_flops_per_s / 1e12:8.1f} TFLOP/s (float32)")
print(gpu_state())
"""


def bench(args: argparse.Namespace, log: Log, limit_s: float | None) -> int:
    """Run the benchmarks. Where the device stops answering or a call hangs, start them again with the operator after the one
    in which it happened."""
    end, resume, status = time.monotonic() + (limit_s or 1e9), args.resume, 0
    base = [sys.executable, "-u", "-m", "benchmarks", "--device", "cuda", "--out", str(args.out), *each(args),
            *([] if args.full else ["--dtype", "bfloat16"]), *(["--commit", args.commit] if args.commit else [])]
    while (left := end - time.monotonic()) > 2 * REPORT_S:
        room = [] if limit_s is None else ["--seconds", f"{left - REPORT_S:.0f}"]
        found, text = log.stream([*base, *room, *(["--resume"] if resume else [])], None if limit_s is None else left, SILENT_S)
        status, resume = status or found, True
        if found not in (DEVICE_LOST, SILENT):
            break
        log.note(f"benchmarks: {'the device stopped answering' if found == DEVICE_LOST else 'no sign of life'}; "
                 "going on with what is left")
    if status in (LATE, SILENT, DEVICE_LOST):
        log.stream([sys.executable, "-m", "benchmarks", "render", "--out", str(args.out)], 120)
    return status


def train(args: argparse.Namespace, log: Log, limit_s: float | None) -> int:
    """A short training run. Of its folder only the table and the loss curves are kept."""
    with tempfile.TemporaryDirectory() as folder:
        minutes = [] if limit_s is None else ["--minutes", f"{max(0.5, (limit_s - 30) / 60):.2f}"]
        status = log.stream([sys.executable, "-u", "-m", "internlm2", "demo", "--device", "cuda", "--out", f"{folder}/run",
                             *minutes], limit_s)[0]
        for name, kept in (("comparison.md", "demo.md"), ("loss.png", "demo.png")):
            if (Path(folder) / "run" / name).exists():
                shutil.copyfile(Path(folder) / "run" / name, args.out / kept)
    return status


RUN = {"build": build, "checks": checks, "sanitizer": sanitizer, "peaks": peaks, "bench": bench, "train": train,
       "counters": counters}


class Budget:
    """How much time is left for a phase: the smaller of what remains of its group's share and of the whole run's minutes."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.spent = dict.fromkeys(RUN, 0.0)

    def of(self, phase: str) -> float | None:
        if self.end is None:
            return None
        together, share = next(entry for entry in SHARES if phase in entry[0])
        return max(1.0, min(share - sum(self.spent[name] for name in together), self.end - time.monotonic()))


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    args.out = args.out.resolve()
    phases = [name for name in args.phases.split(",") if name]
    if not phases or set(phases) - {*PHASES, *FURTHER}:
        parser().error(f"--phases: expected some of {', '.join(PHASES + FURTHER)}, got {args.phases!r}")
    if not args.minutes > 0:
        parser().error(f"--minutes: expected a positive number, got {args.minutes}")
    reason = unusable(phases)
    if reason:
        print(f"python -m benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    log, failed, budget = Log(args.out), False, Budget(None if args.no_limit else args.minutes)
    for name in (*PHASES, *FURTHER):
        if name not in phases:
            continue
        log.say(f"== {name}")
        start = time.monotonic()
        status = RUN[name](args, log, budget.of(name))
        budget.spent[name] = time.monotonic() - start
        failed |= status != 0
        verdict = {0: "ok", LATE: "ended after its time"}.get(status, f"FAILED (exit status {status})")
        log.note(f"== {name}: {verdict}, {budget.spent[name]:.0f} s")
    log.say("\n".join(["", *log.summary, f"results: {args.out}"]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
