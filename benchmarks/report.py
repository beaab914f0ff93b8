"""Tables of benchmark rows (`suite.Row` as dicts), for the terminal and as Markdown; pages.py builds the pages from them."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from . import setting
from .gates import Verdict, judge, load
from .names import size_of
from .record import rows_of

DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
WAYS = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd", "call": "call", "call_grad": "call, grad"}
USUAL = ("eager", "compile")  # families with a column of their own; all others share one
CHANGED = "†"  # stands behind the operator's name in rows whose arithmetic has changed since they were timed
Judged = tuple[dict[str, Any], list[Verdict]]


def judged(rows: list[dict[str, Any]]) -> list[Judged]:
    """Rows with their verdicts, worst first: rows whose checks failed, then the rest by their margin to the gate and, where
    that is equal, by the ratio to the fastest peer."""
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
    """A row's verdict in words: missed gates with numbers, "met", or "at the limit" where a demanded
    ratio was not reached but counts as met, because the row runs at the limit of the machine (`Verdict.limit`)."""
    missed = [f"{v.what} {'-' if v.got is None else f'{v.got:.2f}'} < {v.need:g}" for v in verdicts if not v.met]
    if missed or not verdicts:
        return "missed: " + ", ".join(missed) if missed else ""
    return "met" if all(v.reached for v in verdicts) else "at the limit"


def percent(shares: list[float | None]) -> str:
    known = [share for share in shares if share is not None]
    if not known:
        return "-"
    low, high = f"{100 * min(known):.0f}", f"{100 * max(known):.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def mean(rows: list[dict[str, Any]], peer: str) -> str:
    """Geometric mean, as text, of the ratios to a peer over the sizes at which it was timed; the lowest ratio follows where
    there are several sizes."""
    ratios = [row["against"][peer]["ratio"][0] for row in rows if peer in row["against"]]
    if not ratios:
        return "-"
    worst = f" (worst {min(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.geometric_mean(ratios):.2f}{worst}"


def name_of(row: dict[str, Any], *others: dict[str, Any]) -> str:
    """The operator's name, with the backend where it is not the automatic choice, and with the mark CHANGED where the
    arithmetic of this row or of one of the rows `others` has changed since it was timed."""
    name = row["op"] + ("" if row["chosen"] else f" ({row['backend']})")
    return name + (f" {CHANGED}" if any(r.get("changed") for r in (row, *others)) else "")


def families(rows: list[dict[str, Any]]) -> list[str]:
    present = {family for row in rows for family in row["against"]}
    return [f for f in USUAL if f in present] + sorted(present - set(USUAL))


def heads(peers: list[str]) -> list[str]:
    return [f"x {peer}" for peer in peers if peer in USUAL] + (["x others"] if set(peers) - set(USUAL) else [])


def by_column(peers: list[str], text: Callable[[str], str]) -> list[str]:
    """`text(peer)` of each peer, arranged in the columns of `heads`: one for each of USUAL, one for all other peers."""
    others = [f"{peer} {text(peer)}" for peer in peers if peer not in USUAL and text(peer) != "-"]
    shared = [", ".join(others) or "-"] if set(peers) - set(USUAL) else []
    return [text(peer) for peer in peers if peer in USUAL] + shared


def cells(row: dict[str, Any], verdicts: list[Verdict], peers: list[str]) -> list[str]:
    """One row as text, in the order of `columns(peers)`."""
    start = [name_of(row), size_of(row["dims"]), DTYPES[row["dtype"]], WAYS[row["direction"]]]
    if row["red"]:
        return [*start, "RED", *["-"] * (2 + len(heads(peers))), "checks fail: no number"]
    small = row["direction"] in ("call", "call_grad")
    return [*start, time_of(row["seconds"][0]), "-" if small else f"{row['bytes_per_s'] / 1e9:.1f}",
            percent([row.get("limit_fraction")]), *by_column(peers, partial(against, row)),
            verdict_text(verdicts)]


def columns(peers: list[str]) -> list[str]:
    return ["operator", "size", "dtype", "direction", "time", "GB/s", "% of limit", *heads(peers), "gate"]


def geometric_means(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One table line for each operator, backend, direction and dtype: the number of sizes, the geometric mean and worst ratio
    to each peer, and the verdict of the gates. The worst lines come first."""
    groups, peers = defaultdict(list), families(rows)
    for row, verdicts in judged(rows):
        if not row["red"]:
            groups[row["op"], row["backend"], row["direction"], row["dtype"]].append((row, verdicts))
    lines = []
    for (_, backend, direction, dtype), members in groups.items():
        found = [row for row, _ in members]
        means = by_column(peers, partial(mean, found))
        lines.append([name_of(found[0] | {"chosen": True}, *found), backend, WAYS[direction], DTYPES[dtype], str(len(found)),
                      *means, percent([row.get("limit_fraction") for row in found]),
                      gates_of([verdicts for _, verdicts in members])])
    return lines


def gates_of(verdicts: list[list[Verdict]]) -> str:
    gated = [all(v.met for v in one) for one in verdicts if one]
    return f"{sum(gated)} of {len(gated)} met" if gated else ""


def mean_columns(peers: list[str]) -> list[str]:
    return ["operator", "backend", "direction", "dtype", "sizes", *[f"{head}: geometric mean" for head in heads(peers)],
            "% of limit", "gate"]


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
    met = [verdicts for verdicts in gated if all(v.met for v in verdicts)]
    limit = sum(verdict_text(verdicts) == "at the limit" for verdicts in met)
    return f"{len(met)} of {len(gated)} gated rows meet their gate" + (f", {limit} of them at the limit." if limit else ".")


def machine_of(data: dict[str, Any]) -> str:
    """Device, threads, instruction set, versions, setting of CPU memory and allocator of a run."""
    m = data["machine_info"]
    if m["device_type"] == "cuda":
        return f"{m['device']}; torch {m['torch']}, triton {m['triton']}"
    return (f"{m['device']}, {m['threads']} threads, {m['cpu_isa']}; torch {m['torch']}; CPU memory: {setting.of(m)} "
            f"({m['allocator']})")


def commit_of(data: dict[str, Any]) -> str:
    info = data["commit_info"]
    return f"{info['id'][:7]}{' (with uncommitted changes)' if info['dirty'] else ''}"


def rates_of(data: dict[str, Any]) -> str:
    """The machine's copy, read and product rates as this run measured them, in words."""
    peaks, registers = data["run"]["peaks"], data["run"].get("registers") or {}
    fresh = "" if "copy" in data["run"] else " (into fresh memory)"
    said = [f"copy{fresh} {peaks['copy_bytes_per_s'] / 1e9:.1f} GB/s", f"read {peaks['read_bytes_per_s'] / 1e9:.1f} GB/s",
            f"torch's bf16 matrix product {peaks['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s"]
    said += [f"register peak {DTYPES[dtype]} {found['flops_per_s'] / 1e12:.2f} TFLOP/s ({found['isa']})"
             for dtype, found in registers.items()]
    return ", ".join(said)


def describe(data: dict[str, Any]) -> str:
    """Device, threads, allocator, versions, commit and date of a run, as two sentences."""
    return f"{machine_of(data)}; commit {commit_of(data)}, {data['datetime'][:10]}. This run's yardsticks: {rates_of(data)}."


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def notes_of(data: dict[str, Any]) -> str:
    """One line for each thing that the run left out, with the reason."""
    return "\n".join(f"- {note.splitlines()[0]}" for note in data["run"]["notes"])


def markdown(data: dict[str, Any]) -> str:
    """The Markdown page of one run: its machine, the tables of its rows, and what was left out."""
    rows = rows_of(data)
    peers, pairs = families(rows), judged(rows)
    notes = notes_of(data)
    return "\n\n".join(filter(None, [
        f"# Benchmarks on {data['machine_info']['device']}", describe(data),
        "Paired ratio: the peer's time over ours in the same round, median [20 %-80 %]; the fastest form of each peer. "
        "Worst first.", gate_count(pairs), markdown_table(columns(peers), [cells(r, v, peers) for r, v in pairs]),
        markdown_table(mean_columns(peers), geometric_means(rows)), notes])) + "\n"
