"""python -m tools.audit: the static audit of every GPU kernel, read from its machine code without a GPU.

Every Triton kernel in its shipped configurations is compiled for sm_80, sm_90 and sm_100, and every CUDA C++ kernel for
sm_80, sm_90a and sm_100a. The table says which resources a kernel needs, whether it spills registers and how many
tensor-core instructions it has, and counts the arithmetic instructions of its hot loop. The table is static: no kernel is
run, so it says nothing about speed. The audit of everything ends with the comparison that tools.peers has recorded.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from internlm2_kernels import OPS

from . import audit_rules, peers

TABLE = Path(__file__).with_name("static_audit.json")
LARGEST_STACK_BYTES = 128  # per thread; a spill up to this size outside the loops of products costs next to nothing
# Rows of the table that may spill registers all the same, each with the reason. A key without an architecture holds for all.
ALLOWED_STACK: dict[str, str] = {
    "flash_attention/flash_attention_fwd_kernel/d 64, packed, at most 64/bfloat16/sm_100":
        "8 bytes, at 128 registers a thread; not yet timed on that architecture",
    **{f"linear/linear_kernel/{label}/bfloat16": "rows whose length is odd are loaded number by number; no model has them"
       for label in ("odd", "odd, dx")},
    "sample/sample_fwd_kernel/tokens, mask/float32/sm_80":
        "16 bytes, at 128 registers a thread; not yet timed on that architecture",
}
EXAMPLES = """examples:
  python -m tools.audit                compile everything and print the table
  python -m tools.audit --check        compare with the committed table; exit status 1 on a difference.
                                       Compiles only what changed since; --check --all compiles everything
  python -m tools.audit --write        rewrite the committed table
  python -m tools.audit --op swiglu    audit one operator only; also with --check or --write"""


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton would interpret the kernels in this process: compile in another
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tools.audit", *argv]
        return subprocess.run(command, env=environment).returncode
    missing = [name for name in ("triton", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"audit: this command needs {' and '.join(missing)}: Triton's compiler is what it runs, rich prints the table.",
              file=sys.stderr)
        return 1
    import triton

    from .compile_kernels import CSRC, nvcc_version

    compilers = {"triton": triton.__version__, "nvcc": nvcc_version()}
    sources = sorted(CSRC.glob("*.cu")) if compilers["nvcc"] and not args.op else []
    committed = read(TABLE) if TABLE.exists() else {"compilers": {}, "rows": {}}
    known = unchanged(committed, compilers) if (args.check or args.write) and not args.all else {}
    ops = [args.op] if args.op else _triton_ops()
    if args.op:  # compare only the rows of this operator
        committed = committed | {"rows": {k: v for k, v in committed["rows"].items() if k.startswith(f"{args.op}/")}}
    rows, compiled = _compile_all(ops, [str(source) for source in sources], args.jobs, known)
    if not args.op and not sources:
        reason = "there is no nvcc on the PATH" if compilers["nvcc"] is None else f"there are no CUDA sources in {CSRC}"
        print(f"CUDA C++ kernels are left out: {reason}.")
    if not args.check:
        _print_table(rows, compilers)
        if not args.op:
            peers.print_table()
    problems = find_problems(rows) + audit_rules.problems(rows, {} if args.op else ALLOWED_STACK)
    if args.check:
        changes, notes = compare(rows, compilers, committed, cuda=bool(sources))
        problems += changes
        print("\n".join(notes))
    if args.write:
        kept = {k: v for k, v in read(TABLE)["rows"].items()
                if (k.startswith("cuda/") and not sources) or (args.op and not k.startswith(f"{args.op}/"))}
        compilers["nvcc"] = compilers["nvcc"] if sources else committed["compilers"].get("nvcc")
        write(TABLE, compilers, rows | kept)
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    same = f", {len(rows) - compiled} have not changed" if len(rows) > compiled else ""
    verdict = "no problem" if not problems else f"{len(problems)} problems"
    print(f"{compiled} kernels compiled{same}, none run: {verdict}.")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.audit", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the committed table")
    action.add_argument("--write", action="store_true", help="rewrite the committed table")
    parser.add_argument("--op", choices=_triton_ops(), metavar="NAME", help=f"one of {', '.join(_triton_ops())}")
    parser.add_argument("--all", action="store_true", help="with --check or --write: compile unchanged kernels too")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="compile in N processes (default 2)")
    return parser


def _triton_ops() -> list[str]:
    return [name for name, op in OPS.items() if "triton" in op.backends]


def unchanged(committed: dict, compilers: dict) -> dict[str, dict]:
    """The committed rows that the installed compilers made. They are valid for kernels whose source is still the same."""
    from .compile_kernels import Facts

    needed = {"source", *(field.name for field in dataclasses.fields(Facts))}
    made = {kind for kind, version in compilers.items() if committed["compilers"].get(kind) == version}
    return {key: facts for key, facts in committed["rows"].items()
            if ("nvcc" if key.startswith("cuda/") else "triton") in made and needed <= facts.keys()}


def _compile_all(ops: list[str], sources: list[str], workers: int, known: dict[str, dict]) -> tuple[dict[str, dict], int]:
    """Every row of the table, sorted by key, and the number of compiled ones. A row in `known` with the same source is
    reused."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .compile_kernels import CUDA_ARCHS, DTYPES, TRITON_ARCHS, compile_cuda, compile_triton, cuda_digest, launches

    jobs, rows = [], {}
    for source in sources:
        for arch in CUDA_ARCHS:
            prefix, suffix = f"cuda/{Path(source).name}/", f"/sm_{arch}"
            same = {key: facts for key, facts in known.items() if key.startswith(prefix) and key.endswith(suffix)
                    and facts["source"] == cuda_digest(source)}
            rows |= same
            if not same:
                jobs.append((compile_cuda, source, arch))
    for op in ops:
        for dtype in DTYPES:
            for arch in TRITON_ARCHS:
                for index, launch in enumerate(launches(op, dtype, arch)):
                    key = f"{launch.key}/sm_{arch}"
                    if known.get(key, {}).get("source") == launch.source:
                        _put(rows, key, known[key])
                    else:
                        jobs.append((compile_triton, op, dtype, index, arch))
    reused = len(rows)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, workers), context) as pool, Progress(*columns) as progress:
        futures = [pool.submit(*job) for job in jobs]
        task = progress.add_task("", total=len(futures))
        for future in concurrent.futures.as_completed(futures):
            for key, facts in future.result().items():
                _put(rows, key, facts)
            progress.advance(task)
    return dict(sorted(rows.items())), len(rows) - reused


def _put(rows: dict[str, dict], key: str, facts: dict) -> None:
    if key in rows:
        raise ValueError(f"audit: two launches are called {key!r}: give one another label in audited.py")
    rows[key] = facts


def find_problems(rows: dict[str, dict]) -> list[str]:
    """The problems, one line each: register spills that are large or inside loops and not listed in ALLOWED_STACK, and kernels
    that need more shared memory than the architecture has."""
    from .compile_kernels import SHARED_LIMIT

    problems = []
    for key, facts in rows.items():
        name, arch = key.rsplit("/sm_", 1)
        harmless = facts["stack_bytes"] <= LARGEST_STACK_BYTES and facts.get("spills_in_loops") == 0
        if facts["stack_bytes"] and not harmless and key not in ALLOWED_STACK and name not in ALLOWED_STACK:
            problems.append(f"{key} spills: {facts['stack_bytes']} bytes of stack, {facts.get('spills_in_loops', '?')} "
                            "accesses in loops that multiply; change its tile, or give the reason in ALLOWED_STACK")
        limit = SHARED_LIMIT[arch.rstrip("a")]
        if facts["shared_bytes"] > limit:
            problems.append(f"{key} needs {facts['shared_bytes']} bytes of shared memory, a block of sm_{arch} has {limit}")
    return problems


def compare(rows: dict[str, dict], compilers: dict, committed: dict, cuda: bool) -> tuple[list[str], list[str]]:
    """(differences from the committed table, notes), as lines. Numbers are compared only where the compiler version is the
    same."""
    changes, notes = [], []
    for kind, compiler in (("triton", "triton"), ("cuda", "nvcc")):
        if kind == "cuda" and not cuda:
            continue
        belongs = lambda key, kind=kind: key.startswith("cuda/") == (kind == "cuda")
        old = {key: facts for key, facts in committed["rows"].items() if belongs(key)}
        new = {key: facts for key, facts in rows.items() if belongs(key)}
        changes += [f"{key} is not in the committed table; run tools.audit --write" for key in new.keys() - old.keys()]
        changes += [f"{key} is in the committed table, but is no longer compiled; run tools.audit --write"
                    for key in old.keys() - new.keys()]
        was = committed["compilers"].get(compiler)
        if was != compilers[compiler]:
            notes.append(f"numbers of {kind} kernels not compared: made by {compiler} {was}, here is {compilers[compiler]}")
            continue
        for key in sorted(old.keys() & new.keys()):
            changes += [f"{key}: {field} was {old[key].get(field)}, is {value}"
                        for field, value in new[key].items() if field != "source" and old[key].get(field) != value]
    return sorted(changes), notes


def read(path: Path) -> dict[str, Any]:
    """The committed table: the versions of the `compilers`, and `rows` that map a kernel's key to its facts."""
    table = json.loads(path.read_text())
    return {"compilers": table["compilers"],
            "rows": {f"{name}/{arch}": {field: value for field, value in zip(table["fields"], values, strict=False)
                                        if value is not None}
                     for name, by_arch in table["rows"].items() for arch, values in by_arch.items()}}


def write(path: Path, compilers: dict, rows: dict[str, dict]) -> None:
    """One configuration a line with the facts of its architectures in the order of `fields`, so that a diff shows which
    kernels changed. The file is replaced in one step."""
    fields = list(dict.fromkeys(field for facts in rows.values() for field in facts))
    grouped: dict[str, dict[str, list]] = {}
    for key, facts in sorted(rows.items()):
        name, arch = key.rsplit("/", 1)
        last = max(index for index, field in enumerate(fields) if field in facts)
        grouped.setdefault(name, {})[arch] = [facts.get(field) for field in fields[:last + 1]]
    compact = lambda value: json.dumps(value, separators=(",", ":"))
    lines = ",\n".join(f"{compact(name)}: {compact(by_arch)}" for name, by_arch in grouped.items())
    text = (f'{{"note": "static: compiled, not run; written by python -m tools.audit --write",\n'
            f'"compilers": {json.dumps(compilers)},\n"fields": {json.dumps(fields)},\n"rows": {{\n{lines}\n}}}}\n')
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    os.replace(temporary, path)


def _print_table(rows: dict[str, dict], compilers: dict) -> None:
    """One line for each kernel and configuration, with the numbers of its architectures separated by slashes."""
    from rich.console import Console
    from rich.table import Table

    versions = ", ".join(f"{name} {version}" for name, version in compilers.items() if version)
    table = Table(title=f"static: compiled, not run ({versions}); numbers for sm_80 / sm_90 / sm_100")
    for name in ("kernel", "configuration", "registers", "stack", "shared", "occupancy %", "mma", "wgmma", "tcgen05",
                 "loads", "stores",
                 "hot code on sm_90: instructions / tensor / FFMA / FMUL, FADD / MUFU"):
        table.add_column(name, overflow="fold")
    grouped: dict[str, list[dict]] = {}
    for key, facts in rows.items():
        grouped.setdefault(key.rsplit("/sm_", 1)[0], []).append((int(key.rsplit("/sm_", 1)[1].rstrip("a")), facts))
    for name, entries in grouped.items():
        facts = [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]
        _, kernel, *configuration = name.split("/")
        all_of = lambda field, facts=facts: "/".join(str(f[field]) for f in facts)
        shortest = lambda field, facts=facts: "/".join(dict.fromkeys(str(f[field]) for f in facts))
        table.add_row(kernel, ", ".join(configuration), all_of("registers"), shortest("stack_bytes"),
                      shortest("shared_bytes"), "/".join(f"{100 * f['occupancy']:.0f}" for f in facts), shortest("mma"),
                      shortest("wgmma"), shortest("tcgen05"), facts[-1]["loads"], facts[-1]["stores"],
                      facts[len(facts) // 2].get("hot", "?").replace(" ", " / ").replace(" / ", " ", 1))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
