"""`python -m benchmarks`: measure every operator, print the tables, record the run. `... report`: refresh the pages."""

import argparse
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from . import setting

KILLED = 130  # exit status after a signal
USUAL_S = 20.0  # the expected duration of an operator's first pass
EXAMPLES = """examples:
  python -m benchmarks                                  everything, recorded in benchmarks/results/<device>/
  python -m benchmarks --memory kept                    only with CPU memory that stays in the process
  python -m benchmarks --quick --op rms_norm            one size, few rounds: does it work at all?
  python -m benchmarks --op swiglu --direction both --dtype bfloat16
  python -m benchmarks --list                           what would be measured, and the gates
  python -m benchmarks report                           rewrite README.md's tables and benchmarks/results/README.md
  python -m benchmarks prune                            remove the records whose every row has been measured again
  python -m benchmarks --device cuda --seconds 480      as much as 8 minutes allow, the most important sizes first;
                                                        the same with --resume goes on where it ended
  python -m benchmarks render --out build/gpu           tables and plots of the records in a folder, measuring nothing
On a CPU everything is measured in three settings of CPU memory, one after the other, each in a record of its own that names
it; ours and every peer run in the same one: kept (memory.keep_freed_memory(): freed memory stays in the process), huge (huge
pages, THP_MEM_ALLOC_ENABLE=1), default (the allocator as it is: large fresh outputs cost page faults). --seconds is for all.
exit status: 0 done, 1 the checks of an operator failed (it has no numbers), 2 the benchmarks cannot run here, 3 the
device stopped answering (--resume goes on after the operator in which it happened), 130 stopped by a signal"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", nargs="?", choices=("run", "report", "prune", "render"), default="run")
    p.add_argument("--op", action="append", metavar="NAME", help="only this operator (repeatable)")
    p.add_argument("--direction", action="append", choices=("forward", "backward", "both", "call"),
                   help="only this direction (repeatable); call: host time of a small call")
    p.add_argument("--dtype", action="append", choices=("bfloat16", "float32", "float16"),
                   help="only this dtype (repeatable; default: bfloat16 and float32)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--memory", action="append", choices=tuple(setting.CHOICES),
                   help="only this setting of CPU memory (repeatable; default: all three on Linux)")
    p.add_argument("--threads", type=int, help="processors to use and to be pinned to (default: all that are allowed)")
    p.add_argument("--quick", action="store_true", help="first size, few rounds, recorded under build/benchmarks")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--out", type=Path, help="folder for the record (default: benchmarks/results)")
    p.add_argument("--seconds", type=float, metavar="S", help="begin nothing that is not expected to end S seconds from now")
    p.add_argument("--resume", action="store_true", help="continue the newest record in --out: what it has is not run again")
    p.add_argument("--commit", metavar="ID", help="the commit to record where git does not know this copy of the tree")
    p.add_argument("--list", action="store_true", help="print passes and gates, measure nothing")
    # Given by setting.restart: the setting for which this process was started, and the worst status of those before it.
    p.add_argument("--entered", choices=tuple(setting.CHOICES), help=argparse.SUPPRESS)
    p.add_argument("--status", type=int, default=0, help=argparse.SUPPRESS)
    return p


def choose(args: argparse.Namespace) -> tuple:
    """Operators, directions, dtypes and device; exits with status 2 and one line where the arguments cannot be served."""
    import torch

    from internlm2_kernels import OPS
    unknown = [name for name in args.op or () if name not in OPS]
    if unknown:
        parser().error(f"--op: expected one of {', '.join(OPS)}, got {', '.join(unknown)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: torch sees no CUDA device here")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    directions = args.direction or ["forward", "backward", "both", "call"]
    dtypes = [getattr(torch, name) for name in args.dtype or ("bfloat16", "float32")]
    return args.op or list(OPS), directions, dtypes, device


def measure(args: argparse.Namespace, argv: list[str]) -> int:
    """Measure in each setting of CPU memory, and return the worst exit status. Each setting has a process of its own, which
    replaces the one before, so that only the last of them returns."""
    chosen = choose(args)
    settings = setting.chosen(args.memory, chosen[-1].type)
    if args.list:
        return measure_in(args, chosen, settings[0])
    if settings[0] and setting.CHOICES.get(args.entered) != settings[0]:
        setting.restart(argv, settings)
    begun = time.perf_counter()
    share = None if args.seconds is None else args.seconds / len(settings)
    status = measure_in(args, chosen, settings[0], share)
    worst = max(status, args.status)
    if settings[1:] and status < KILLED:
        more = {} if args.seconds is None else {"seconds": f"{max(0.0, args.seconds - (time.perf_counter() - begun)):.0f}"}
        setting.restart(argv, settings[1:], status=str(worst), **more)
    return worst


def measure_in(args: argparse.Namespace, chosen: tuple, memory: str, seconds: float | None = None) -> int:
    """Measure in one setting of CPU memory, which this process has entered."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from internlm2_kernels.memory import keep_freed_memory
    from tools.timing import measure_peaks, pin

    from . import record, report, suite
    ops, directions, dtypes, device = chosen
    passes = suite.plan(ops, directions, dtypes, args.quick, device.type)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if args.list:
        return list_plan(console, passes)
    out = (args.out or (record.ROOT / "build" / "benchmarks" if args.quick else record.RESULTS)).resolve()
    pin(args.threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else torch.get_num_threads())
    if device.type == "cuda":
        import torch._functorch.config as functorch  # `import torch` alone does not import this submodule
        functorch.donated_buffer = False  # a backward that is captured in a graph runs more than once
    started = time.perf_counter()
    if memory == setting.KEPT:
        done = keep_freed_memory()
        console.print(str(done), highlight=False, markup=False)
        if not done.kept:
            console.print("the setting `kept` cannot be measured here")
            return 2
    peaks = measure_peaks(device)
    _release(device)
    settings = replace(suite.QUICK if args.quick else suite.Settings(), compiled=not args.no_compile)
    loops, registers = register_peaks(console) if device.type == "cpu" else ({}, {})
    bench = suite.Bench(device, peaks, settings, loops)
    options = {"ops": ops, "directions": directions, "quick": args.quick, "dtypes": [suite.short(d) for d in dtypes],
               "seconds": settings.seconds, "rounds": settings.rounds, "compile": settings.compiled}
    try:
        run = record.Record(out, device, peaks, options, resume=args.resume, commit_id=args.commit,
                            registers=registers, memory=memory)
    except ValueError as error:
        parser().error(str(error))
    if run.repeated:
        console.print(f"CPU memory {memory}: {run.repeated.name} is complete")
        return 0
    passes = run.without_recorded(suite.by_importance(passes) if device.type == "cuda" else passes)
    console.print(report.describe(run.head), highlight=False)
    console.print(f"{len(passes)} passes -> {run.path}", highlight=False)
    bars = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn())
    state, clock = "killed", Clock(started, seconds)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with Progress(*bars, console=console, disable=not sys.stdout.isatty()) as progress:
            task = progress.add_task("", total=len(passes))
            for job in passes:
                if not clock.leaves_room_for(job):
                    continue
                progress.update(task, description=str(job))
                run.start(job)
                found, paired = bench.run(job)
                clock.passed(job)
                run.note(bench.notes)
                run.add(job, found, paired)
                progress.advance(task)
                for row in found:
                    progress.console.print(one_line(row), highlight=False, markup=False)
                if bench.lost:
                    break
        state = "lost" if bench.lost else "late" if clock.skipped else "done"
    except KeyboardInterrupt:
        console.print(f"stopped; the {len(run.rows())} rows so far are in {run.path}")
    dtypes = args.dtype and (device.type == "cpu" or args.dtype != ["bfloat16"])  # on a GPU bfloat16 alone counts as all dtypes
    # A run is complete when it has measured every row of its operators.
    everything = not (args.direction or dtypes or args.quick or args.no_compile)
    run.finish(complete=everything and state == "done", state=record.gpu_state() if device.type == "cuda" else "")
    finish(console, run, time.perf_counter() - started)
    if clock.skipped:
        console.print(f"no time for {clock.skipped} of {len(passes)} passes: --resume measures them")
    if state == "lost":
        console.print("the device stopped answering; --resume goes on after the operator that it happened in")
    return {"killed": KILLED, "lost": 3}.get(state, int(bool(run.head["run"]["red"])))


def register_peaks(console) -> tuple[dict, dict]:
    """Two dicts: for each dtype the multiply-add loop of registers.py, and its rate for the record. Both are empty where the
    loops cannot be built; a printed line then says why."""
    import subprocess

    import torch

    from internlm2_kernels import _registry

    from . import registers
    try:
        loops = registers.loops(_registry._C.best_cpu_isa() if _registry._C else "", torch.get_num_threads())
    except (OSError, subprocess.SubprocessError) as error:
        console.print(f"note: no register peak: {error}; products are judged by their ratios", markup=False)
        return {}, {}
    return loops, {dtype: {"isa": loops[dtype].isa, "flops_per_s": registers.rate(loops[dtype])}
                   for dtype in ("bfloat16", "float32") if dtype in loops}


class Clock:
    """Decides whether a pass is expected to end within the given time. The estimate for a pass is the longest pass of the same
    operator so far, or USUAL_S before its first."""

    def __init__(self, started: float, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else started + seconds
        self.begun, self.longest, self.skipped = started, {}, 0

    def leaves_room_for(self, job) -> bool:
        self.begun = time.perf_counter()
        room = self.begun + self.longest.get(job.op.name, USUAL_S) <= self.end
        self.skipped += not room
        return room

    def passed(self, job) -> None:
        took = time.perf_counter() - self.begun
        self.longest[job.op.name] = max(took, self.longest.get(job.op.name, 0.0))


def _release(device) -> None:
    """Free the GPU memory that measuring the peaks took: a CUDA graph's pool holds it until the graph is deleted."""
    import gc

    import torch
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def one_line(row) -> str:
    from . import report
    data = asdict(row)
    peers = "  ".join(f"{family} x{peer['ratio'][0]:.2f}" for family, peer in data["against"].items())
    start = report.cells(data, [], [])
    return f"{' '.join(start[:4]):<58}{start[4]:>9} {start[5]:>7} GB/s {start[6]:>6}  {peers}"


def finish(console, run, seconds: float) -> None:
    """Print the tables of what was measured and say where the record is."""
    from . import record, report
    if run.rows():
        report.print_tables(console, run.rows())
        if run.path.parent.parent == record.RESULTS:
            console.print("`python -m benchmarks report` brings README.md and benchmarks/results/README.md up to date")
        else:  # benchmarks/results has one page for all records; elsewhere each record gets its own
            render(run.path)
    for note in run.head["run"]["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"{seconds:.0f} s; {run.path}", highlight=False)


def render(path: Path) -> None:
    """Write a record's tables and plot beside it."""
    from . import plot, record, report
    data = record.load(path)
    path.with_suffix(".md").write_text(report.markdown(data))
    plot.limits(record.rows_of(data), path.with_suffix(".png"), report.machine_of(data))


def list_plan(console, passes) -> int:
    from . import gates
    for job in passes:
        console.print(str(job), highlight=False, markup=False)
    for gate in gates.load():
        console.print("gate " + " ".join(f"{key}={value}" for key, value in gate.items()), highlight=False, markup=False)
    return 0


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.command == "report":
        from . import current, pages
        changed = pages.write()
        print("\n".join(f"rewritten: {path.relative_to(pages.ROOT)}" for path in changed) or "all pages are up to date")
        for path in current.superseded():
            print(f"superseded, `python -m benchmarks prune` removes it: {path.relative_to(pages.ROOT)}")
        return 0
    if args.command == "prune":
        from . import current, pages
        for path in current.prune():
            print(f"removed: {path.relative_to(pages.ROOT)}")
        return 0
    if args.command == "render":
        paths = sorted((args.out or Path("benchmarks/results")).glob("*/[0-9][0-9][0-9][0-9]_*.json"))
        for path in paths:
            render(path)
        print(f"{len(paths)} records rendered")
        return 0
    return measure(args, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
