"""What this process can ask of the allocator behind `malloc`: to keep freed blocks, to give them back, to count them.

One class for each allocator, all with the same methods; `found()` chooses. They return text that says what was done, because
no two allocators can do the same. docs/memory.md has the table of what was tried with which.
"""

import ctypes
import os
import sys

MIB = 2**20
# The numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8
LARGEST_INT = 2**31 - 1  # mallopt takes a C int
PAD = 64 * MIB  # what the heap grows by beyond a request; a thread's heap of 64 MiB is also kept whole by it
# What glibc's rule arrives at by itself once a process has freed a block of 32 MiB. Any call of mallopt ends that rule.
USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * MIB, M_TRIM_THRESHOLD: 64 * MIB, M_TOP_PAD: 128 * 1024}


class Allocator:
    """An allocator of which this library can only tell the name."""

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why

    def keep(self, limit: int | None) -> tuple[bool, int | None, str]:
        """(whether freed blocks stay from now on, the limit that holds in bytes, what was done or why nothing was)."""
        return False, None, f"nothing was changed: {self.why}"

    def release(self) -> str:
        return f"nothing was changed: {self.why}"

    def free_bytes(self) -> int | None:
        """Bytes of freed blocks that the allocator holds, or None where it does not tell."""
        return None

    def end_bytes(self) -> int | None:
        """The part of them that lies at the end of the heap, which is what a limit bounds; None where there is no such part."""
        return None


class Glibc(Allocator):
    """Blocks come from the heap instead of from mmap, whatever their size, and the end of the heap is not cut off.

    Other threads: a thread that has an arena of its own takes large blocks from heaps of 64 MiB, and larger ones from mmap
    whatever is set. Threads that start after `keep` therefore share the main arena (M_ARENA_MAX).
    """

    def __init__(self, lib: ctypes.CDLL) -> None:
        lib.gnu_get_libc_version.restype = ctypes.c_char_p
        self.lib, self.name = lib, f"glibc {lib.gnu_get_libc_version().decode()}"

    def _set(self, values: dict[int, int]) -> None:
        refused = [number for number, value in values.items() if not self.lib.mallopt(number, value)]
        if refused:
            raise RuntimeError(f"memory: mallopt refused the parameters {refused}")

    def keep(self, limit: int | None) -> tuple[bool, int | None, str]:
        held = limit if limit is None else min(limit, LARGEST_INT)
        # As a size_t -1 is the largest threshold: never cut. With equal threshold and pad, a cut leaves `held` bytes.
        self._set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1 if held is None else held, M_TOP_PAD: PAD if held is None else held,
                   M_ARENA_MAX: 1})
        self._fill_thread_cache()
        if held is None:
            return True, None, "freed blocks stay in this process"
        self.lib.malloc_trim(ctypes.c_size_t(held))  # gives back what an earlier call kept beyond the new limit
        asked = "" if held == limit else f" ({limit:,} were asked for, mallopt holds no more)"
        return True, held, f"freed blocks stay in this process, at most {held:,} bytes at the end of its heap{asked}"

    def _fill_thread_cache(self) -> None:
        """Fills this thread's cache of small blocks. torch aligns tensors to 64 bytes, so that glibc cuts small pieces off both
        ends of a block; in the cache they would stay apart from it, and the block, once freed, would be too small for the next
        tensor of the same size. With a full cache fewer tensors of a new size take fresh memory before one is reused."""
        malloc, free = self.lib.malloc, self.lib.free
        malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        free.restype, free.argtypes = None, [ctypes.c_void_p]
        for size in range(24, 130, 16):
            for block in [malloc(size) for _ in range(32)]:  # the cache takes 7 of each size
                free(block)

    def release(self) -> str:
        self._set(USUAL)
        self.lib.malloc_trim(ctypes.c_size_t(0))
        return "kept memory was given back, and blocks that are freed from now on are no longer kept"

    def _info(self) -> "MallInfo | None":
        if not hasattr(self.lib, "mallinfo2"):  # glibc before 2.33 counts in 32 bits, which overflow
            return None
        self.lib.mallinfo2.restype = MallInfo
        return self.lib.mallinfo2()

    def free_bytes(self) -> int | None:
        info = self._info()
        return info and info.fordblks

    def end_bytes(self) -> int | None:
        info = self._info()
        return info and info.keepcost


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "uordblks", "fordblks", "keepcost")]


class Jemalloc(Allocator):
    """Freed pages are purged after a delay, and those of blocks of 8 MiB and more at once: `keep` sets the delay to never."""

    KINDS = ("dirty", "muzzy")
    ALL = 4096  # MALLCTL_ARENAS_ALL

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib, self.before = lib, {}
        lib.mallctl.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.name = f"jemalloc {(self._get('version', ctypes.c_char_p) or b'unknown').decode().split('-')[0]}"

    def _get(self, name: str, kind: type):
        value, size = kind(), ctypes.c_size_t(ctypes.sizeof(kind))
        return None if self.lib.mallctl(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0) else value.value

    def _set(self, name: str, value: int) -> bool:
        new = ctypes.c_ssize_t(value)
        return self.lib.mallctl(name.encode(), None, None, ctypes.byref(new), ctypes.sizeof(new)) == 0

    def _delays(self) -> list[str]:
        """The names of the delays: those of arenas to come, and those of the arenas that exist."""
        arenas = range(self._get("arenas.narenas", ctypes.c_uint) or 0)
        names = [f"{where}.{kind}_decay_ms" for where in ("arenas", *(f"arena.{i}" for i in arenas)) for kind in self.KINDS]
        return [name for name in names if self._get(name, ctypes.c_ssize_t) is not None]

    def keep(self, limit: int | None) -> tuple[bool, int | None, str]:
        if limit is not None:
            return bool(self.before), None, "nothing was changed: jemalloc cannot be given a limit for what it keeps"
        for name in self._delays():
            self.before.setdefault(name, self._get(name, ctypes.c_ssize_t))
        refused = [name for name in self._delays() if not self._set(name, -1)]
        if refused:
            raise RuntimeError(f"memory: jemalloc refused {', '.join(refused)}")
        return True, None, "freed blocks stay in this process"

    def release(self) -> str:
        for name in self._delays():
            usual = self._get(f"opt.{name.rsplit('.', 1)[1]}", ctypes.c_ssize_t)
            self._set(name, self.before.get(name, usual))
        self.before.clear()
        self.lib.mallctl(f"arena.{self.ALL}.purge".encode(), None, None, None, 0)
        return "kept memory was given back, and jemalloc purges again what is freed from now on"

    def free_bytes(self) -> int | None:
        epoch = ctypes.c_uint64(1)  # writing it makes jemalloc count anew
        self.lib.mallctl(b"epoch", None, None, ctypes.byref(epoch), ctypes.sizeof(epoch))
        pages = self._get(f"stats.arenas.{self.ALL}.pdirty", ctypes.c_size_t)
        size = self._get("arenas.page", ctypes.c_size_t)
        return None if pages is None or size is None else pages * size


class Tcmalloc(Allocator):
    """gperftools' tcmalloc, which keeps freed blocks by itself and gives them back slowly (TCMALLOC_RELEASE_RATE)."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        lib.tc_version.restype = ctypes.c_char_p
        self.lib, self.name = lib, f"tcmalloc {lib.tc_version(None, None, None).decode().split()[-1]}"

    def keep(self, limit: int | None) -> tuple[bool, int | None, str]:
        if limit is not None:
            return True, None, "tcmalloc keeps freed blocks by itself and cannot be given a limit here: nothing was changed"
        return True, None, "tcmalloc keeps freed blocks by itself (all, with TCMALLOC_RELEASE_RATE=0): nothing was changed"

    def release(self) -> str:
        self.lib.MallocExtension_ReleaseFreeMemory()
        return "kept memory was given back; tcmalloc goes on keeping what is freed from now on"

    def free_bytes(self) -> int | None:
        value = ctypes.c_size_t()
        found = self.lib.MallocExtension_GetNumericProperty(b"tcmalloc.pageheap_free_bytes", ctypes.byref(value))
        return value.value if found else None


class _Place(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("name", ctypes.c_char_p), ("address", ctypes.c_void_p)]


def _file_of(lib: ctypes.CDLL, symbol: str) -> str:
    """The file whose `symbol` this process calls; "" where that cannot be told."""
    if not (hasattr(lib, symbol) and hasattr(lib, "dladdr")):
        return ""
    place, lib.dladdr.argtypes = _Place(), [ctypes.c_void_p, ctypes.c_void_p]
    answered = lib.dladdr(ctypes.cast(getattr(lib, symbol), ctypes.c_void_p), ctypes.byref(place))
    return os.fsdecode(place.file) if answered and place.file else ""


def found() -> Allocator:
    """The allocator that serves `malloc` in this process."""
    if sys.platform == "darwin":
        return Allocator("macOS malloc", "macOS has no setting for what its malloc keeps")
    if sys.platform == "win32":
        return Allocator("Windows heap", "Windows has no setting for what its heaps keep")
    lib = ctypes.CDLL(None)
    malloc = _file_of(lib, "malloc")
    if malloc and malloc == _file_of(lib, "mallctl"):
        return Jemalloc(lib)
    if malloc and malloc == _file_of(lib, "tc_version") and hasattr(lib, "MallocExtension_ReleaseFreeMemory"):
        return Tcmalloc(lib)
    if malloc and malloc == _file_of(lib, "gnu_get_libc_version"):
        return Glibc(lib)
    name = os.path.basename(malloc) or "unknown"
    if "musl" in name:
        return Allocator("musl malloc", "musl has no setting for what its malloc keeps; preload tcmalloc")
    return Allocator(name, "this allocator is not known here")
