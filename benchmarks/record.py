"""A run on disk: one file in pytest-benchmark's format, rewritten after every pass, so that a killed run keeps its passes.

`pytest-benchmark --storage=file://benchmarks/results compare --group-by=group` reads it. Beside what pytest-benchmark
stores, `machine_info` holds device, threads, allocator and versions, `run` the options, the rates of this machine and
whether the run is complete, and every entry of ours has its `Row` in `extra_info`. Which rows of all recorded runs count
is decided in current.py.
"""

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark import __version__ as pytest_benchmark_version
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info

import internlm2_kernels
from internlm2_kernels import _registry
from tools.timing import Paired, Peaks

from . import setting
from .names import key_of, plain, short
from .suite import PASSES, STAGES, Pass, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def allocator(memory: str) -> str:
    """The allocator of CPU memory and what was set for it, beside the run's setting of memory: the time of a call with large
    fresh outputs depends on it more than on the kernel."""
    libc = " ".join(platform.libc_ver()) or platform.system()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = re.search(r"\[(\w+)\]", huge.read_text()) if huge.exists() else None
    changed = [f"{k}={os.environ[k]}" for k in ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_CONF") if os.environ.get(k)]
    changed += [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_") and k != "MALLOC_CONF"]
    malloc = f"{libc} malloc, {', '.join(changed)}" if changed else f"default malloc ({libc})"
    return (f"{malloc}, THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', '0')}, "
            f"huge pages {mode.group(1) if mode else 'unknown'}" + (", freed memory kept" if memory == setting.KEPT else ""))


def machine(device: torch.device, memory: str = setting.DEFAULT) -> dict[str, Any]:
    """pytest-benchmark's machine_info without the host's name, and with what our numbers depend on (threads, allocator, and
    the setting of CPU memory)."""
    info = pytest_benchmark_generate_machine_info()
    cpu = {key: info["cpu"].get(key) for key in ("brand_raw", "arch", "count", "l2_cache_size", "l3_cache_size")}
    name = cpu["brand_raw"] or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    keep = ("machine", "system", "python_version", "python_implementation", "python_implementation_version",
            "python_compiler")
    return {key: info[key] for key in keep} | {
        "node": slug(name if device.type == "cuda" else f"{name} {torch.get_num_threads()} threads"),
        "cpu": cpu,
        "device": name,
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "allocator": allocator(memory),
        "memory": memory if device.type == "cpu" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger": _version("liger_kernel"),
        "internlm2_kernels": internlm2_kernels.__version__,
        "build": _registry._C.build_info() if _registry._C else {},
        "cpu_isa": _registry._C.cpu_isa() if _registry._C else "",
        "gpu_state": gpu_state() if device.type == "cuda" else "",
    }


def _version(package: str) -> str:
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def gpu_state() -> str:
    """Clocks, power and temperature as nvidia-smi reports them now. The benchmarks never set them."""
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"
    try:
        return subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True,
                              timeout=20, check=True).stdout.strip().replace("\n", " | ")
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi did not answer"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit(given: str | None = None) -> dict[str, Any]:
    """The commit that is measured, as pytest-benchmark reads it from git. Where the tree is a copy without git, `given` holds
    the commit's id."""
    here = os.getcwd()
    os.chdir(ROOT)  # pytest-benchmark asks git in the current directory
    try:
        found = get_commit_info("internlm2_kernels")
        return found | ({"id": given, "dirty": False} if given else {})
    finally:
        os.chdir(here)


class Record:
    """The file of one run. `add` stores a pass and writes the file; `finish` marks the run complete.

    `memory`: the setting of CPU memory in which the process runs. `resume`: an unfinished run of the same setting, device,
    versions, commit and options in the folder is continued; each continuation leaves its own time, yardsticks and clocks in
    `resumed`. Where that run is complete, `repeated` is its path, and on a CPU the setting need not be measured again.
    """

    def __init__(self, folder: Path, device: torch.device, peaks: Peaks, options: dict[str, Any], *, resume: bool = False,
                 commit_id: str | None = None, registers: dict[str, Any] | None = None,
                 memory: str = setting.DEFAULT) -> None:
        commit_info, info = commit(commit_id), machine(device, memory)
        now = datetime.now(timezone.utc).isoformat()
        self.head = {"machine_info": info, "commit_info": commit_info, "datetime": now, "version": pytest_benchmark_version,
                     "run": {"peaks": asdict(peaks), "registers": registers or {}, "copy": "into present memory",
                             "options": options, "complete": False, "notes": [], "red": []}}
        self.entries: list[dict[str, Any]] = []
        folder = folder / info["node"]
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.glob("[0-9][0-9][0-9][0-9]_*.json"))
        self.path = folder / f"{int(paths[-1].name[:4]) + 1 if paths else 1:04d}_{commit_info['id'][:7]}.json"
        same = [path for path in paths if setting.of(load(path)["machine_info"]) == info["memory"]] if resume else []
        self.repeated: Path | None = None
        if same:
            self._continue(same[-1], {"datetime": now, "peaks": asdict(peaks), "gpu_state": info["gpu_state"]})

    def _continue(self, path: Path, part: dict[str, Any]) -> None:
        data = load(path)
        names = ("device", "torch", "triton", "internlm2_kernels", "threads")
        mine, its = ({name: head["machine_info"][name] for name in names} | {
            "commit": head["commit_info"]["id"], "options": plain(head["run"]["options"])} for head in (self.head, data))
        other = [f"{name} {its[name]}, not {mine[name]}" for name in mine if its[name] != mine[name]]
        if data["run"]["complete"]:
            self.repeated = path if not other and self.head["machine_info"]["memory"] else None
            return
        if other:
            raise ValueError(f"--resume: {path.name} was measured with {'; '.join(other)}")
        self.path, self.entries = path, data["benchmarks"]
        self.head = {name: data[name] for name in self.head}
        self.head["run"].setdefault("resumed", []).append(part)

    def rows(self) -> list[dict[str, Any]]:
        return rows_of(self.head | {"benchmarks": self.entries})

    def without_recorded(self, passes: list[Pass]) -> list[Pass]:
        """The passes that the record lacks. The one during which an earlier call was stopped comes last: it may hang again."""
        done = {key_of(row["op"], row["dims"], row["dtype"], row["direction"]) for row in self.rows()}
        left = [job for job in passes if key_of(job.op.name, job.case.dims, short(job.dtype), PASSES[job.kind][-1]) not in done]
        return sorted(left, key=lambda job: str(job) == self.head["run"].get("running"))

    def start(self, job: Pass) -> None:
        self.head["run"]["running"] = str(job)
        self.write()

    def add(self, job: Pass, rows: list[Row], paired: Paired | None) -> None:
        for row in rows:
            stage = STAGES.get(row.direction, row.direction)
            for name, times in (paired.times.get(stage, {}) if paired else {}).items():
                if name.startswith("ours ") and name != f"ours {row.backend}":
                    continue  # another backend of ours, which has a row of its own
                ours = name == f"ours {row.backend}"
                if not ours and not row.chosen:
                    continue  # the peers are stored once, with the row of the automatically chosen backend
                self._entry(job, row, name, times, {"row": asdict(row)} if ours else {})
            if row.red:
                self.head["run"]["red"].append(plain(asdict(row)))
        for name, times in (paired.screened if paired else {}).items():
            self._entry(job, rows[-1], name, times, {"screened": "slower than its family's fastest form in the warm-up"})
        self.head["run"].pop("running", None)
        self.write()

    def _entry(self, job: Pass, row: Row, name: str, times: list[float], extra: dict[str, Any]) -> None:
        stats = Stats()
        stats.data = times
        group = f"{job.op.name}-{job.case}-{short(job.dtype)}-{row.direction}"
        self.entries.append(plain({
            "group": group, "name": f"{group}[{name}]", "fullname": f"benchmarks::{group}[{name}]", "param": name,
            "params": job.case.dims | {"op": job.op.name, "dtype": short(job.dtype), "direction": row.direction,
                                       "contender": name},
            "options": {"warmup": True, "disable_gc": True, "timer": row.method}, "extra_info": extra,
            "stats": stats.as_dict() | {"iterations": 100 if job.small else 1}}))

    def note(self, notes: list[str]) -> None:
        known = self.head["run"]["notes"]
        known += [note for note in notes if note not in known]

    def finish(self, complete: bool, state: str = "") -> None:
        self.head["run"] |= {"complete": complete, "gpu_state_after": state,
                             "finished": datetime.now(timezone.utc).isoformat()}
        self.write()

    def write(self) -> None:
        head = json.dumps(self.head, indent=1)[:-2]
        entries = ",\n".join(json.dumps(entry) for entry in self.entries)
        partial = self.path.with_suffix(".partial")
        partial.write_text(f'{head},\n "benchmarks": [\n{entries}\n ]\n}}\n')
        os.replace(partial, self.path)


def load(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    data["path"] = path
    return data


def rows_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run, as dicts of `Row` with the run's setting of CPU memory in `memory`, red ones included."""
    timed = [entry["extra_info"]["row"] for entry in data["benchmarks"] if "row" in entry["extra_info"]]
    return [row | {"memory": setting.of(data["machine_info"])} for row in [*timed, *data["run"]["red"]]]
