"""Peak resident memory of a call, read from the kernel's own counter."""

import ctypes
import threading
from pathlib import Path


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_extra(call):
    """(result, largest growth of the resident size during the call in bytes), sampled every 5 ms. Memory that earlier tests
    freed and that glibc kept is first returned to the system: a call that reused it would seem to need no memory.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    before, seen, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            seen[0] = max(seen[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
    finally:
        done.set()
        watcher.join()
    return result, max(seen[0], resident() - before)
