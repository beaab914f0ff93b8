"""`make gpu` as far as it runs without a GPU: arguments, phases and their time, ended processes, collection of the checks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for needed in ("pytest_benchmark", "matplotlib", "rich"):
    pytest.importorskip(needed, reason="the benchmark suite needs the extra `bench`")

from benchmarks import __main__ as command  # noqa: E402 (skipped above where pytest-benchmark is missing)
from benchmarks import gpu, sanitize, suite  # noqa: E402
from internlm2_kernels import OPS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments, part", [
    (["--phases", "bild"], "--phases: expected some of build"), (["--phases", ","], "--phases: expected some of build"),
    (["--minutes", "0"], "--minutes: expected a positive number"), (["--seed", "x"], "--seed")])
def test_wrong_arguments_end_with_status_2(arguments, part, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2 and part in capsys.readouterr().err


def cuda_as(monkeypatch, available=True, free=70, capability=(9, 0), raises=None):
    def memory(device):
        if raises:
            raise RuntimeError(raises)
        return free * 2**30, 80 * 2**30
    for name, value in {"is_available": lambda: available, "mem_get_info": memory, "get_device_name": lambda d: "NVIDIA Test",
                        "get_device_capability": lambda d: capability}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize("state, part", [
    ({"available": False}, "sees no CUDA device (no GPU, or its driver does not answer)"),
    ({"free": 5}, "5.0 of 80.0 GiB of GPU memory are free, 30 are needed"),
    ({"capability": (7, 5)}, "NVIDIA Test has compute capability 7.5, 8.0 is needed"),
    ({"raises": "CUDA error: unknown\nmore"}, "the GPU does not answer: CUDA error: unknown")])
def test_what_is_no_gpu_to_run_on_is_one_line(monkeypatch, capsys, tmp_path, state, part):
    cuda_as(monkeypatch, **state)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and part in err and not (tmp_path / "out").exists()


def test_the_drivers_own_words_are_passed_on(monkeypatch):
    cuda_as(monkeypatch)

    def too_old():
        import warnings
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).", stacklevel=1)
        return False
    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    assert "driver on your system is too old" in gpu.unusable(["checks"])
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "pytest" else 1)
    assert gpu.unusable(["checks"]) == "not installed in this interpreter: pytest"


def test_phases_share_their_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    assert sum(share for together, share in gpu.SHARES if "counters" not in together) == 22 * 60
    budget = gpu.Budget(9.5)
    budget.spent["build"], now[0] = 70.0, 70.0
    assert budget.of("checks") == 290 and budget.of("bench") == 500 and gpu.Budget(None).of("bench") is None
    now[0] = 1e4
    assert budget.of("bench") == 1.0


@pytest.mark.parametrize("code, limit, silent, expected", [
    ("print('a'); import sys; sys.exit(7)", 60, None, 7),
    ("import time\nwhile True: print('b', flush=True); time.sleep(0.05)", 1.0, 60, gpu.LATE),
    ("import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid,"
     " flush=True); time.sleep(60)", 60, 1.0, gpu.SILENT),
    ("import signal, time; signal.signal(signal.SIGINT, lambda *a: None); print('c', flush=True)\nwhile True: time.sleep(9)",
     1.0, None, gpu.LATE)], ids=["ends", "late", "silent", "deaf"])
def test_a_phase_is_ended_with_all_that_it_started(tmp_path, monkeypatch, code, limit, silent, expected):
    monkeypatch.setattr(gpu, "GRACE_S", 1.0)
    log = gpu.Log(tmp_path / "out")
    start = time.monotonic()
    status, text = log.stream([sys.executable, "-u", "-c", code], limit, silent)
    assert status == expected and time.monotonic() - start < 30 and text in log.path.read_text()
    if expected == gpu.SILENT:
        child = int(text.split()[0])
        for _ in range(50):
            if not _running(child):
                break
            time.sleep(0.1)
        assert not _running(child)


def test_output_comes_as_it_is_printed(tmp_path, monkeypatch):
    """Lines arrive as soon as they are printed, also from a process that has replaced itself by exec, as the benchmarks do. If
    its output were buffered, the watchdog would take it to hang and end it.
    """
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = ("import os, sys, time\nif len(sys.argv) == 1: os.execv(sys.executable, [sys.executable, sys.orig_argv[-1], 'x'])\n"
            "for i in range(10): print(i); time.sleep(0.6)")
    (tmp_path / "again.py").write_text(code)
    status, text = gpu.Log(tmp_path / "out").stream([sys.executable, str(tmp_path / "again.py")], 60, 4.0)
    assert status == 0 and text.split() == [str(i) for i in range(10)]


def test_a_log_has_an_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LARGEST_LOG_BYTES", 2000)
    log = gpu.Log(tmp_path)
    status, text = log.stream([sys.executable, "-c", "for i in range(1000): print('line', i)"], 60)
    log.note("== after")
    assert status == 0 and len(text.splitlines()) == 1000 and "line 999" in capsys.readouterr().out
    assert log.path.stat().st_size < 2100 and log.path.read_text().endswith("== after\n")


def _running(pid):
    """Whether the process runs. A zombie, an ended process that its parent has not waited for, does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


class Told:
    """Replaces `Log.stream`: records the calls, and gives prepared answers."""

    def __init__(self, monkeypatch, *answers):
        self.calls, self.answers = [], list(answers)
        monkeypatch.setattr(gpu.Log, "stream", self)

    def __call__(self, command, limit_s=None, silent_s=None, **env):
        self.calls.append((command, env))
        return self.answers.pop(0) if self.answers else (0, "")


def arguments(tmp_path, *more):
    return gpu.parser().parse_args(["--out", str(tmp_path), *more])


def test_benchmarks_go_on_after_a_lost_device_and_after_a_hang(monkeypatch, tmp_path):
    told = Told(monkeypatch, (gpu.DEVICE_LOST, ""), (gpu.SILENT, ""), (0, ""))
    assert gpu.bench(arguments(tmp_path, "--op", "swiglu"), gpu.Log(tmp_path), 570.0) == gpu.DEVICE_LOST
    runs = [command for command, _ in told.calls if "render" not in command]
    assert ["--resume" in run for run in runs] == [False, True, True] and "render" in told.calls[-1][0]
    assert all(run[run.index("--op") + 1] == "swiglu" and run[run.index("--dtype") + 1] == "bfloat16" for run in runs)
    assert float(runs[0][runs[0].index("--seconds") + 1]) == pytest.approx(570 - gpu.REPORT_S, abs=2)
    assert "the device stopped answering" in (tmp_path / "summary.txt").read_text()
    parsed = command.parser().parse_args(runs[2][4:])
    assert parsed.resume and parsed.device == "cuda" and parsed.out == tmp_path


def test_checks_print_a_seed_and_take_one(monkeypatch, tmp_path):
    told = Told(monkeypatch)
    for more in ((), (), ("--seed", "7", "--op", "gae")):
        gpu.checks(arguments(tmp_path, *more), gpu.Log(tmp_path), 100.0)
    seeds = [command[command.index("--seed") + 1] for command, _ in told.calls]
    assert seeds[0] != seeds[1] and seeds[2] == "7" and "--require-cells" in told.calls[0][0]
    assert told.calls[2][0][-2:] == ["-k", "gae"]
    assert all(Path(ROOT / test).exists() for test in gpu.TESTS)


@pytest.mark.parametrize("answers, said, status", [
    ([(1, "Device not supported\n"), (1, "Device not supported")], "memcheck left out (Device not supported)", 0),
    ([(0, "ERROR SUMMARY: 0 errors"), (9, "RACECHECK SUMMARY: 2 hazards")], "racecheck: exit status 9", 9),
    ([(gpu.LATE, "...") , (0, "RACECHECK SUMMARY: 0 hazards")], "memcheck: ended after its time, without a finding", 0),
    ([(gpu.LATE, "Invalid __global__ read"), (0, "")], "memcheck: ended after its time, with findings", 1)])
def test_a_sanitizer_that_refuses_is_a_line_and_a_finding_a_failure(monkeypatch, tmp_path, answers, said, status):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    told = Told(monkeypatch, *answers)
    assert gpu.sanitizer(arguments(tmp_path), gpu.Log(tmp_path), 100.0) == status
    assert said in (tmp_path / "summary.txt").read_text()
    assert all(env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for _, env in told.calls)


def test_tools_that_are_missing_or_refuse_are_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    log = gpu.Log(tmp_path)
    assert gpu.sanitizer(arguments(tmp_path), log, 9.0) == 0 == gpu.counters(arguments(tmp_path), log, 9.0)
    assert log.summary == ["compute-sanitizer is not installed here: left out", "ncu is not installed here: counters left out"]
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    Told(monkeypatch, (1, "==ERROR== LibraryNotLoaded"))
    assert gpu.counters(arguments(tmp_path), log, 9.0) == 0 and "ncu refuses to run here" in log.summary[-1]


def test_all_phases_leave_at_most_8_files(monkeypatch, tmp_path, capsys):
    """A run of all phases leaves at most 8 files, also when a benchmark was killed while it wrote a record, and although the
    demo writes many.
    """
    cuda_as(monkeypatch)

    def stream(self, command, limit_s=None, silent_s=None, **env):
        self.say("$ " + " ".join(command))
        if "benchmarks" in command:
            folder = tmp_path / "nvidia-test"
            folder.mkdir()
            for suffix in ("json", "md", "png", "partial"):
                (folder / f"0001_ccccccc.{suffix}").write_text("{}")
        if "demo" in command:
            run = Path(command[command.index("--out") + 1])
            run.mkdir()
            for name in ("comparison.md", "loss.png", "log.jsonl", "tokenizer.model"):
                (run / name).write_text("x")
        return 0, "ERROR SUMMARY RACECHECK SUMMARY"
    monkeypatch.setattr(gpu.Log, "stream", stream)
    assert gpu.main(["--out", str(tmp_path), "--phases", ",".join(gpu.PHASES + gpu.FURTHER)]) == 0
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) <= 8 and all(len(p.relative_to(tmp_path).parts) <= 2 for p in files)
    assert {"log.txt", "summary.txt", "demo.md", "demo.png"} <= {p.name for p in files}
    summary = (tmp_path / "summary.txt").read_text()
    assert [line.split(":")[0] for line in summary.splitlines() if line.startswith("== ")] == [
        f"== {name}" for name in gpu.PHASES + gpu.FURTHER]


def test_the_sanitizer_takes_small_cases_of_cuda_kernels_and_counters_one_large():
    op = OPS["rms_norm"]
    assert {c.kind for c in sanitize.cases_of(op, ["smoke", "edge"])} == {"smoke", "edge"}
    (large,) = sanitize.cases_of(op, ["gpu", "model"])
    assert large.kind == "gpu" and [c.kind for c in sanitize.cases_of(OPS["gae"], ["gpu", "model"])] == ["model"]
    with pytest.raises(SystemExit) as stopped:
        sanitize.main(["--kind", "huge"])
    assert stopped.value.code == 2


def test_the_checks_are_collected_for_a_gpu():
    """pytest collects, without running them, the checks for every operator on every GPU backend, in float32, bfloat16 and
    float16.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-m", "pytest", *gpu.TESTS, "--device", "cuda", "--seed", "5", "--collect-only"],
                           cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-2000:]
    names = found.stdout.splitlines()
    for op in OPS.values():
        for backend in set(op.backends) & {"triton", "cuda"}:
            for dtype in op.dtypes:
                short = suite.short(dtype)
                assert any("test_ladder[" in n and f"{op.name}-{backend}" in n and short in n for n in names), (op.name, short)


def test_help_has_commands_that_are_short_enough():
    lines = [line.strip() for line in gpu.EXAMPLES.splitlines() if line.strip().startswith("python3 -m benchmarks.gpu")]
    assert len(lines) >= 5 and all(len(line) < 2000 for line in lines)
    for line in lines:
        parsed = gpu.parser().parse_args(line.split()[3:])
        assert set(parsed.phases.split(",")) <= {*gpu.PHASES, *gpu.FURTHER} and set(parsed.op or ()) <= set(OPS)
