"""Which rows of the recorded runs count today: for every device, setting of CPU memory, size, dtype and direction the newest,
whichever run holds it.

The rows of a run that was stopped half-way count too. Where results/changed.toml says that the arithmetic of a row has changed
since it was timed, the row is marked until it is timed again. A run of which no row counts any more is superseded, and `prune`
removes its files.
"""

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from internlm2_kernels import OPS

from . import setting
from .names import key_of, short
from .record import RESULTS, load, rows_of
from .suite import PASSES, plan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHANGED = "changed.toml"
DIRECTIONS = ["forward", "backward", "both", "call"]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


@dataclass(frozen=True)
class Device:
    """One device: the rows that count, and the runs that hold at least one of them, newest first.

    A row is a `Row` as a dict, with its run's setting of CPU memory in `memory`, the name of its record in `record`, and in
    `changed` what has changed since it was measured, which is empty where nothing has.
    """

    folder: Path
    runs: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    @property
    def info(self) -> dict[str, Any]:
        """Device, threads and versions, as the newest run recorded them."""
        return self.runs[0]["machine_info"]

    def settings(self) -> list[str]:
        """The settings of CPU memory that have rows, the one with the most operators first."""
        held = {name: {row["op"] for row in self.rows if row["memory"] == name and not row["red"]} for name in setting.ORDER}
        return sorted((name for name in held if any(row["memory"] == name for row in self.rows)), key=lambda n: -len(held[n]))

    def of(self, memory: str) -> list[dict[str, Any]]:
        """The rows of one setting."""
        return [row for row in self.rows if row["memory"] == memory]

    @property
    def on_gpu(self) -> bool:
        return self.info["device_type"] == "cuda"


def planned(device_type: str) -> set[str]:
    """The keys of the rows that a run would measure today. The tables show no other rows,
    such as those of sizes that have been removed from the registry."""
    passes = plan(list(OPS), DIRECTIONS, DTYPES, False, device_type)
    return {key_of(job.op.name, job.case.dims, short(job.dtype), direction)
            for job in passes for direction in PASSES[job.kind]}


def changes(results: Path = RESULTS) -> list[dict[str, Any]]:
    """The entries of changed.toml. An entry that could not mark any row raises ValueError."""
    path = results / CHANGED
    entries = tomllib.loads(path.read_text()).get("changed", []) if path.exists() else []
    for entry in entries:
        missing = {"ops", "commit", "date", "what"} - set(entry)
        unknown = set(entry) - {"ops", "commit", "date", "what", "backend", "dtype", "direction"}
        others = set(entry.get("ops", ())) - set(OPS)
        if missing or unknown or others or not isinstance(entry["date"], datetime):
            raise ValueError(f"{CHANGED}: {entry}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}, unknown "
                             f"operators {sorted(others)}; date must be a date with time and offset")
    return entries


def measured_at(data: dict[str, Any]) -> datetime:
    """The time of the commit that was measured, or the time of the run where the record does not hold the commit's."""
    return datetime.fromisoformat(data["commit_info"].get("time") or data["datetime"])


def changed_since(row: dict[str, Any], data: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """The changes of this row's arithmetic since it was measured, separated by semicolons."""
    return "; ".join(f"{entry['what']} ({entry['commit']})" for entry in entries
                     if row["op"] in entry["ops"] and measured_at(data) < entry["date"]
                     and row["backend"] == entry.get("backend", "cpp")
                     and row["dtype"] in entry.get("dtype", [row["dtype"]])
                     and row["direction"] in entry.get("direction", [row["direction"]]))


def counts(data: dict[str, Any]) -> bool:
    """Whether the rows of a run count. Quick runs are noise, and runs without torch.compile would hide a peer."""
    options = data["run"]["options"]
    return not options.get("quick") and options.get("compile", True)


def recorded(results: Path = RESULTS) -> dict[Path, list[Path]]:
    """The records in each device's folder, newest first."""
    folders = sorted({path.parent for path in results.glob("*/[0-9][0-9][0-9][0-9]_*.json")})
    return {folder: sorted(folder.glob("[0-9][0-9][0-9][0-9]_*.json"), reverse=True) for folder in folders}


def current(results: Path = RESULTS) -> list[Device]:
    """Every device with the rows that count. The device with the newest run comes first."""
    entries, devices = changes(results), []
    for folder, paths in recorded(results).items():
        runs, rows, seen, wanted = [], [], set(), None
        for path in paths:
            data = load(path)
            if not counts(data):
                continue
            wanted = planned(data["machine_info"]["device_type"]) if wanted is None else wanted
            found = []
            for row in rows_of(data):
                key = key_of(row["op"], row["dims"], row["dtype"], row["direction"])
                place = key, row["backend"], row["memory"]
                if key in wanted and place not in seen:
                    seen.add(place)
                    found.append(row | {"record": path.stem, "changed": changed_since(row, data, entries)})
            if found:
                runs.append(data)
                rows += found
        if runs:
            devices.append(Device(folder, runs, rows))
    return sorted(devices, key=lambda device: device.runs[0]["datetime"], reverse=True)


def superseded(results: Path = RESULTS) -> list[Path]:
    """The records of which no row counts."""
    kept = {run["path"] for device in current(results) for run in device.runs}
    return [path for paths in recorded(results).values() for path in paths if path not in kept]


def prune(results: Path = RESULTS) -> list[Path]:
    """Remove the superseded records with their tables and plots, and return their paths."""
    gone = superseded(results)
    for path in gone:
        for suffix in (".json", ".md", ".png"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    return gone
