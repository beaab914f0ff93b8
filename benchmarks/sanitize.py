"""`python -m benchmarks.sanitize`: every CUDA kernel once on small random inputs, to be run under compute-sanitizer."""

import argparse
import sys

import torch

from internlm2_kernels import OPS
from internlm2_kernels.testing import draw_upstream, run


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    p.add_argument("--op", action="append", metavar="NAME", help="only this operator (repeatable)")
    p.add_argument("--backend", action="append", choices=("triton", "cuda"), help="default: cuda")
    args = p.parse_args(argv)
    device, calls = torch.device("cuda"), 0
    for op in OPS.values():
        if args.op and op.name not in args.op:
            continue
        for backend in set(args.backend or ("cuda",)) & set(op.usable["cuda"]):
            for case in (c for c in op.cases if c.kind in ("smoke", "edge")):
                for dtype in op.dtypes:
                    generator = torch.Generator(device).manual_seed(0)
                    sample = op.sample(case, dtype, device, generator)
                    run(op, sample, backend, draw_upstream(op, sample, 1.0, generator))
                    calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls")
    return 0 if calls else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
