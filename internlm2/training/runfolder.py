"""The folder of a run: one process at a time trains in it, and its configuration never changes."""

import dataclasses
import math
import os
from pathlib import Path

import torch

from internlm2.config import dump_config, load_config
from internlm2.training.config import TrainConfig


class RunLock:
    """Reserves the folder of a run for this process. The operating system releases it when the process ends, even by a kill."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / "lock", "a+")  # noqa: SIM115  (the open file is the lock)
        try:
            import fcntl
        except ImportError:  # Windows has no fcntl: there the user must not start two processes in one folder
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RuntimeError(f"another process is training in {folder}; stop it or choose another out") from None

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_exception) -> None:
        self.release()


def usable_cpus() -> int:
    """The number of CPUs that this process may use, by its affinity and the quota of its control group (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)


def saved_config(out: str | Path) -> TrainConfig | None:
    """The configuration of the run in a folder; None where the folder has no run."""
    path = Path(out) / "config.toml"
    return load_config(TrainConfig, path) if path.exists() else None


def resolve_machine(config: TrainConfig) -> TrainConfig:
    """The configuration with threads = 0 replaced by the number that this process may use; ValueError if config.device does not
    exist on this machine."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' here, got 'cuda': torch sees no GPU")
    # torch's default is the number of physical cores: more threads than that make matrix products slower.
    return config if config.threads else dataclasses.replace(config, threads=min(torch.get_num_threads(), usable_cpus()))


def resolve_config(config: TrainConfig) -> TrainConfig:
    """Fills in what depends on the machine, and compares the configuration with the one saved in config.out.

    The configuration of a new run is saved there. A continued run must have the saved one; ValueError names what differs.
    """
    saved = saved_config(config.out)
    if saved and not config.threads:
        config = dataclasses.replace(config, threads=saved.threads)
    config = resolve_machine(config)
    if saved is None:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        dump_config(config, Path(config.out) / "config.toml")
        return config
    # The folder may have been moved since, so `out` may differ.
    differing = _differences(dataclasses.asdict(saved), dataclasses.asdict(config) | {"out": saved.out})
    if differing:
        raise ValueError(
            f"config must be the one that {config.out} was started with, to continue it; differing: "
            + ", ".join(differing)
            + ". Choose another out for a new run."
        )
    return config


def _differences(saved: dict, given: dict, prefix: str = "") -> list[str]:
    lines = []
    for key, value in saved.items():
        if isinstance(value, dict) and isinstance(given[key], dict):
            lines += _differences(value, given[key], f"{prefix}{key}.")
        elif value != given[key]:
            lines.append(f"{prefix}{key} (saved {value!r}, given {given[key]!r})")
    return lines
