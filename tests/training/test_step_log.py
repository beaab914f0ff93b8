"""The log of JSON lines: incomplete lines, resuming, numbers that JSON cannot write, a disk that is full for a while."""

import errno
import json
import os

import pytest

from internlm2.training.metrics import StepLog, memory_in_use, read_log, reset_peak_memory


@pytest.fixture
def log(tmp_path):
    warnings = []
    log = StepLog(tmp_path / "run" / "log.jsonl", warnings.append)
    log.warnings = warnings
    yield log
    log.close()


def test_lines_are_on_disk_at_once(log):
    log.append({"step": 1, "loss": 0.1 + 0.2})
    log.append({"step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    assert read_log(log.path) == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": None, "grad_norm": None}]
    assert log.warnings == []


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "lo', b'{"step": 4}', b"garbage\n", b"\0\0\0\0\n"])
def test_truncation_on_resume(log, tail):
    for step in (1, 2, 3):
        log.append({"step": step})
    with open(log.path, "ab") as file:
        file.write(tail)
    log.close()
    log.__init__(log.path, log.warnings.append)
    log.truncate_after(2)
    log.append({"step": 3, "again": True})
    assert read_log(log.path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_torn_line_is_not_read(log):
    log.append({"step": 1})
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2')
    assert [r["step"] for r in read_log(log.path)] == [1]


def test_a_full_disk_delays_lines(log, monkeypatch):
    """On a full disk the first write stores only a part and later ones fail; then there is room again. In the end every line is
    written once and complete, and there was one warning."""
    write, room = os.write, [7]

    def full(file, data):
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(file, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", full)
    for step in range(1, 5):
        log.append({"step": step})
    assert log.path.read_bytes() == b'{"step"' and len(log.warnings) == 1 and "No space left" in log.warnings[0]
    with pytest.raises(OSError):
        log.sync()
    room[0] = 10_000
    log.append({"step": 5})
    log.sync()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_memory_of_this_process():
    import torch

    cpu = torch.device("cpu")
    if not reset_peak_memory(cpu):
        pytest.skip("this system cannot reset a process's peak memory")
    before, _ = memory_in_use(cpu)
    block = torch.ones(16 << 20)  # 64 MiB
    held, _ = memory_in_use(cpu)
    del block
    _, peak = memory_in_use(cpu)
    assert 60 << 20 <= held - before <= 80 << 20
    assert peak >= held - (4 << 20)
