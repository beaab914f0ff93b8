"""Two plots: how close each row comes to the machine's limit, and the ratios to each peer by operator."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .names import size_of
from .report import DTYPES, WAYS

SPEED, LIMITS = "speed.png", "limits.png"
LOOKS = {"ours": ("o", "#0b6e4f"), "compile": ("s", "#d17a00"), "eager": ("D", "#9a9a9a"), "liger": ("^", "#5b4ab8"),
         "cudnn": ("P", "#2a7fb8"), "flash": ("v", "#c2417c"), "efficient": ("<", "#7a5c2e"), "flex": ("X", "#b8860b"),
         "varlen": (">", "#3b8686"), "mask": ("p", "#6b6b6b"), "folded": ("h", "#2a7fb8"), "bf16 cache": ("*", "#c2417c"),
         "sequence": ("d", "#7a5c2e")}


def limits(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plots for every row the fraction of the machine's limit that ours and its peers reach: one line for each size and
    direction, one panel for each dtype. Draws nothing where no row has a `limit_fraction`."""
    rows = [row for row in rows if not row["red"] and row.get("limit_fraction") is not None]
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    lines = list(dict.fromkeys(_line(row) for row in rows))
    places = [list(dict.fromkeys(line[i] for line in lines)) for i in range(3)]
    lines.sort(key=lambda line: [place.index(value) for place, value in zip(places, line, strict=False)])
    if not lines:
        return
    figure = Figure(figsize=(5.5 + 4.6 * len(dtypes), 2.2 + 0.27 * len(lines)), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        for row in rows:
            if row["dtype"] == dtype:
                _draw(panel, row, lines.index(_line(row)))
        panel.axvline(1.0, color="#c0392b", linewidth=1.2)
        panel.set_title(DTYPES[dtype])
        panel.set_xscale("log")
        panel.set_xlim(0.01, 2.0)
        panel.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"])
        panel.minorticks_off()
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.set_xlabel("share of the limit (copy or read rate, or register peak)")
        for index in range(1, len(lines)):
            if lines[index][:3] != lines[index - 1][:3]:
                panel.axhline(index - 0.5, color="#bbbbbb", linewidth=0.8)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    several = len({line[:2] for line in lines}) > len({line[0] for line in lines})
    labels = [f"{op}{f' ({backend})' if several else ''}  {size}  {WAYS[direction]}" for op, backend, direction, size in lines]
    panels[0].set_yticks(range(len(lines)), labels, fontsize=8.5)
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    present = ["ours", *[f for f in LOOKS if any(f in row["against"] for row in rows)]]
    handles = [Line2D([], [], marker=LOOKS[f][0], color=LOOKS[f][1], linestyle="", label=f) for f in present]
    handles.append(Line2D([], [], color="#c0392b", label="the machine's limit"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False, fontsize=8.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, wrap=True)
    figure.savefig(path, dpi=120)


def _line(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["op"], row["backend"], row["direction"], size_of(row["dims"])


def _draw(panel: Any, row: dict[str, Any], y: int) -> None:
    ours = row["limit_fraction"]
    shares = {"ours": ours} | {family: ours / peer["ratio"][0] for family, peer in row["against"].items()}
    panel.plot([min(shares.values()), max(shares.values())], [y, y], color="#cccccc", linewidth=1, zorder=1)
    for family, share in shares.items():
        marker, color = LOOKS.get(family, ("v", "#444444"))
        filled = {"color": color} if family == "ours" else {"facecolors": "white", "edgecolors": color}
        size, order = (34, 4) if family == "ours" else (26, 3)
        panel.scatter([share], [y], marker=marker, s=size, zorder=order, **filled)


def speed(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plots for each operator the geometric mean over its sizes of the ratio (each peer's time divided by ours), for forward
    and backward together where the operator has a backward."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if not row["red"] and row["chosen"] and row["direction"] in ("forward", "both"):
            groups.setdefault(row["op"], {}).setdefault(row["direction"], []).append(row)
    members = {op: found.get("both", found.get("forward")) for op, found in groups.items()}
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for found in members.values() for row in found)]
    means: dict[tuple[str, str], dict[str, float]] = {}
    for op, found in members.items():
        for dtype in dtypes:
            for family in LOOKS:
                ratios = [row["against"][family]["ratio"][0] for row in found if row["dtype"] == dtype
                          and family in row["against"]]
                if ratios and family != "bf16 cache":
                    means.setdefault((op, dtype), {})[family] = statistics.geometric_mean(ratios)
    lowest = {op: min(min(means[op, dtype].values()) for dtype in dtypes if (op, dtype) in means)
              for op in members if any((op, dtype) in means for dtype in dtypes)}
    ops = sorted(lowest, key=lowest.__getitem__, reverse=True)
    if not ops:
        return
    figure = Figure(figsize=(4.0 + 4.2 * len(dtypes), 1.8 + 0.3 * len(ops)), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    families = [family for family in LOOKS if any(family in found for found in means.values())]
    for panel, dtype in zip(panels, dtypes, strict=True):
        for y, op in enumerate(ops):
            found = means.get((op, dtype), {})
            if found:
                panel.plot([min(1.0, *found.values()), max(1.0, *found.values())], [y, y], color="#dddddd", zorder=1)
            for family, ratio in found.items():
                marker, color = LOOKS[family]
                panel.scatter([ratio], [y], marker=marker, s=34, color=color, zorder=3)
        panel.axvline(1.0, color="#0b6e4f", linewidth=1.4)
        panel.set_xscale("log")
        panel.set_xlim(0.5, 1.15 * max(10.0, *(r for found in means.values() for r in found.values())))
        panel.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
        panel.minorticks_off()
        panel.set_xlim(0.5, 1.15 * max(10.0, *(r for found in means.values() for r in found.values())))
        panel.grid(axis="x", color="#eeeeee")
        panel.set_title(DTYPES[dtype])
        panel.set_xlabel("peer's time / ours (1: equal; right: ours is faster)")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(ops)), [f"{op}  {WAYS[members[op][0]['direction']]}" for op in ops], fontsize=9)
    panels[0].set_ylim(len(ops) - 0.5, -0.5)
    handles = [Line2D([], [], marker=LOOKS[f][0], color=LOOKS[f][1], linestyle="", label=f) for f in families]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=8.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=8, wrap=True)
    figure.savefig(path, dpi=110)
