"""The pages that are generated from the recorded runs: two parts of README.md, benchmarks/results/README.md and the plots.

`python -m benchmarks report` writes them. Every number in them comes from a record; none is typed by hand.
"""

import json
from pathlib import Path
from typing import Any

from internlm2_kernels._registry import BACKENDS

from . import current, plot, setting
from .current import Device
from .gates import judge, load, settings
from .record import RESULTS, ROOT
from .report import (
    CHANGED,
    DTYPES,
    WAYS,
    cells,
    columns,
    commit_of,
    families,
    gate_count,
    gates_of,
    geometric_means,
    judged,
    machine_of,
    markdown_table,
    mean,
    mean_columns,
    name_of,
    notes_of,
    rates_of,
)

ROWS = 10  # operators in the README's table, at most
FAMILIES = {"eager": "eager PyTorch", "compile": "torch.compile", "liger": "Liger", "flex": "FlexAttention",
            "mask": "SDPA with a mask", "folded": "SDPA on folded heads", "bf16 cache": "ours on a bf16 cache",
            "sequence": "torch's fused AdamW with masters", "cudnn": "SDPA, cuDNN", "flash": "SDPA, FlashAttention 2",
            "efficient": "SDPA, memory-efficient", "varlen": "torch's varlen attention"}
MEMORY = "memory_linear_cross_entropy.json"  # written by benchmarks/memory.py beside the runs
WHERE = {"reference": "any device, plain PyTorch", "cpp": "x86-64 CPUs: AVX2, AVX-512, AVX-512 with bfloat16, AMX",
         "triton": "NVIDIA GPUs", "cuda": "NVIDIA GPUs"}
UNMEASURED = {"reference": "what the other backends are compared with",
              "cpp": "tested; no run is recorded",
              "triton": "every kernel interpreted on the CPU against the same checks, compiled for sm_80, sm_90 and sm_100 and "
                        "audited; **not yet run on hardware**",
              "cuda": "every kernel run on the CPU through an emulator against the same checks, compiled for sm_80, sm_90 and "
                      "sm_100 and audited; **not yet run on hardware**"}


def status(devices: list[Device]) -> str:
    """The README's table of backends. A backend counts as measured as soon as a record holds a row of it."""
    lines = []
    for backend in BACKENDS:
        held = [device for device in devices if any(row["backend"] == backend and not row["red"] for row in device.rows)]
        named = lambda info: f"{info['device']}, {info['cpu_isa']}" if info.get("cpu_isa") else info["device"]
        where = "; ".join(f"{named(device.info)}, {device.runs[0]['datetime'][:10]}" for device in held)
        known = backend != "reference" and held
        lines.append([f"`{backend}`", WHERE[backend], f"tested; measured on {where}" if known else UNMEASURED[backend]])
    return markdown_table(["backend", "runs on", "status"], lines)


def shown(devices: list[Device]) -> Device | None:
    """The device of the README's table: the one whose rows cover the most operators, and the newest of several such."""
    count = lambda device: len({row["op"] for row in device.rows if not row["red"]})
    return max(devices, key=count, default=None)  # `devices` come newest first, and max returns the first of equals


def headline(device: Device, memory: str) -> list[list[dict[str, Any]]]:
    """The rows of the README's table in one setting of CPU memory, one list for each of at most ten operators in the order of
    gates.toml: bfloat16, forward and backward together where the operator has a backward."""
    chosen = []
    for op in settings()["order"]:
        rows = [row for row in device.of(memory) if row["op"] == op and row["dtype"] == "bfloat16" and row["chosen"]
                and not row["red"]]
        for direction in ("both", "forward"):
            found = [row for row in rows if row["direction"] == direction]
            if found:
                chosen.append(found)
                break
    return chosen[:ROWS]


def strongest(rows: list[dict[str, Any]]) -> str:
    """The fastest peer other than eager PyTorch, as text with the geometric mean of its ratios."""
    others = [peer for peer in families(rows) if peer != "eager" and peer != "bf16 cache"]
    means = {peer: mean(rows, peer) for peer in others}
    if not means:
        return "-"
    nearest = min(means, key=lambda peer: float(means[peer].split()[0]))
    return f"{means[nearest]}, {FAMILIES[nearest]}"


def speed(devices: list[Device], base: Path = ROOT) -> str:
    """The README's table and plot."""
    device = shown(devices)
    if device is None:
        return "No run is recorded yet: `python -m benchmarks` makes one."
    memory, gates, lines = device.settings()[0], load(), []
    groups = headline(device, memory)
    # The second setting in the table is that of a process in which nothing was set.
    usual = {(rows[0]["op"], rows[0]["direction"]): rows for rows in headline(device, setting.DEFAULT)
             } if memory not in ("", setting.DEFAULT) else {}
    for rows in groups:
        sizes = [row["dims"] for row in rows]  # an unfinished run may lack some in one setting; means are over the same sizes
        plain = [row for row in usual.get((rows[0]["op"], rows[0]["direction"]), []) if row["dims"] in sizes]
        fewer = f", {len(plain)} of the sizes" if 0 < len(plain) < len(rows) else ""
        lines.append([f"`{rows[0]['op']}`{f' {CHANGED}' if any(row['changed'] for row in rows) else ''}",
                      WAYS[rows[0]["direction"]], str(len(rows)), mean(rows, "eager"), strongest(rows),
                      gates_of([judge(row, gates) for row in rows]),
                      *([mean(plain, "eager") + fewer, strongest(plain) + fewer] if usual else [])])
    shown_rows = [row for rows in [*groups, *usual.values()] for row in rows]
    used = [run for run in device.runs if run["path"].stem in {row["record"] for row in shown_rows}]
    used.sort(key=lambda run: setting.of(run["machine_info"]) != memory)  # stable: the newest run in the table's setting first
    commits = ", ".join(dict.fromkeys(commit_of(run) for run in used))
    dates = sorted({run["datetime"][:10] for run in used})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    head = ["operator", "direction", "sizes", "x eager PyTorch", "x fastest other peer", "gates"]
    head += ["default: x eager", "default: x fastest other"] if usual else []
    parts = [f"{machine_of(used[0])}; bfloat16; commit{'s' if ',' in commits else ''} {commits}, {when}."]
    if memory:
        parts.append(f"Setting of CPU memory, for ours and for every peer: {memory}, {setting.WORDS[memory]}."
                     + (f" In the columns \"default\": {setting.WORDS[setting.DEFAULT]}." if usual else ""))
    parts.append(markdown_table(head, lines))
    if any(row["changed"] for rows in groups for row in rows):
        parts.append(f"{CHANGED} The arithmetic of this operator has changed since it was timed; it has not been timed again.")
    parts.append(f"![Ratio of each peer's time to ours]({(device.folder / plot.SPEED).relative_to(base).as_posix()})")
    return "\n\n".join(parts)


def page(devices: list[Device], results: Path = RESULTS) -> str:
    """benchmarks/results/README.md: every row that counts, on every device."""
    parts = ["# Recorded results", "This page is generated by `python -m benchmarks report` from the records beside it; "
             "[docs/benchmarks.md](../../docs/benchmarks.md) says how they are measured and how to read them. For each device, "
             "size, dtype and direction the newest recorded row counts.",
             "A ratio is the peer's time over ours in the same round, median [20 % to 80 % quantile]. % of limit is how close "
             "our time comes to what the machine allowed for this work in the same run; a dash stands where a record is older "
             f"than these yardsticks. {CHANGED} marks a row whose arithmetic has changed since it was timed.",
             "On a CPU every run has one setting of CPU memory, for ours and for every peer "
             "([docs/memory.md](../../docs/memory.md)): "
             + "; ".join(f"{name}: {words}" for name, words in setting.WORDS.items())
             + ". Gates are not judged in the last, where page faults are compared more than kernels."]
    if not any(device.on_gpu for device in devices):
        parts.append("No run on a GPU is recorded yet: `make gpu` makes one on a machine that has one.")
    for device in devices:
        parts += section(device, results)
    return "\n\n".join(filter(None, parts)) + "\n"


def section(device: Device, results: Path) -> list[str]:
    folder = device.folder.relative_to(results).as_posix()
    m, records = device.info, []
    for run in device.runs:
        count = sum(row["record"] == run["path"].stem for row in device.rows)
        its = run["machine_info"]
        records.append([f"[{run['path'].stem}]({folder}/{run['path'].name})", run["datetime"][:10], commit_of(run), str(count),
                        setting.of(its) or "-", its["cpu_isa"] or "-", its["torch"], rates_of(run)])
    title = f"## {m['device']}" + ("" if device.on_gpu else f", {m['threads']} threads")
    parts = [title, f"Newest run: {machine_of(device.runs[0])}.", gate_count(judged(device.rows)),
             markdown_table(["record", "date", "commit", "rows that count", "CPU memory", "instruction set", "torch",
                             "rates of this run"], records)]
    named = {its: f", CPU memory: {its}" if its else "" for its in device.settings()}
    for its, name in named.items():
        rows = device.of(its)
        parts += [f"### By operator{name}", markdown_table(mean_columns(families(rows)), geometric_means(rows))]
    parts.append(f"![Ratio of each peer's time to ours]({folder}/{plot.SPEED})")
    if any(row.get("limit_fraction") is not None for row in device.rows):
        parts.append(f"![Share of the machine's limit that each row reaches]({folder}/{plot.LIMITS})")
    parts += [memory(device.folder / MEMORY, results)] if (device.folder / MEMORY).exists() else []
    for its, name in named.items():
        rows = device.of(its)
        peers = families(rows)
        parts += [f"### Every size, worst first{name}", markdown_table([*columns(peers), "record"], [
            [*cells(row, verdicts, peers), row["record"][:4]] for row, verdicts in judged(rows)])]
    since = dict.fromkeys(f"- {name_of(row | {'chosen': True})} {WAYS[row['direction']]} {DTYPES[row['dtype']]}: "
                          f"{row['changed']}" for row in device.rows if row["changed"])
    notes = dict.fromkeys(line for run in device.runs for line in notes_of(run).splitlines())
    parts += [f"### Changed since ({CHANGED})", "\n".join(since)] if since else []
    return parts + (["### Left out by the runs", "\n".join(notes)] if notes else [])


def memory(path: Path, results: Path = RESULTS) -> str:
    """Peak memory over the number of tokens, as `python -m benchmarks.memory` recorded it."""
    data = json.loads(path.read_text())
    tokens = sorted({row["tokens"] for row in data["rows"]})
    found = {(row["form"], row["tokens"]): f"{row['extra_bytes'] / 2**30:.2f}" for row in data["rows"]}
    found |= {(row["form"], row["tokens"]): row["why"] for row in data["left_out"]}
    forms = list(dict.fromkeys(form for form, _ in found))
    lines = [[f"`{form}`" if form != "ours" else form, *(found.get((form, n), "-") for n in tokens)] for form in forms]
    return "\n\n".join([
        "### Peak memory of the linear cross-entropy",
        f"Forward and backward, D = {data['cols']:,}, V = {data['vocab']:,}, {data['dtype']}: GiB beyond inputs, gradients and "
        f"one float32 accumulator of the weight's gradient. {data['machine_info']['device']}, torch "
        f"{data['machine_info']['torch']}, commit {data['commit_info']['id'][:7]}.",
        markdown_table(["form", *(f"{n:,} tokens" for n in tokens)], lines),
        f"![Memory over tokens]({path.with_suffix('.png').relative_to(results).as_posix()})"])


def with_parts(text: str, devices: list[Device], base: Path = ROOT) -> str:
    """README.md with the text between its markers replaced."""
    for name, part in (("status", status(devices)), ("benchmarks", speed(devices, base))):
        begin, end = f"<!-- {name}: begin (python -m benchmarks report) -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"README.md: expected the lines {begin} and {end}, once each and in this order")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def write(results: Path = RESULTS, base: Path = ROOT) -> list[Path]:
    """Write all generated pages and return the paths that changed. The plots are drawn again when a page has changed."""
    devices = current.current(results)
    wanted = {base / "README.md": with_parts((base / "README.md").read_text(), devices, base),
              results / "README.md": page(devices, results)}
    changed = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        path.write_text(wanted[path])
    for device in devices:
        for name, draw in ((plot.SPEED, plot.speed), (plot.LIMITS, plot.limits)):
            if changed or not (device.folder / name).exists():
                memory = device.settings()[0]
                run = next(run for run in device.runs if setting.of(run["machine_info"]) == memory)
                draw(device.of(memory), device.folder / name, machine_of(run))
    return changed
