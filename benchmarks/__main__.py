"""`python -m benchmarks`: measure every operator, print the table, record the run. `... report`: refresh the README."""

import argparse
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

EXAMPLES = """examples:
  python -m benchmarks                                  everything, recorded in benchmarks/results/<device>/
  python -m benchmarks --quick --op rms_norm            one size, few rounds: does it work at all?
  python -m benchmarks --op swiglu --direction both --dtype bfloat16
  python -m benchmarks --list                           what would be measured, and the gates
  python -m benchmarks report                           rewrite the README's section from the newest complete runs
exit status: 0 done, 1 an operator's checks are red (it has no numbers), 2 cannot run here"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    p.add_argument("--op", action="append", metavar="NAME", help="only this operator (repeatable)")
    p.add_argument("--direction", action="append", choices=("forward", "backward", "both", "call"),
                   help="only this direction (repeatable); call: host time of a small call")
    p.add_argument("--dtype", action="append", choices=("bfloat16", "float32", "float16"),
                   help="only this dtype (repeatable; default: bfloat16 and float32)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--threads", type=int, help="processors to use and to be pinned to (default: all that are allowed)")
    p.add_argument("--quick", action="store_true", help="first size, few rounds, recorded under build/benchmarks")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--out", type=Path, help="folder for the record (default: benchmarks/results)")
    p.add_argument("--list", action="store_true", help="print passes and gates, measure nothing")
    return p


def with_huge_pages(argv: list[str]) -> None:
    """Start again with huge pages for torch's allocations: without them fresh outputs cost page faults on every side."""
    if sys.platform == "linux" and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *argv],
                  os.environ | {"THP_MEM_ALLOC_ENABLE": "1"})


def choose(args: argparse.Namespace) -> tuple:
    """Operators, directions, dtypes and device; exits with status 2 and one line where they cannot be."""
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


def measure(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from internlm2_kernels.timing import measure_peaks, pin

    from . import record, report, suite
    ops, directions, dtypes, device = choose(args)
    passes = suite.plan(ops, directions, dtypes, args.quick, device.type)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if args.list:
        return list_plan(console, passes)
    out = (args.out or (record.ROOT / "build" / "benchmarks" if args.quick else record.RESULTS)).resolve()
    pin(args.threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else torch.get_num_threads())
    if device.type == "cuda":
        torch._functorch.config.donated_buffer = False  # a captured backward must be able to run again
    started, peaks = time.perf_counter(), measure_peaks(device)
    settings = replace(suite.QUICK if args.quick else suite.Settings(), compiled=not args.no_compile)
    bench = suite.Bench(device, peaks, settings)
    run = record.Record(out, device, peaks, {"ops": ops, "directions": directions, "quick": args.quick,
                                             "dtypes": [suite.short(d) for d in dtypes], "seconds": settings.seconds,
                                             "rounds": settings.rounds, "compile": settings.compiled})
    console.print(report.describe(run.head), highlight=False)
    console.print(f"{len(passes)} passes -> {run.path}", highlight=False)
    bars = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn())
    rows, state = [], "killed"
    try:
        with Progress(*bars, console=console) as progress:
            task = progress.add_task("", total=len(passes))
            for job in passes:
                progress.update(task, description=str(job))
                found, paired = bench.run(job)
                rows += found
                run.note(bench.notes)
                run.add(job, found, paired)
                progress.advance(task)
                for row in found:
                    progress.console.print(one_line(row), highlight=False, markup=False)
        state = "done"
    except KeyboardInterrupt:
        console.print(f"stopped; the {len(rows)} rows so far are in {run.path}")
    everything = not (args.direction or args.dtype or args.quick or args.no_compile)  # of the operators it measured
    run.finish(complete=everything and state == "done", state=record.gpu_state() if device.type == "cuda" else "")
    finish(console, run, rows, bench.notes, time.perf_counter() - started)
    return 130 if state == "killed" else int(any(row.red for row in rows))


def one_line(row) -> str:
    from . import report
    data = asdict(row)
    peers = "  ".join(f"{family} x{peer['ratio'][0]:.2f}" for family, peer in data["against"].items())
    start = report.cells(data, [], [])
    return f"{' '.join(start[:4]):<58}{start[4]:>9} {start[5]:>7} GB/s {start[6]:>6}  {peers}"


def finish(console, run, rows, notes: list[str], seconds: float) -> None:
    """Tables, plot and Markdown of what was measured."""
    from . import plot, record, report
    if rows:
        report.print_tables(console, [asdict(row) for row in rows])
        data = record.load(run.path)
        run.path.with_suffix(".md").write_text(report.markdown(data))
        plot.roofline(data, run.path.with_suffix(".png"))
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"{seconds:.0f} s; {run.path} (.md, .png)", highlight=False)


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
        from . import report
        print("README.md rewritten" if report.rewrite_readme() else "README.md is up to date")
        return 0
    with_huge_pages(argv)
    return measure(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
