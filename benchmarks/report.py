"""What people read: the terminal's table, the Markdown and the README section, and the roofline plot, all from rows."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .gates import Verdict, judge, load
from .peers import READ_BOUND
from .record import RESULTS, ROOT, newest, rows_of
from .suite import size_of

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
WAYS = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd", "call": "call", "call_grad": "call, grad"}
NO_GPU = "No run on a GPU is recorded yet: `make gpu` makes one on a machine that has one."
MEMORY = "memory_linear_cross_entropy.json"  # of benchmarks/memory.py, beside the runs
Judged = tuple[dict[str, Any], list[Verdict]]


def judged(rows: list[dict[str, Any]]) -> list[Judged]:
    """Rows with their verdicts, worst first: red, then by margin to the gate, then by ratio to the nearest peer."""
    gates = load()
    pairs = [(row, judge(row, gates) if not row["red"] else []) for row in rows]

    def rank(pair: Judged) -> tuple:
        row, verdicts = pair
        margin = min((v.margin for v in verdicts), default=math.inf)
        nearest = min((a["ratio"][0] for a in row["against"].values()), default=math.inf)
        return (not row["red"], margin, nearest)

    return sorted(pairs, key=rank)


def time_of(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def against(row: dict[str, Any], family: str, spread: bool = True) -> str:
    peer = row["against"].get(family)
    if peer is None:
        return "-"
    median, low, high = peer["ratio"]
    return f"{median:.2f} [{low:.2f}-{high:.2f}]" if spread else f"{median:.2f}"


def verdict_text(verdicts: list[Verdict]) -> str:
    missed = [f"{v.what} {'-' if v.got is None else f'{v.got:.2f}'} < {v.need:g}" for v in verdicts if not v.met]
    return "" if not verdicts else "missed: " + ", ".join(missed) if missed else "met"


def families(rows: list[dict[str, Any]]) -> list[str]:
    present = {family for row in rows for family in row["against"]}
    return [f for f in ("eager", "compile") if f in present] + sorted(present - {"eager", "compile"})


def cells(row: dict[str, Any], verdicts: list[Verdict], peers: list[str]) -> list[str]:
    """One row as text; the columns are `columns(peers)`."""
    name = row["op"] + ("" if row["chosen"] else f" ({row['backend']})")
    start = [name, size_of(row["dims"]), DTYPES[row["dtype"]], WAYS[row["direction"]]]
    if row["red"]:
        return [*start, "RED", *["-"] * (2 + len(peers)), "checks fail: no number"]
    small = row["direction"] in ("call", "call_grad")
    return [*start, time_of(row["seconds"][0]), "-" if small else f"{row['bytes_per_s'] / 1e9:.1f}",
            "-" if small else f"{100 * row['roof_fraction']:.0f} %", *[against(row, peer) for peer in peers],
            verdict_text(verdicts)]


def columns(peers: list[str]) -> list[str]:
    return ["operator", "size", "dtype", "direction", "time", "GB/s", "% of roof", *[f"x {peer}" for peer in peers], "gate"]


def geometric_means(rows: list[dict[str, Any]], readme: bool = False) -> list[list[str]]:
    """By operator, backend, direction and dtype: sizes, geometric mean and worst ratio to each peer, gates; worst first.

    `readme` leaves out rows without a gate that another row covers: backward alone and small calls.
    """
    groups, peers = defaultdict(list), families(rows)
    for row, verdicts in judged(rows):
        if not row["red"] and (verdicts or row["direction"] in ("forward", "both") or not readme):
            groups[row["op"], row["backend"], row["direction"], row["dtype"]].append((row, verdicts))
    lines = []
    for (op, backend, direction, dtype), members in groups.items():
        line = [op, backend, WAYS[direction], DTYPES[dtype], str(len(members))]
        for peer in peers:
            ratios = [row["against"][peer]["ratio"][0] for row, _ in members if peer in row["against"]]
            line.append(f"{statistics.geometric_mean(ratios):.2f} (worst {min(ratios):.2f})" if ratios else "-")
        shares = [row["roof_fraction"] for row, _ in members if row["roof_fraction"] is not None]
        line.append(f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %" if shares else "-")
        gated = [all(v.met for v in verdicts) for _, verdicts in members if verdicts]
        lines.append([*line, f"{sum(gated)} of {len(gated)} met" if gated else ""])
    return lines


def mean_columns(peers: list[str]) -> list[str]:
    return ["operator", "backend", "direction", "dtype", "sizes", *[f"x {peer}: geometric mean" for peer in peers],
            "% of roof", "gate"]


def print_tables(console: Console, rows: list[dict[str, Any]]) -> None:
    """All rows, worst first, then the geometric means, then the count of gates."""
    peers, pairs = families(rows), judged(rows)
    table = Table(title="Worst first: paired ratio = peer's time / ours, median [20 %-80 %]", title_justify="left")
    for column in columns(peers):
        table.add_column(column, justify="left" if column in ("operator", "size", "gate") else "right",
                         no_wrap=column != "gate")
    for row, verdicts in pairs:
        style = "red" if row["red"] or any(not v.met for v in verdicts) else "green" if verdicts else None
        table.add_row(*cells(row, verdicts, peers), style=style)
    console.print(table)
    means = Table(title="Geometric means over sizes", title_justify="left")
    for column in mean_columns(peers):
        means.add_column(column, no_wrap=True)
    for line in geometric_means(rows):
        means.add_row(*line)
    console.print(means)
    console.print(gate_count(pairs))


def gate_count(pairs: list[Judged]) -> str:
    gated = [verdicts for _, verdicts in pairs if verdicts]
    met = sum(all(v.met for v in verdicts) for verdicts in gated)
    return f"{met} of {len(gated)} gated rows meet their gate."


def describe(data: dict[str, Any]) -> str:
    """Device, threads, allocator, versions, commit and date of a run, as a sentence or two."""
    m, run, commit = data["machine_info"], data["run"], data["commit_info"]
    peaks = run["peaks"]
    where = f"{m['device']}, {m['threads']} threads, {m['cpu_isa']}" if m["device_type"] == "cpu" else m["device"]
    memory = f"; {m['allocator']}" if m["device_type"] == "cpu" else ""
    versions = f"torch {m['torch']}" + (f", triton {m['triton']}" if m["device_type"] == "cuda" else "")
    return (f"{where}; {versions}{memory}; "
            f"commit {commit['id'][:7]}{' (with uncommitted changes)' if commit['dirty'] else ''}, {data['datetime'][:10]}. "
            f"This run's yardsticks: copy {peaks['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
            f"read {peaks['read_bytes_per_s'] / 1e9:.1f} GB/s, bf16 matrix product "
            f"{peaks['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s.")


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def markdown(data: dict[str, Any]) -> str:
    """The whole run, for the file beside its JSON."""
    rows = rows_of(data)
    peers, pairs = families(rows), judged(rows)
    notes = "\n".join(f"- {note.splitlines()[0]}" for note in data["run"]["notes"])
    return "\n\n".join(filter(None, [
        f"# Benchmarks on {data['machine_info']['device']}", describe(data),
        "Paired ratio: the peer's time over ours in the same round, median [20 %-80 %]; the fastest form of each peer. "
        "Worst first.", gate_count(pairs), markdown_table(columns(peers), [cells(r, v, peers) for r, v in pairs]),
        markdown_table(mean_columns(peers), geometric_means(rows)), notes])) + "\n"


def section(runs: list[dict[str, Any]]) -> str:
    """The README's section: geometric means of each operator's newest complete run on each device, with links to the rest."""
    if not runs:
        return "No complete run is recorded yet: `python -m benchmarks` makes one."
    parts = ["A ratio is the peer's time over ours, interleaved call by call in one run, against the fastest form of each "
             "peer; % of roof is the larger of two shares of the time taken: what the bytes moved need at this machine's copy "
             f"rate ({' and '.join(f'`{op}`' for op in READ_BOUND)}, which only read: at its read rate), and what the flops "
             "need at torch's matrix rate. These are rates of other programs, not limits: more than 100 % is possible."]
    for data in runs:
        rows = rows_of(data)
        stem = data["path"].relative_to(ROOT).with_suffix("").as_posix()
        parts += [describe(data), markdown_table(mean_columns(families(rows)), geometric_means(rows, readme=True)),
                  f"{gate_count(judged(rows))} [Every size]({stem}.md), [data]({stem}.json).",
                  f"![Share of the roof that each row reaches]({stem}.png)"]
    if all(data["machine_info"]["device_type"] == "cpu" for data in runs):
        parts.append(NO_GPU)
    parts += [memory(path) for path in sorted({data["path"].parent / MEMORY for data in runs}) if path.is_file()]
    return "\n\n".join(parts)


def memory(path: Path) -> str:
    """Peak memory over the number of tokens, as `python -m benchmarks.memory` recorded it."""
    data = json.loads(path.read_text())
    tokens = sorted({row["tokens"] for row in data["rows"]})
    found = {(row["form"], row["tokens"]): f"{row['extra_bytes'] / 2**30:.2f}" for row in data["rows"]}
    found |= {(row["form"], row["tokens"]): row["why"] for row in data["left_out"]}
    forms = list(dict.fromkeys(form for form, _ in found))
    lines = [[f"`{form}`" if form != "ours" else form, *(found.get((form, n), "-") for n in tokens)] for form in forms]
    stem = path.relative_to(ROOT).with_suffix("").as_posix()
    return "\n\n".join([
        f"Peak memory of the linear cross-entropy, forward and backward, D = {data['cols']:,}, V = {data['vocab']:,}, "
        f"{data['dtype']}: GiB beyond inputs, gradients and one float32 accumulator of the weight's gradient. "
        f"{data['machine_info']['device']}, torch {data['machine_info']['torch']}, commit {data['commit_info']['id'][:7]}.",
        markdown_table(["form", *(f"{n:,} tokens" for n in tokens)], lines), f"![Memory over tokens]({stem}.png)"])


def with_section(text: str, runs: list[dict[str, Any]]) -> str:
    """`text` (a README) with what stands between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md: expected the lines {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section(runs)}\n{END}{rest.split(END)[1]}"


def rewrite_readme(path: Path = ROOT / "README.md", results: Path = RESULTS) -> bool:
    """Bring the README's section up to date; whether it changed."""
    old = path.read_text()
    new = with_section(old, newest(results))
    if new != old:
        path.write_text(new)
    return new != old
