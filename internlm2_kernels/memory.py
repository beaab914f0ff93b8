"""CPU memory that stays in the process: page faults of large fresh tensors can cost several times what a kernel costs.

A default glibc serves every block of 32 MiB and more by mmap and unmaps it when it is freed, so that each large output is paid
for with one page fault for every 4 KiB. `keep_freed_memory()` ends that for the whole process, PyTorch's own operators
included; `release()` gives the memory back; `report()` counts it. Nothing happens at import. docs/memory.md says what was
measured, and what each allocator and operating system can do.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from . import _allocators

__all__ = ["Kept", "Report", "keep_freed_memory", "release", "report"]


@dataclass(frozen=True)
class Kept:
    """What a call did. `str()` of it is one line to print.

    allocator  the allocator behind malloc, with its version
    kept       whether freed blocks stay in the process from now on
    limit      bytes that may stay at the end of the heap; None where there is no limit, or none can be set
    what       what was done, or why nothing was
    """

    allocator: str
    kept: bool
    limit: int | None
    what: str

    def __str__(self) -> str:
        return f"memory: {self.what} ({self.allocator})"


@dataclass(frozen=True)
class Report:
    """What is kept now. `str()` of it is one line to print.

    allocator       the allocator behind malloc, with its version
    free_bytes      freed blocks that the allocator holds, pages that were never written included; None where it does not tell
    end_bytes       the part of them at the end of the heap, which is what a limit bounds (glibc only)
    resident_bytes  memory of this process that is present, in use or not; None outside Linux
    """

    allocator: str
    free_bytes: int | None
    end_bytes: int | None
    resident_bytes: int | None

    def __str__(self) -> str:
        size = lambda count: "unknown" if count is None else f"{count / 2**20:,.1f} MiB"
        return f"memory: {size(self.free_bytes)} free, {size(self.resident_bytes)} resident ({self.allocator})"


def keep_freed_memory(limit: int | None = None) -> Kept:
    """Makes this process keep the large blocks that it frees, so that the next tensor of that size causes no page faults.

    limit    bytes, or None for no limit. With glibc it bounds the free memory at the end of the heap after each free; free
             blocks between blocks in use are not counted and stay until release(). glibc holds at most 2**31 - 1 bytes: a
             larger limit becomes that, and the result says so. jemalloc and tcmalloc cannot be given a limit: with one,
             nothing is changed
    Returns  what was done or could not be done, see `Kept`. A further call sets another limit, and what is kept beyond it is
             given back
    Works    at any time, before or after torch is imported, with threads running; a process forked later inherits it. With
             glibc, threads that start later share the main thread's heap, also after release(), unless another thread has
             allocated before the call: heaps that exist are used again, and there blocks beyond 64 MiB still cause page
             faults. So call it early
    Errors   TypeError if limit is not an int, ValueError if it is below 0 or beyond the memory of this machine or container
    Cost     one call takes microseconds. The process holds about its peak from then on; the first few tensors of a new size
             still take fresh memory
    Source   mallopt(3); jemalloc's mallctl
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        raise TypeError(f"keep_freed_memory: limit: expected an int or None, got {type(limit).__name__}")
    if limit is not None and limit < 0:
        raise ValueError(f"keep_freed_memory: limit: expected at least 0 bytes, got {limit}")
    most = None if limit is None else machine_bytes()
    if most is not None and limit > most:
        raise ValueError(f"keep_freed_memory: limit: expected at most the {most} bytes of memory here, got {limit}")
    allocator = found()
    return Kept(allocator.name, *allocator.keep(limit))


def release() -> Kept:
    """Gives back the memory that is kept, and ends the keeping: blocks that are freed later are treated as in a process that
    never called `keep_freed_memory` but has already freed a large block, except that threads go on sharing one heap, and that
    free space in the heap, between blocks in use, may serve large blocks again.

    With glibc the free pages of all heaps are given back, except the end of heaps that other threads own, at most 64 MiB each.
    tcmalloc keeps what is freed later, as it always does. Cost: each free page is unmapped.
    """
    allocator = found()
    return Kept(allocator.name, False, None, allocator.release())


def report() -> Report:
    """Counts what the allocator holds and what is resident. Cost: microseconds; with glibc a walk over the free blocks."""
    allocator = found()
    return Report(allocator.name, allocator.free_bytes(), allocator.end_bytes(), _resident())


_FOUND: list[_allocators.Allocator] = []


def found() -> _allocators.Allocator:
    """The allocator of this process, looked for once: what serves malloc cannot change."""
    if not _FOUND:
        _FOUND.append(_allocators.found())
    return _FOUND[0]


def _resident() -> int | None:
    if sys.platform != "linux":
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine_bytes(root: Path = Path("/")) -> int | None:
    """The memory that this process may use: the machine's, or less where a control group limits it; None where unknown."""
    try:
        return min(_limits(root))
    except (AttributeError, OSError, ValueError):  # another system, or files that may not be read
        return None


def _limits(root: Path) -> list[int]:
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        number, controllers, path = line.split(":", 2)
        unified = number == "0" and not controllers
        if not unified and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup" if unified else "sys/fs/cgroup/memory")
        name = "memory.max" if unified else "memory.limit_in_bytes"
        group = top / path.lstrip("/")
        # A limit holds for all groups below it. In a container the path may be the host's, so that only `top` exists.
        for folder in dict.fromkeys((group, *group.parents, top)):
            if folder.is_relative_to(top) and (folder / name).exists():
                text = (folder / name).read_text().strip()
                limits += [int(text)] if text.isdigit() else []
    return limits
