"""What a run records about itself: a log of JSON lines, and the memory that it uses."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class StepLog:
    """A log of one JSON object per step, which survives a kill at any moment and a full disk.

    Each line is handed to the operating system at once, so a killed process loses none. A line that cannot be written, for
    example to a full disk, is kept in memory and written again with the next line, while training continues.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self._warn = path, warn
        self._pending: list[bytes] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        self._end = os.lseek(self._file, 0, os.SEEK_END)

    def append(self, record: dict) -> None:
        """Adds a record. Numbers that are not finite become null, since JSON has no other way to write them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        first_failure = not self._pending
        self._pending.append(json.dumps(finite).encode() + b"\n")
        try:
            self._write_pending()
        except OSError as error:
            if first_failure:
                self._warn(f"{self.path} cannot be written ({error.strerror}); its lines are kept in memory for now")

    def sync(self) -> None:
        """Forces the lines onto the disk. Called before a checkpoint is saved, so that the log has every step up to it."""
        self._write_pending()
        os.fsync(self._file)

    def truncate_after(self, step: int) -> None:
        """Removes the lines of later steps and an incomplete last line; the resumed run writes those steps again."""
        end = 0
        with open(self.path, "rb") as lines:
            for line in lines:
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, KeyError, TypeError):
                    break
                end += len(line)
        os.ftruncate(self._file, end)
        self._end = end

    def close(self) -> None:
        os.close(self._file)

    def _write_pending(self) -> None:
        data = b"".join(self._pending)
        try:
            while data:
                os.lseek(self._file, self._end, os.SEEK_SET)
                written = os.write(self._file, data)
                self._end, data = self._end + written, data[written:]
            self._pending = []
        except OSError:
            # A part of the line may have been written. Only the rest is kept, and written when there is room again.
            self._pending = [data]
            raise


def read_log(path: Path) -> list[dict]:
    """The records of a log, without an incomplete last line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """(bytes in use now, the most since reset_peak_memory): on a CPU the resident memory of the process, on a GPU the memory
    that torch has allocated. Outside Linux, where the current number is not available, both are the peak of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = _peak_rss()
    return peak, peak


def reset_peak_memory(device: torch.device) -> bool:
    """Starts a new measurement of the peak. Returns False where the system cannot do that; `memory_in_use` then gives the peak
    since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # 5 resets the peak resident set size to the current one (Linux, proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _peak_rss() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
