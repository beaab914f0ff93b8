"""Digests of every operator's results, to show that a change of structure changes no bit.

    python tools/digests.py --root . --out after.json            # this checkout
    python tools/digests.py --root ../before --out before.json   # another one, built with the same compiler
    python tools/digests.py --compare before.json after.json     # exit status 1 where a digest differs

A digest is the SHA-256 of all outputs and gradients of one operator, case, dtype, backend and instruction set. Inputs come
from the operator's workload with a seed that depends on the names alone, so that two checkouts see the same inputs.
"""

import argparse
import hashlib
import json
import os
import sys
import zlib
from pathlib import Path

SETS = ("avx2", "avx512", "avx512_bf16", "amx")


def variants(op, library, interpreted: bool):
    """(backend, instruction set) pairs that can run here."""
    yield "reference", ""
    best = SETS.index(library.best_cpu_isa())
    for isa in SETS[: best + 1]:
        if isa in op.isas:
            yield "cpp", isa
    if interpreted and "triton" in op.backends:
        yield "triton", "interpreted"


def digest(values: dict) -> str:
    import torch

    total = hashlib.sha256()
    for name, value in values.items():
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        if value.is_floating_point():
            value = torch.where(value.isnan(), float("nan"), value)  # every NaN counts as the same one
        total.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:20]


def collect(names: list[str], interpreted: bool) -> dict[str, str]:
    import torch
    from rich.progress import track

    from internlm2_kernels import OPS
    from internlm2_kernels._registry import _C
    from internlm2_kernels.testing import draw_upstream, run

    torch.set_num_threads(1)
    found = {}
    for op in track([op for op in OPS.values() if not names or op.name in names], "operators", disable=not sys.stderr.isatty()):
        work = getattr(op, "workload", op)  # in old checkouts the operator itself holds cases and samples
        for case in work.cases:
            if case.kind not in ("smoke", "edge"):
                continue
            for dtype in (*op.dtypes, torch.float64):
                if op.name == "rope_table" and dtype == torch.float64:
                    continue
                for backend, isa in variants(op, _C, interpreted):
                    if backend == "triton" and dtype not in (torch.float32, torch.float16):
                        continue
                    key = f"{op.name} {case} {str(dtype)[6:]} {backend} {isa}".strip()
                    generator = torch.Generator().manual_seed(zlib.crc32(f"{op.name} {case} {dtype}".encode()))
                    if isa in SETS:
                        _C.set_cpu_isa(isa)
                    try:
                        sample = work.sample(case, dtype, torch.device("cpu"), generator)
                        found[key] = digest(run(op, sample, backend, draw_upstream(op, sample, 1.0, generator)))
                    except (ValueError, TypeError) as error:  # a dtype that this operator does not take
                        found[key] = f"{type(error).__name__}: {error}"
    return found


def compare(before: Path, after: Path) -> int:
    old, new = (json.loads(path.read_text()) for path in (before, after))
    different = [key for key in old if key in new and old[key] != new[key]]
    for key in different:
        print(f"differs: {key}\n    {old[key]}\n    {new[key]}")
    for title, keys in (("only before", old.keys() - new.keys()), ("only after", new.keys() - old.keys())):
        if keys:
            print(f"{title}: {len(keys)}: {', '.join(sorted(keys)[:5])}")
    print(f"{len(old.keys() & new.keys())} digests in both, {len(different)} differ")
    return int(bool(different) or not old.keys() & new.keys())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout whose package is imported")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--op", action="append", default=[], help="only this operator (may be repeated)")
    parser.add_argument("--no-triton", action="store_true", help="leave out Triton's interpreter, which takes most of the time")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    if args.out is None:
        parser.error("--out or --compare is needed")
    root = args.root.resolve()
    sys.path[:0] = [str(root)]
    if not args.no_triton:
        os.environ["TRITON_INTERPRET"] = "1"
    found = collect(args.op, not args.no_triton)
    import internlm2_kernels

    if Path(internlm2_kernels.__file__).resolve().parent.parent != root:
        raise SystemExit(f"imported {internlm2_kernels.__file__}, not the package of {root}")
    args.out.write_text(json.dumps(found, indent=0))
    print(f"{len(found)} digests of {root} in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
