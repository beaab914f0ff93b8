"""internlm2_kernels.memory: page faults before and after, threads, a fork, limits, giving back, other allocators' answers.

What it does to a process is read from the operating system's counters (page faults, resident pages), in processes of their own:
the settings of an allocator belong to the whole process.
"""

import ctypes.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm2_kernels import _allocators, memory

ROOT = Path(__file__).resolve().parents[2]
TENSOR = 2**26  # bytes: more than the 32 MiB from which glibc uses mmap by default
PAGES = TENSOR // 4096
FEW = PAGES // 100  # what other work of the process may cause meanwhile
COMMON = f"""
import json, os, resource, sys, threading
from internlm2_kernels import memory
import torch

def faults(calls=20):
    "Page faults of each of some clones of a tensor."
    source, counts = torch.ones({TENSOR} // 4), []
    for _ in range(calls):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        source.clone()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return counts

found = {{}}
"""


def run(script: str, **env: str) -> dict:
    done = subprocess.run([sys.executable, "-c", f"{COMMON}{script}\nprint(json.dumps(found))"], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env=os.environ | {"OMP_WAIT_POLICY": "passive"} | env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def on_glibc() -> bool:
    return isinstance(memory.found(), _allocators.Glibc)


LATE = """
faults(2)
found["asked"] = len(memory._FOUND)
found["start"], found["default"] = memory.report().resident_bytes, faults(4)
found["line"], found["kept"] = str(memory.keep_freed_memory()), faults()
found["held"] = memory.report().free_bytes
thread = threading.Thread(target=lambda: found.update(thread=faults(32)))  # its cache of small blocks has to fill first
thread.start()
thread.join()
reader, writer = os.pipe()
if os.fork() == 0:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    os.write(writer, json.dumps(faults()).encode())
    os._exit(0)
os.wait()
found["forked"] = json.loads(os.read(reader, 4096))
limited = memory.keep_freed_memory(2**24)
found["limit"], found["end at once"] = limited.limit, memory.report().end_bytes
found["limited"], found["end"] = faults(4), memory.report().end_bytes
found["largest"], found["said"] = memory.keep_freed_memory(min(2**31, memory.machine_bytes())).limit, str(
    memory.keep_freed_memory(2**31)) if memory.machine_bytes() >= 2**31 else ""
found["again"] = faults()
found["released"], found["end state"], found["after"] = str(memory.release()), memory.report().resident_bytes, faults(4)
"""


@pytest.fixture(scope="module")
def late():
    if not on_glibc():
        pytest.skip(f"this process runs on {memory.found().name}")
    found = run(LATE, THP_MEM_ALLOC_ENABLE="0")
    if min(found["default"]) < PAGES:
        pytest.skip("fresh memory comes in huge pages here")
    return found


def test_importing_changes_nothing(late):
    assert late["asked"] == 0 and min(late["default"]) >= PAGES


def test_a_kept_tensor_causes_no_page_faults(late):
    assert max(late["kept"][-4:]) <= FEW
    assert late["held"] >= TENSOR and "stay in this process" in late["line"] and "glibc" in late["line"]


def test_a_thread_that_starts_later_shares_what_is_kept(late):
    assert max(late["thread"][-4:]) <= FEW


def test_a_forked_process_keeps_too(late):
    assert max(late["forked"][-4:]) <= FEW


def test_a_limit_bounds_the_end_of_the_heap_and_a_second_call_replaces_it(late):
    page = os.sysconf("SC_PAGE_SIZE")
    assert late["limit"] == 2**24
    assert late["end at once"] <= 2**24 + 2 * page, "an earlier call kept more, which the new limit must give back"
    assert late["end"] <= 2**24 + 2 * page
    # The largest of several calls: a free block between two in use is not at the end of the heap, and may be used again.
    assert max(late["limited"][1:]) >= PAGES - 2**24 // page - FEW, "what is beyond the limit cannot have been kept"
    assert max(late["again"][-4:]) <= FEW
    if late["said"]:
        assert late["largest"] == 2**31 - 1 and "2,147,483,648 were asked for" in late["said"]


def test_release_gives_the_memory_back_and_ends_the_keeping(late):
    assert abs(late["end state"] - late["start"]) <= 0.05 * late["start"]
    assert max(late["after"]) >= PAGES and "no longer kept" in late["released"]


EARLY = f"""
found["kept"] = faults() if memory.keep_freed_memory().kept else []
wrong, stop = [], threading.Event()

def work(value):
    "Allocates, fills and checks tensors of several sizes."
    torch.set_num_threads(1)
    while not stop.is_set():
        for size in (2**10, 2**18, 2**23, {TENSOR} // 8):
            tensor = torch.full((size // 4,), float(value))
            if tensor[0] != value or tensor[-1] != value or tensor.numel() * 4 != size:
                wrong.append(value)

threads = [threading.Thread(target=work, args=(value,)) for value in range(3)]
for thread in threads:
    thread.start()
for index in range(40):
    memory.keep_freed_memory(None if index % 2 else 2**22)
    memory.report()
    memory.release()
stop.set()
for thread in threads:
    thread.join()
found["wrong"] = wrong
"""


def test_it_works_before_the_first_tensor_and_while_threads_allocate():
    if not on_glibc():
        pytest.skip(f"this process runs on {memory.found().name}")
    found = run(EARLY)
    assert max(found["kept"][-4:]) <= FEW and found["wrong"] == []


@pytest.mark.parametrize("library,name,again", (("jemalloc", "jemalloc", True), ("tcmalloc_minimal", "tcmalloc", False)))
def test_a_preloaded_allocator(library, name, again):
    path = ctypes.util.find_library(library)
    if path is None or not on_glibc():
        pytest.skip(f"{library} is not installed here")
    script = ("faults(2); memory.release(); found['start'] = memory.report().resident_bytes\n"
              "kept = memory.keep_freed_memory()\n"
              "found |= {'line': str(kept), 'is kept': kept.kept, 'kept': faults(), 'held': memory.report().free_bytes}\n"
              "found |= {'limit': memory.keep_freed_memory(2**20).limit, 'released': str(memory.release())}\n"
              "found |= {'end': memory.report().resident_bytes, 'after': faults(4)}")
    found = run(script, LD_PRELOAD=path)
    assert name in found["line"] and found["is kept"] and max(found["kept"][-4:]) <= FEW and found["held"] >= TENSOR
    assert found["limit"] is None and abs(found["end"] - found["start"]) <= 0.05 * found["start"]
    assert (min(found["after"][1:]) >= PAGES) == again, "only jemalloc can be told to stop keeping"


@pytest.mark.parametrize("platform,files,name", (
    ("darwin", {}, "macOS"), ("win32", {}, "Windows"), ("linux", {"malloc": "/lib/ld-musl-x86_64.so.1"}, "musl"),
    ("linux", {"malloc": "/opt/libother.so", "gnu_get_libc_version": "/lib/libc.so.6"}, "libother.so")))
def test_other_systems_say_that_nothing_was_changed(platform, files, name, monkeypatch):
    monkeypatch.setattr(_allocators.sys, "platform", platform)
    monkeypatch.setattr(_allocators, "_file_of", lambda lib, symbol: files.get(symbol, ""))
    allocator = _allocators.found()
    monkeypatch.setattr(memory, "found", lambda: allocator)
    for done in (memory.keep_freed_memory(), memory.keep_freed_memory(2**20), memory.release()):
        assert not done.kept and done.limit is None and name in str(done) and "nothing was changed" in str(done)
    assert memory.report().free_bytes is None and "unknown free" in str(memory.report())


@pytest.mark.parametrize("limit,error,text", (
    (-1, ValueError, "limit: expected at least 0 bytes, got -1"), (2**62, ValueError, r"limit: expected at most the \d+ bytes"),
    (1.5, TypeError, "limit: expected an int or None, got float"), ("1", TypeError, "got str"), (True, TypeError, "got bool")))
def test_a_wrong_limit_is_refused_before_anything_is_set(limit, error, text, monkeypatch):
    monkeypatch.setattr(memory, "found", lambda: pytest.fail("the allocator was asked for"))
    with pytest.raises(error, match=f"^keep_freed_memory: .*{text}"):
        memory.keep_freed_memory(limit)


@pytest.mark.parametrize("groups,folder,name,text,limited", (
    ("0::/a/b", "sys/fs/cgroup/a", "memory.max", "4096", True), ("0::/a/b", "sys/fs/cgroup/a/b", "memory.max", "max", False),
    ("3:cpu,memory:/a\n0::/", "sys/fs/cgroup/memory/a", "memory.limit_in_bytes", "4096", True),
    ("3:memory:/host/path", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "4096", True),
    ("0::/a", "sys/fs/cgroup/other", "memory.max", "4096", False)))
def test_the_limit_of_a_control_group_counts(groups, folder, name, text, limited, tmp_path):
    whole = memory.machine_bytes(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / name).write_text(text + "\n")
    assert memory.machine_bytes(tmp_path) == (4096 if limited else whole) and whole > 2**20
