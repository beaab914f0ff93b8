"""The benchmark suite: verdicts, what is stored, what is printed, and that a red operator has no number."""

import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from internlm2_kernels import OPS
from internlm2_kernels.workloads import Case
from tools.timing import Peaks

for needed in ("pytest_benchmark", "matplotlib", "rich"):
    pytest.importorskip(needed, reason="the benchmark suite needs the extra `bench`")

from benchmarks import gates, plot, record, report, suite  # noqa: E402 (skipped above where pytest-benchmark is missing)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PEAKS = Peaks(1e10, 2e10, 1e12, 2e11)
SMALL = Case("model", {"rows": 64, "cols": 64})


def test_plan_covers_the_registry_and_every_gate_is_measured():
    every = suite.plan(list(OPS), ["forward", "backward", "both", "call"], [torch.bfloat16, torch.float32], quick=False)
    for op in OPS.values():
        planned = {(str(p.case), p.dtype, p.kind) for p in every if p.op is op}
        for case in op.workload.cases:
            if case.kind == "model":
                dtypes = {torch.bfloat16, torch.float32} & set(op.dtypes) & set(case.dtypes or op.dtypes)
                kinds = {"forward", "training"} if "backward" in op.directions else {"forward"}
                kinds &= set(case.passes or kinds)
                assert dtypes and kinds, case
                assert {(str(case), dtype, kind) for dtype in dtypes for kind in kinds} <= planned
    on_gpu = suite.plan(list(OPS), ["forward", "backward", "both", "call"], [torch.bfloat16, torch.float32], False, "cuda")
    rows_on = {device: {(p.op.name, direction, suite.short(p.dtype), suite.size_of(p.case.dims))
                        for p in passes for direction in suite.PASSES[p.kind]}
               for device, passes in (("cpu", every), ("cuda", on_gpu))}
    rows = rows_on["cpu"]
    for gate in gates.load():
        assert any(gate["op"] == op and gate["direction"] == direction and gate.get("dtype", dtype) == dtype
                   and fnmatch.fnmatchcase(size, gate.get("size", "*"))
                   for op, direction, dtype, size in rows_on[gate["device"]]), gate
    # Every size of attention has its gate: a pattern that catches nothing, or two sizes too many, would pass unseen.
    sizes = {size for op, direction, dtype, size in rows if op == "flash_attention" and direction == "forward"}
    for size in sizes:
        caught = [g for g in gates.load() if (g["op"], g["device"], g["direction"]) == ("flash_attention", "cpu", "forward")
                  and fnmatch.fnmatchcase(size, g.get("size", "*"))]
        assert 1 <= len([g for g in caught if "size" in g]) <= 1, (size, caught)
    first = suite.plan(["rms_norm"], ["forward"], [torch.float32], quick=True)
    assert len(first) == 1


def bench():
    return suite.Bench(CPU, PEAKS, suite.Settings(seconds=0.0, rounds=(3, 3), compiled=False))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small real run, recorded: rms_norm forward and training, two dtypes, and a small call."""
    run = record.Record(tmp_path_factory.mktemp("results"), CPU, PEAKS, {"ops": ["rms_norm"], "quick": True})
    timer, rows = bench(), []
    for kind in ("forward", "training", "call"):
        for dtype in (torch.bfloat16, torch.float32):
            job = suite.Pass(OPS["rms_norm"], SMALL, dtype, kind)
            found, paired = timer.run(job)
            run.add(job, found, paired)
            rows += found
            on_disk = record.rows_of(record.load(run.path))
            assert len(on_disk) == len(rows), "a pass must be on disk as soon as it is measured"
    assert not record.load(run.path)["run"]["complete"]
    assert record.newest(run.path.parents[1]) == []
    run.finish(complete=True)
    return run, rows


def test_rows_of_a_real_run(measured):
    _, rows = measured
    assert [(r.direction, r.dtype) for r in rows] == [
        ("forward", "bfloat16"), ("forward", "float32"), ("backward", "bfloat16"), ("both", "bfloat16"),
        ("backward", "float32"), ("both", "float32"), ("call", "bfloat16"), ("call", "float32")]
    for row in rows:
        low, high = row.seconds[1:]
        assert 0 < low <= row.seconds[0] <= high and set(row.against) == {"eager"} and row.red == ""
        assert row.against["eager"]["form"] in OPS["rms_norm"].workload.eager
    forward = rows[1]
    assert forward.bytes == OPS["rms_norm"].workload.bytes(SMALL.dims, 4, "forward")
    assert forward.bytes_per_s == pytest.approx(forward.bytes / forward.seconds[0])
    assert rows[5].bytes == forward.bytes + OPS["rms_norm"].workload.bytes(SMALL.dims, 4, "backward")


def test_record_is_a_pytest_benchmark_file(measured):
    run, rows = measured
    from pytest_benchmark.logger import Logger
    from pytest_benchmark.storage.file import FileStorage
    storage = FileStorage(run.path.parents[1], Logger(Logger.QUIET))
    stored = list(storage.load_benchmarks())
    assert {b["param"] for b in stored} >= {"ours cpp" if "cpp" in OPS["rms_norm"].usable["cpu"] else "ours reference"}
    assert all(b["median"] > 0 and b["rounds"] >= 3 for b in stored if "screened" not in b["extra_info"])
    shown = subprocess.run([sys.executable, "-m", "pytest_benchmark", f"--storage=file://{run.path.parents[1]}", "compare",
                            "--group-by=group", "--columns=median"], capture_output=True, text=True, cwd=run.path.parent)
    assert shown.returncode == 0 and "rms_norm-rows64-cols64-bfloat16-forward" in shown.stdout, shown.stderr
    data = record.load(run.path)
    info = data["machine_info"]
    assert info["threads"] >= 1 and "malloc" in info["allocator"] and info["torch"] == torch.__version__
    assert {"id", "dirty"} <= set(data["commit_info"]) and data["run"]["peaks"] == asdict(PEAKS)
    assert str(Path.home()) not in run.path.read_text() and str(ROOT) not in run.path.read_text()


def test_plot_and_markdown_of_a_run(measured, tmp_path):
    run, _ = measured
    data = record.load(run.path)
    plot.roofline(data, tmp_path / "roof.png")
    png = (tmp_path / "roof.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 10_000
    text = report.markdown(data)
    assert text.count("| rms_norm | 64x64 |") == 8 and "gated rows meet their gate" in text


def test_red_operator_gets_no_number():
    """An implementation that fails its ladder is not timed; the row says so and so does the table."""
    op = OPS["rms_norm"]
    planted = SimpleNamespace(**{f.name: getattr(op, f.name) for f in fields(op)}, select=op.select, workload=op.workload)
    planted.public = lambda x, weight, *args, backend=None, **kwargs: op.public(x, weight * 1.5, *args, **kwargs)
    timer = bench()
    rows, paired = timer.run(suite.Pass(planted, SMALL, torch.float32, "forward"))
    assert paired is None and rows[0].red and rows[0].seconds is None and not rows[0].against
    assert "RED" in rows[0].red and any("is red and is not timed" in note for note in timer.notes)
    assert report.cells(asdict(rows[0]), [], ["eager"])[4:] == ["RED", "-", "-", "-", "checks fail: no number"]


def test_a_form_that_cannot_run_is_named_and_left_out(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no compiler here\nsecond line")
    monkeypatch.setattr(torch, "compile", lambda form, dynamic: fails)
    timer = suite.Bench(CPU, PEAKS, suite.Settings(seconds=0.0, rounds=(3, 3)))
    rows, _ = timer.run(suite.Pass(OPS["rms_norm"], SMALL, torch.float32, "forward"))
    assert set(rows[0].against) == {"eager"}
    assert any("cannot run: RuntimeError: no compiler here" in note for note in timer.notes)


def row(**changes):
    base = suite.Row("rms_norm", {"rows": 8, "cols": 4}, "bfloat16", "forward", "cpu", "cpp", True, "perf_counter", 11,
                     (1e-3, 1e-3, 1e-3), {"eager": {"form": "f", "ratio": (7.0, 6.0, 8.0)},
                                          "compile": {"form": "f", "ratio": (1.0, 0.9, 1.1)}}, 100, 100, 1e5, 0.8, 0.8)
    return asdict(replace(base, **changes))


def test_verdicts():
    table = [{"device": "cpu", "op": "rms_norm", "direction": "forward", "dtype": "bfloat16", "eager": 6.0, "compile": 1.05,
              "bw": 0.75, "liger": 1.0}]
    verdicts = {v.what: v for v in gates.judge(row(), table)}
    assert verdicts["eager"].met and verdicts["bw"].met and not verdicts["compile"].met
    assert "liger" not in verdicts  # not installed: nothing to demand
    assert report.verdict_text(list(verdicts.values())) == "missed: compile 1.00 < 1.05"
    unmeasured = gates.judge(row(against={}, copy_fraction=None), table)
    assert [v.met for v in unmeasured] == [False, False, False]  # what was not measured is not met
    assert gates.judge(row(dtype="float32"), table) == [] == gates.judge(row(direction="both"), table)


def test_what_only_reads_is_held_against_the_read_rate():
    """Also in runs that were recorded when its bytes counted at the copy rate; flops at the matrix rate of the dtype."""
    peaks = asdict(PEAKS)
    share = lambda **changes: suite.roof_share(row(flops=0, copy_fraction=1.7, read_fraction=0.9, **changes), peaks)
    assert (share(), share(op="squared_norm"), share(op="paged_attention")) == (1.7, 0.9, 0.9)
    for dtype, rate in (("bfloat16", PEAKS.matmul_flops_per_s), ("float32", PEAKS.matmul_float32_flops_per_s)):
        assert suite.roof_share(row(flops=2e-3 * rate, dtype=dtype), peaks) == pytest.approx(2)  # in a millisecond
    old = row(op="squared_norm", flops=0, copy_fraction=1.7, read_fraction=0.9, roof_fraction=1.7)
    call = row(op="squared_norm", direction="call")
    data = {"benchmarks": [{"extra_info": {"row": r}} for r in (old, call)], "run": {"peaks": peaks, "red": []}}
    assert [r["roof_fraction"] for r in record.rows_of(data)] == [0.9, None] and old["roof_fraction"] == 1.7


def test_unknown_gate_key_is_an_error(tmp_path):
    path = tmp_path / "gates.toml"
    path.write_text('[[gate]]\ndevice = "cpu"\nop = "rms_norm"\ndirection = "forward"\nspeed = 3\n')
    with pytest.raises(ValueError, match="speed"):
        gates.load(path)


def test_worst_comes_first():
    slow = row(against={"eager": {"form": "f", "ratio": (3.0, 3.0, 3.0)}})
    red = row(red="table", seconds=None, against={})
    ungated = row(op="rope_table")
    order = [pair[0] for pair in report.judged([ungated, row(), slow, red])]
    assert order[0] is not ungated and order[0]["red"] and order[1] == slow and order[-1] == ungated


def test_readme_section_is_rewritten_between_its_markers(measured, monkeypatch):
    run, _ = measured
    monkeypatch.setattr(report, "ROOT", run.path.parents[1])
    runs = record.newest(run.path.parents[1])
    old = f"# head\n\n{report.BEGIN}\nstale\n{report.END}\n\ntail\n"
    new = report.with_section(old, runs)
    assert new.startswith("# head\n") and new.endswith("tail\n") and "stale" not in new
    assert "| rms_norm | " in new and f"{run.path.stem}.png" in new
    assert report.with_section(new, runs) == new
    with pytest.raises(ValueError, match="expected the lines"):
        report.with_section("# no markers\n", runs)


def test_readme_has_the_memory_that_was_measured(measured, monkeypatch, tmp_path):
    """`python -m benchmarks.memory` on a small head, then its table: what took too long is named with the reason."""
    form, runs = "F.linear_cross_entropy chunked", record.newest(measured[0].path.parents[1])
    command = [sys.executable, "-m", "benchmarks.memory", "--tokens", "64", "--cols", "32", "--vocab", "300"]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=300)
    path = tmp_path / report.MEMORY
    data = json.loads(path.read_text())
    assert {row["tokens"] for row in data["rows"]} == {64} and path.with_suffix(".png").exists()
    ours = [row for row in data["rows"] if row["form"] == "ours"]
    assert all(row["peak_bytes"] >= row["extra_bytes"] >= 0 and row["seconds"] >= 0 for row in ours) and len(ours) == 1
    data["rows"] = [row for row in data["rows"] if row["form"] != form]
    data["left_out"] = [{"form": form, "tokens": 64, "why": "took longer than 1 s"}]
    path.write_text(json.dumps(data))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    table = report.memory(path)
    assert f"| `{form}` | took longer than 1 s |" in table and "| ours | 0.00 |" in table
    monkeypatch.setattr(report, "ROOT", Path("/"))
    runs[0] |= {"path": tmp_path / runs[0]["path"].name}
    assert table.splitlines()[2] in report.section(runs[:1])


def test_an_operator_measured_again_replaces_only_its_own_rows(tmp_path):
    for number, ops, complete in ((1, ["swiglu", "rms_norm"], True), (2, ["swiglu"], True), (3, ["rms_norm"], False)):
        entries = [{"extra_info": {"row": {"op": op, "run": number}}} for op in ops]
        (tmp_path / "cpu").mkdir(exist_ok=True)
        (tmp_path / "cpu" / f"{number:04d}_abc.json").write_text(json.dumps(
            {"run": {"complete": complete, "options": {"ops": ops}, "red": []}, "benchmarks": entries}))
    runs = record.newest(tmp_path)
    assert [record.rows_of(data) for data in runs] == [[{"op": "swiglu", "run": 2}], [{"op": "rms_norm", "run": 1}]]


def test_readme_is_up_to_date():
    """`python -m benchmarks report` rewrites it from the newest complete run of each operator on each device."""
    text = (ROOT / "README.md").read_text()
    assert report.with_section(text, record.newest()) == text, "stale: run `python -m benchmarks report`"


def test_recorded_runs_are_readable_and_complete_with_their_files():
    for path in record.RESULTS.glob("*/[0-9]*.json"):
        data = record.load(path)
        assert record.rows_of(data) and not data["run"]["red"], path
        assert path.with_suffix(".png").exists() and path.with_suffix(".md").exists(), path


def command(*args, **options):
    env = {k: v for k, v in os.environ.items() if k not in ("THP_MEM_ALLOC_ENABLE", "TRITON_INTERPRET")}
    return subprocess.Popen([sys.executable, "-m", *args], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def test_help_has_examples_and_unknown_names_are_refused():
    out, _ = command("benchmarks", "--help").communicate(timeout=120)
    assert "examples:" in out and "--quick" in out
    process = command("benchmarks", "--op", "rms_nrm")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "--op: expected one of" in err and "rms_nrm" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_without_a_gpu_is_one_clear_line():
    process = command("benchmarks.gpu")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("python -m benchmarks.gpu: no GPU to run on: torch")


def test_command_measures_prints_and_records(tmp_path):
    process = command("benchmarks", "--quick", "--no-compile", "--op", "rms_norm", "--dtype", "bfloat16", "--direction",
                      "call", "--device", "cpu", "--out", str(tmp_path))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "THP_MEM_ALLOC_ENABLE=1" in out and "copy " in out and "gated rows meet their gate" in out
    (path,) = tmp_path.glob("*/0001_*.json")
    data = record.load(path)
    assert "THP_MEM_ALLOC_ENABLE=1" in data["machine_info"]["allocator"] and not data["run"]["complete"]
    assert {r["direction"] for r in record.rows_of(data)} == {"call", "call_grad"}
    assert path.with_suffix(".md").exists()


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_measured(tmp_path):
    process = command("benchmarks", "--no-compile", "--op", "rms_norm", "--dtype", "bfloat16", "--device", "cpu", "--out",
                      str(tmp_path))
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        paths = list(tmp_path.glob("*/0001_*.json"))
        if paths and len(record.rows_of(record.load(paths[0]))) >= 3:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    data = json.loads(paths[0].read_text())
    assert len(record.rows_of(data)) >= 3 and not data["run"]["complete"]
