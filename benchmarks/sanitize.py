"""`python -m benchmarks.sanitize`: runs every kernel once on random inputs, under compute-sanitizer or ncu."""

import argparse
import sys

import torch

from internlm2_kernels import OPS
from internlm2_kernels.testing import draw_upstream, run

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    p.add_argument("--op", action="append", metavar="NAME", choices=tuple(OPS), help="only this operator (repeatable)")
    p.add_argument("--backend", action="append", choices=("triton", "cuda"), help="default: cuda")
    p.add_argument("--kind", action="append", choices=("smoke", "edge", "model", "gpu"),
                   help="sizes (repeatable; default: smoke and edge); of gpu and model the first, gpu's where there is one")
    p.add_argument("--dtype", action="append", choices=DTYPES, help="default: all that the operator takes")
    return p


def cases_of(op, kinds: list[str]) -> list:
    """All cases among `kinds` that are small, and one large case: ncu's hardware counters need only one call of each kernel."""
    small = [case for case in op.workload.cases if case.kind in kinds and case.kind in ("smoke", "edge")]
    large = sorted((case for case in op.workload.cases if case.kind in kinds and case.kind in ("model", "gpu")),
                   key=lambda case: case.kind != "gpu")
    return small + large[:1]


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        parser().error("torch sees no CUDA device here")
    device, calls = torch.device("cuda"), 0
    for op in OPS.values():
        if args.op and op.name not in args.op:
            continue
        for backend in sorted(set(args.backend or ("cuda",)) & set(op.usable["cuda"])):
            for case in cases_of(op, args.kind or ["smoke", "edge"]):
                for dtype in op.dtypes:
                    if args.dtype and str(dtype).removeprefix("torch.") not in args.dtype:
                        continue
                    generator = torch.Generator(device).manual_seed(calls)
                    sample = op.workload.sample(case, dtype, device, generator)
                    run(op, sample, backend, draw_upstream(op, sample, 1.0, generator, op.public))
                    calls += 1
        torch.cuda.synchronize()
        print(f"{op.name}: {calls} calls so far", flush=True)
    return 0 if calls else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
