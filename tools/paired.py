"""Times two checkouts against each other, call by call in turn, so that a drift of the machine's speed slows both equally.

    python tools/paired.py --before ../before --after . --op flash_attention --op rms_norm
    python tools/paired.py --before ../before --after . --kind model --isa avx512 --out paired.json

A process for each checkout holds the inputs; the two take turns. Both keep freed memory (glibc neither maps nor trims),
because page faults of fresh outputs would otherwise favour one side or the other by a factor of two. Per size: the median
over rounds of the paired ratio, time after / time before (above 1: slower now). Per operator: the geometric mean of its
sizes. A size that looks slower by more than 3 % is timed again, three times as long, before it counts. The exit status is 1
beyond 3 % in an operator's mean or 8 % at one size.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MEAN_LIMIT, SIZE_LIMIT = 1.03, 1.08
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}


def work(root: str) -> None:
    """The process of one checkout: a JSON request a line on standard input, an answer a line on standard output."""
    sys.path.insert(0, root)
    import torch

    from internlm2_kernels import OPS
    from internlm2_kernels._registry import _C
    from internlm2_kernels.testing import call as forward_call
    from internlm2_kernels.testing import draw_upstream, with_leaves

    torch.set_num_threads(2)
    answers, sys.stdout = sys.stdout, sys.stderr
    calls = {}

    def prepare(name, index, dtype, direction, isa):
        op = OPS[name]
        workload = getattr(op, "workload", op)
        if isa:
            _C.set_cpu_isa(isa)
        generator = torch.Generator().manual_seed(1)
        sample = workload.sample(workload.cases[index], getattr(torch, dtype), torch.device("cpu"), generator)
        if direction == "forward":
            def one():
                with torch.no_grad():
                    forward_call(op, sample, "cpp")
        else:
            upstream = draw_upstream(op, sample, 1.0, generator, "cpp")

            def one():
                leaves = with_leaves(sample)
                outputs = forward_call(op, leaves, "cpp")
                used = [n for n in upstream if outputs[n].requires_grad]
                torch.autograd.grad([outputs[n] for n in used], [leaves.inputs[n] for n in sample.grad],
                                    [upstream[n] for n in used], allow_unused=True)
        calls["one"] = one
        one()

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "rows":
            rows = []
            for op in OPS.values():
                workload = getattr(op, "workload", op)
                for index, case in enumerate(workload.cases):
                    dtypes = case.dtypes or op.dtypes
                    for dtype in dtypes:
                        for direction in ("forward", "backward"):
                            if case.kind == request["kind"] and direction in op.directions and (
                                    op.name in request["ops"] or not request["ops"]):
                                rows.append((op.name, index, str(case), str(dtype)[6:], direction))
            answer = rows
        elif request["do"] == "prepare":
            try:
                prepare(*request["row"], request["isa"])
                answer = ""
            except Exception as error:  # sent to the parent process, which lists the row as not timed
                answer = f"{type(error).__name__}: {error}"
        else:
            begin = time.perf_counter()
            for _ in range(request["times"]):
                calls["one"]()
            answer = (time.perf_counter() - begin) / request["times"]
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    def __init__(self, root: Path):
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", str(root.resolve())], text=True,
                                        env={**os.environ, **KEEP}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def rounds(before: Worker, after: Worker, seconds: float) -> tuple[float, float, float]:
    """(median of the paired ratio time after / time before, median time before, median time after), the times in seconds."""
    once = max(before.ask(do="run", times=1), after.ask(do="run", times=1))
    times = max(1, int(0.004 / once))
    pairs, end = [], time.monotonic() + seconds
    while len(pairs) < 7 or (time.monotonic() < end and len(pairs) < 400):
        order = (before, after) if len(pairs) % 2 == 0 else (after, before)
        took = {side: side.ask(do="run", times=times) for side in order}
        pairs.append((took[before], took[after]))
    return (statistics.median(b / a for a, b in pairs), statistics.median(a for a, _ in pairs),
            statistics.median(b for _, b in pairs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path, default=Path())
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--kind", default="model", help="which of the workload's cases (model, smoke, ...)")
    parser.add_argument("--dtype", action="append", default=[])
    parser.add_argument("--direction", choices=("forward", "backward"))
    parser.add_argument("--isa", default="", help="instruction set of both (default: each checkout's choice)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a size's time")
    parser.add_argument("--longest", type=float, default=2.0, help="leave out sizes whose call takes longer, in seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return 0
    before, after = Worker(args.before), Worker(args.after)
    old, new = (side.ask(do="rows", kind=args.kind, ops=args.op) for side in (before, after))
    places = {(name, case, dtype, direction): index for name, index, case, dtype, direction in old}
    found, bad = [], False
    for name, index, case, dtype, direction in new:
        key = (name, case, dtype, direction)
        if key not in places or (args.dtype and dtype not in args.dtype) or args.direction not in (None, direction):
            continue
        problem = (before.ask(do="prepare", row=(name, places[key], dtype, direction), isa=args.isa)
                   or after.ask(do="prepare", row=(name, index, dtype, direction), isa=args.isa))
        if problem:
            print(f"{name} {case} {dtype} {direction}: not timed: {problem}")
            continue
        if (once := after.ask(do="run", times=1)) > args.longest:
            print(f"{name} {case} {dtype} {direction}: left out, a call takes {once:.1f} s")
            continue
        ratio, a, b = rounds(before, after, args.seconds)
        if ratio > MEAN_LIMIT:
            ratio, a, b = rounds(before, after, 3 * args.seconds)
        found.append((name, case, dtype, direction, ratio, a, b))
        flag = "  SLOWER" if ratio > SIZE_LIMIT else ""
        print(f"{ratio:6.3f}  {a * 1e3:9.3f} -> {b * 1e3:9.3f} ms  {name} {direction} {dtype} {case}{flag}", flush=True)
    print("\noperator, direction, dtype: geometric mean of after / before, worst size")
    groups = {}
    for name, _, dtype, direction, ratio, *_ in found:
        groups.setdefault((name, direction, dtype), []).append(ratio)
    for key, ratios in sorted(groups.items(), key=lambda item: -max(item[1])):
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        wrong = mean > MEAN_LIMIT or max(ratios) > SIZE_LIMIT
        bad |= wrong
        print(f"{mean:6.3f}  {max(ratios):6.3f}  {' '.join(key)} ({len(ratios)} sizes){'  SLOWER' if wrong else ''}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=0))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
