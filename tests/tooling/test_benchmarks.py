"""The benchmark suite: verdicts, what is stored, what is printed, and that a red operator has no number."""

import fnmatch
import json
import os
import re
import shutil
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

from benchmarks import __main__ as main_module  # noqa: E402 (skipped above where pytest-benchmark is missing)
from benchmarks import current, gates, memory, pages, plot, record, registers, report, setting, suite  # noqa: E402


def registers_offered():
    from internlm2_kernels import _registry
    return bool(_registry._C and _registry._C.best_cpu_isa())


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
    # Every size of attention has its gate: a `size` pattern that matches no size, or too many, would otherwise pass unseen.
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
    run = record.Record(tmp_path_factory.mktemp("results"), CPU, PEAKS, {"ops": ["rms_norm"], "quick": False})
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
    for draw in (plot.limits, plot.speed):
        draw(record.rows_of(data), tmp_path / "plot.png", report.machine_of(data))
        png = (tmp_path / "plot.png").read_bytes()
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
                                          "compile": {"form": "f", "ratio": (1.0, 0.9, 1.1)}}, 100, 100, 1e5, 0.8, 0.8,
                     limit_fraction=0.8)
    return asdict(replace(base, **changes))


def test_verdicts():
    table = [{"device": "cpu", "op": "rms_norm", "direction": "forward", "dtype": "bfloat16", "eager": 6.0, "compile": 1.05,
              "bw": 0.75, "liger": 1.0}]
    verdicts = {v.what: v for v in gates.judge(row(), table)}
    assert verdicts["eager"].met and verdicts["bw"].met and not verdicts["compile"].met
    assert "liger" not in verdicts  # Liger is not installed, so its ratio is not demanded
    assert report.verdict_text(list(verdicts.values())) == "missed: compile 1.00 < 1.05"
    unmeasured = gates.judge(row(against={}, copy_fraction=None), table)
    assert [v.met for v in unmeasured] == [False, False, False]  # a demand that was not measured counts as missed
    assert gates.judge(row(dtype="float32"), table) == [] == gates.judge(row(direction="both"), table)


def test_a_ratio_is_met_at_the_machines_limit():
    """A demanded ratio counts as met by a row that reaches 0.85 of the machine's limit, or the fraction that the gate names as
    `limit`. A share (bw, read, roof) that the gate demands must be reached in any case.
    """
    gate = {"device": "cpu", "op": "rms_norm", "direction": "forward", "eager": 6.0, "compile": 1.05}
    text = lambda measured, **more: report.verdict_text(gates.judge(measured, [gate | more]))
    assert text(row(limit_fraction=0.84)) == "missed: compile 1.00 < 1.05"
    assert text(row(limit_fraction=0.85)) == "at the limit"
    assert text(row(limit_fraction=0.9), limit=0.95) == "missed: compile 1.00 < 1.05"
    assert text(row(limit_fraction=0.9, copy_fraction=0.9), bw=0.95) == "missed: bw 0.90 < 0.95"
    assert text(row(limit_fraction=0.9), compile=1.0) == "met"
    pairs = report.judged([row(limit_fraction=0.9), row(dtype="float32"), row(op="rope_table")])
    assert report.gate_count(pairs).endswith("gated rows meet their gate, 1 of them at the limit.")


def test_rows_older_than_the_yardsticks_are_judged_by_ratio_and_read_rate():
    old = row(copy_fraction=0.2, read_fraction=0.6)
    del old["limit_fraction"]
    gate = {"device": "cpu", "op": "rms_norm", "direction": "forward", "eager": 6.0, "bw": 0.75, "roof": 0.9, "read": 0.7}
    assert [v.what for v in gates.judge(old, [gate])] == ["eager", "read"]
    assert report.percent([old.get("limit_fraction")]) == "-"


def yardsticks(seconds, op="rms_norm", direction="forward", loops=None, **stages):
    """The row that `Bench` makes when ours took `seconds`, and the yardsticks (copy, read, registers) the seconds in
    `stages`.
    """
    timer, case = suite.Bench(CPU, PEAKS, suite.Settings(), loops), next(c for c in OPS[op].workload.cases if c.kind == "model")
    times = {"forward": {"ours cpp": [seconds] * 3} | {name: [took] * 3 for name, took in stages.items()}}
    times["both"] = {"ours cpp": [seconds] * 3}
    kind = "forward" if direction == "forward" else "training"
    blank = suite.Row(op, case.dims, "bfloat16", direction, "cpu", "cpp", True, "", 0)
    job = suite.Pass(OPS[op], case, torch.bfloat16, kind)
    return timer._row(blank, job, suite.Paired(times, {}, "perf_counter")), timer._moved(job), job


def test_the_limit_is_the_copy_the_read_or_the_register_rate():
    found, moved, _ = yardsticks(1.0, copy=1.0, read=0.5)
    assert found.copy_fraction == pytest.approx(found.bytes / moved) and found.limit_fraction == found.copy_fraction
    assert found.read_fraction == pytest.approx(found.copy_fraction / 2) and found.product_fraction is None
    found, moved, _ = yardsticks(1.0, op="paged_attention", copy=1.0, read=0.5)
    assert found.limit_fraction == found.read_fraction == pytest.approx(found.bytes / moved / 2)
    loop = registers.Loop(None, "avx512", 2, 1, 1e9)
    found, _, job = yardsticks(1.0, op="flash_attention", loops={"bfloat16": loop}, copy=1.0, read=0.5, registers=0.001)
    assert found.product_fraction == pytest.approx(found.flops / 1e12)
    assert found.limit_fraction == max(found.product_fraction, found.copy_fraction)


def test_yardsticks_copy_into_memory_that_is_present_and_take_turns_beyond_the_cache():
    timer, calls = suite.Bench(CPU, PEAKS, suite.Settings()), []
    loop = registers.Loop(SimpleNamespace(run=lambda *a: calls.append(a)), "avx512", 2, 7, 1e9)
    timer.loops = {"float32": loop}
    job = suite.Pass(OPS["rms_norm"], Case("model", {"rows": 8, "cols": 16}), torch.float32, "forward")
    copy, read = timer._yardsticks(job)
    place, sets = timer.memory.data_ptr(), timer.memory.numel() * 4 // timer._moved(job)
    assert sets >= 2 and float(read.forward(0)) == timer._moved(job) / 4
    first = timer.memory.view(sets, 2, -1)
    first[:, 0] = 7
    for i in range(sets):
        copy.forward(i)
    assert timer.memory.data_ptr() == place and (first == 7).all()  # each part was copied once, into the same memory
    case = Case("model", {"batch": 1, "queries": 256, "keys": 256, "heads": 4, "kv_heads": 2, "head_dim": 64})
    *_, products = timer._yardsticks(suite.Pass(OPS["flash_attention"], case, torch.float32, "forward"))
    products.forward(0)
    assert products.name == "registers" and calls == [(b"avx512", 7, 2)]


@pytest.mark.skipif(not registers_offered(), reason="the loops are for x86-64 with AVX2")
def test_the_register_peak_is_measured(tmp_path):
    """The multiply-add loop of one instruction set counts its operations and has a plausible rate; an unknown name is
    refused.
    """
    library = registers.compiled(tmp_path)
    peak = registers.loop(library, "avx2", 1)
    assert peak.flops == 192 * peak.count and registers.rate(peak) > 1e9
    assert library.run(b"no such instructions", 1, 1) == -1
    assert registers.loops("", 1) == {}


def test_gates_hold_where_freed_memory_stays_and_with_huge_pages():
    """In a default process the page faults of fresh outputs are compared; nothing is demanded there unless the gate says so."""
    gate = {"device": "cpu", "op": "rms_norm", "direction": "forward", "eager": 6.0}
    judged = lambda where, **more: len(gates.judge(row() | {"memory": where}, [gate | more]))
    assert [judged(memory) for memory in setting.ORDER] == [1, 1, 0, 1]
    assert [judged(memory, memory="default") for memory in setting.ORDER] == [0, 0, 1, 0]
    assert [judged(memory, memory="kept") for memory in setting.ORDER] == [1, 0, 0, 0]


def test_unknown_gate_key_is_an_error(tmp_path):
    path = tmp_path / "gates.toml"
    path.write_text('[[gate]]\ndevice = "cpu"\nop = "rms_norm"\ndirection = "forward"\nspeed = 3\n')
    with pytest.raises(ValueError, match="speed"):
        gates.load(path)
    path.write_text('[[gate]]\ndevice = "cpu"\nop = "rms_norm"\ndirection = "forward"\nmemory = "keep"\nbw = 0.9\n')
    with pytest.raises(ValueError, match="memory: expected one of kept"):
        gates.load(path)


def test_worst_comes_first():
    slow = row(against={"eager": {"form": "f", "ratio": (3.0, 3.0, 3.0)}})
    red = row(red="table", seconds=None, against={})
    ungated = row(op="rope_table")
    order = [pair[0] for pair in report.judged([ungated, row(), slow, red])]
    assert order[0] is not ungated and order[0]["red"] and order[1] == slow and order[-1] == ungated


@pytest.fixture
def everything_planned(monkeypatch):
    """Makes `current` accept rows of any size, since the tests measure sizes that are in no benchmark plan."""
    class Every:
        def __contains__(self, key):
            return True
    monkeypatch.setattr(current, "planned", lambda device_type: Every())


README = "\n".join(["# head", *(f"<!-- {name}: begin (python -m benchmarks report) -->\nstale\n<!-- {name}: end -->"
                                for name in ("status", "benchmarks")), "tail\n"])


def test_pages_are_written_from_the_records(measured, everything_planned, tmp_path):
    """From a copy of the run in a folder like benchmarks/results, `pages.write` makes the README's parts between their markers,
    the page of results, and the plots.
    """
    run, _ = measured
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(run.path.parents[1], results)
    (tmp_path / "README.md").write_text(README)
    assert pages.write(results, tmp_path) == [tmp_path / "README.md", results / "README.md"]
    new, page = (tmp_path / "README.md").read_text(), (results / "README.md").read_text()
    assert new.startswith("# head\n") and new.endswith("tail\n") and "stale" not in new
    assert "| `rms_norm` | fwd+bwd | 1 | " in new and "**not yet run on hardware**" in new
    assert page.count("| rms_norm | 64x64 |") == 8 and f"[{run.path.stem}](" in page
    for text, folder in ((new, tmp_path), (page, results)):
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (folder / target).exists() or "docs/" in target, target
    assert pages.write(results, tmp_path) == []
    with pytest.raises(ValueError, match="expected the lines"):
        pages.with_parts("# no markers\n", [])


def test_each_setting_of_memory_has_its_rows_and_the_readme_shows_kept_and_default(everything_planned, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    faster = lambda ratio: {"eager": {"form": "f", "ratio": (ratio, ratio, ratio)}}
    for number, (name, ratio) in enumerate((("kept", 7.0), ("huge pages", 6.0), ("default", 2.0)), 1):
        other = [{"direction": "both", "dims": {"rows": 9, "cols": 9}, "against": faster(ratio)}] if name == "kept" else []
        rows = [{"direction": "both", "against": faster(ratio)}, {"op": "swiglu", "against": {}}, *other]
        path = store(results, number, rows)
        data = json.loads(path.read_text())
        data["machine_info"] |= {"memory": name, "allocator": "x", "device": "CPU", "threads": 2, "cpu_isa": "avx2",
                                 "torch": "2"}
        data["commit_info"] |= {"id": "abcdef0", "dirty": False}
        data["run"] |= {"peaks": asdict(PEAKS), "notes": [], "copy": ""}
        path.write_text(json.dumps(data))
    (device,) = current.current(results)
    assert device.settings() == ["kept", "huge pages", "default"] and len(device.rows) == 7
    assert current.superseded(results) == []
    text = pages.speed([device], tmp_path)
    assert "for every peer: kept, freed memory stays" in text and "default: x eager" in text
    assert re.search(r"\| `rms_norm` \| fwd\+bwd \| 2 \| 7.00 \(worst 7.00\) \|.*\| 2.00, 1 of the sizes \|", text), text
    page = pages.page([device], results)
    for name, ratio in (("kept", "7.00"), ("huge pages", "6.00"), ("default", "2.00")):
        part = page.split(f"### By operator, CPU memory: {name}\n")[1].split("###")[0]
        assert ratio in part and part.count("| rms_norm") == 1, part
    assert setting.of({"device_type": "cpu", "allocator": "malloc, THP_MEM_ALLOC_ENABLE=1, huge pages madvise"}) == "huge pages"


@pytest.mark.slow
def test_the_results_page_has_the_memory_that_was_measured(tmp_path):
    """`python -m benchmarks.memory` runs on a small head, and the page shows its table, with the reason for each form that was
    left out.
    """
    form = "F.linear_cross_entropy chunked"
    skipped = [part for name in memory.forms() if name not in ("ours", form) for part in ("--skip", name)]
    command = [sys.executable, "-m", "benchmarks.memory", "--tokens", "64", "--cols", "32", "--vocab", "300", *skipped]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=300)
    path = tmp_path / pages.MEMORY
    data = json.loads(path.read_text())
    assert {row["tokens"] for row in data["rows"]} == {64} and path.with_suffix(".png").exists()
    ours = [row for row in data["rows"] if row["form"] == "ours"]
    assert all(row["peak_bytes"] >= row["extra_bytes"] >= 0 and row["seconds"] >= 0 for row in ours) and len(ours) == 1
    data["rows"] = [row for row in data["rows"] if row["form"] != form]
    data["left_out"] = [{"form": form, "tokens": 64, "why": "took longer than 1 s"}]
    path.write_text(json.dumps(data))
    table = pages.memory(path, tmp_path)
    assert f"| `{form}` | took longer than 1 s |" in table and "| ours | 0.00 |" in table


def store(folder, number, rows, day=1, complete=True, **options):
    """Writes a record with the fields that current.py reads."""
    (folder / "cpu").mkdir(exist_ok=True)
    at = f"2026-01-{day:02d}T00:00:00+00:00"
    path = folder / "cpu" / f"{number:04d}_abc.json"
    path.write_text(json.dumps({
        "run": {"complete": complete, "options": {"ops": ["rms_norm"]} | options, "red": []}, "datetime": at,
        "commit_info": {"time": at}, "machine_info": {"device_type": "cpu"},
        "benchmarks": [{"extra_info": {"row": row(**changes)}} for changes in rows]}))
    return path


def test_the_newest_row_counts_wherever_it_stands(tmp_path, everything_planned):
    """A partial run replaces its own rows only; quick runs and runs without torch.compile replace nothing."""
    both, one = [{"direction": "forward"}, {"direction": "both"}], [{"direction": "both"}]
    oldest = store(tmp_path, 1, both)
    older, partial = store(tmp_path, 2, both), store(tmp_path, 3, one, complete=False)
    store(tmp_path, 4, both, quick=True)
    store(tmp_path, 5, both, compile=False)
    (device,) = current.current(tmp_path)
    assert [(r["direction"], r["record"]) for r in device.rows] == [("both", "0003_abc"), ("forward", "0002_abc")]
    assert [run["path"] for run in device.runs] == [partial, older]
    assert oldest in current.prune(tmp_path) and not oldest.exists() and older.exists() and partial.exists()
    assert current.superseded(tmp_path) == []


def test_sizes_that_are_measured_no_more_do_not_count(tmp_path):
    store(tmp_path, 1, [{"dims": {"rows": 3, "cols": 5}}])
    assert current.current(tmp_path) == []
    dims = next(c.dims for c in OPS["rms_norm"].workload.cases if c.kind == "model")
    store(tmp_path, 2, [{"dims": dims}])
    assert [r["record"] for r in current.current(tmp_path)[0].rows] == ["0002_abc"]


def test_rows_older_than_a_change_of_their_arithmetic_are_marked(tmp_path, everything_planned):
    store(tmp_path, 1, [{}, {"dtype": "float32"}, {"op": "swiglu"}], day=1)
    store(tmp_path, 2, [{"direction": "both"}], day=20)
    (tmp_path / current.CHANGED).write_text('[[changed]]\nops = ["rms_norm"]\ncommit = "abc1234"\n'
                                            'date = 2026-01-10T00:00:00Z\nwhat = "sums"\ndtype = ["bfloat16"]\n')
    rows = current.current(tmp_path)[0].rows
    assert {(r["op"], r["dtype"], r["direction"]): r["changed"] for r in rows} == {
        ("rms_norm", "bfloat16", "forward"): "sums (abc1234)", ("rms_norm", "float32", "forward"): "",
        ("swiglu", "bfloat16", "forward"): "", ("rms_norm", "bfloat16", "both"): ""}
    marked = [r for r in rows if r["changed"]]
    assert report.cells(marked[0], [], [])[0] == f"rms_norm {report.CHANGED}"
    (tmp_path / current.CHANGED).write_text('[[changed]]\nops = ["rms"]\ncommit = "a"\ndate = 2026-01-10T00:00:00Z\n'
                                            'what = "sums"\n')
    with pytest.raises(ValueError, match="unknown operators"):
        current.changes(tmp_path)


def test_a_recorded_gpu_run_changes_the_status():
    held = lambda backend, device, isa: current.Device(
        Path("x"), [{"machine_info": {"device": device, "cpu_isa": isa}, "datetime": "2026-02-03T"}], [row(backend=backend)])
    cpu, gpu = held("cpp", "EPYC", "avx512"), held("triton", "NVIDIA Test", "")
    before, after = pages.status([cpu]), pages.status([cpu, gpu])
    line = lambda text, backend: next(x for x in text.splitlines() if x.startswith(f"| `{backend}`"))
    assert "measured on EPYC, avx512, 2026-02-03" in line(before, "cpp") and "not yet run on hardware" in line(before, "triton")
    assert "measured on NVIDIA Test, 2026-02-03" in line(after, "triton") and "not yet" in line(after, "cuda")


def test_generated_pages_are_up_to_date():
    """`python -m benchmarks report` writes them from the newest rows; a superseded record is to be removed."""
    devices = current.current()
    text = (ROOT / "README.md").read_text()
    assert pages.with_parts(text, devices) == text, "stale: run `python -m benchmarks report`"
    assert pages.page(devices) == (record.RESULTS / "README.md").read_text(), "stale: run `python -m benchmarks report`"
    assert all((device.folder / plot.SPEED).exists() for device in devices)
    assert current.superseded() == [], "run `python -m benchmarks prune`"


def test_recorded_runs_are_readable():
    for path in record.RESULTS.glob("*/[0-9]*.json"):
        data = record.load(path)
        assert record.rows_of(data) and not data["run"]["red"], path


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the three settings of CPU memory are Linux's")
def test_command_measures_prints_and_records_in_each_setting_of_memory(tmp_path):
    process = command("benchmarks", "--quick", "--no-compile", "--op", "rms_norm", "--dtype", "bfloat16", "--direction",
                      "call", "--device", "cpu", "--out", str(tmp_path))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "freed blocks stay in this process" in out and "copy " in out and "gated rows meet their gate" in out
    found = [record.load(path) for path in sorted(tmp_path.glob("*/*.json"))]
    assert [data["machine_info"]["memory"] for data in found] == ["kept", "huge pages", "default"]
    for data, huge, kept in zip(found, "010", (True, False, False), strict=True):
        text = data["machine_info"]["allocator"]
        assert f"THP_MEM_ALLOC_ENABLE={huge}" in text and ("freed memory kept" in text) == kept
        assert {r["direction"] for r in record.rows_of(data)} == {"call", "call_grad"} and not data["run"]["complete"]
        assert data["path"].with_suffix(".md").exists()


def test_a_process_of_each_setting_follows_the_one_before(monkeypatch):
    """Every setting is measured in a process of its own, with the same arguments and the seconds that are left; the worst exit
    status is the last one's."""
    started, measured = [], []

    def restart(python, words, env):
        started.append((words[words.index("benchmarks") + 1:], env["THP_MEM_ALLOC_ENABLE"]))
        raise SystemExit

    monkeypatch.setattr(setting.os, "execve", restart)
    monkeypatch.setattr(setting.sys, "platform", "linux")
    monkeypatch.setattr(main_module, "measure_in", lambda args, chosen, memory, seconds=None: measured.append(
        (memory, seconds)) or {"kept": 1}.get(memory, 0))
    argv = ["--op", "rms_norm", "--device", "cpu", "--seconds=90"]
    for _ in range(3):
        with pytest.raises(SystemExit):
            main_module.main(argv)
        argv = started[-1][0]
    assert main_module.main(argv) == 1
    assert [memory for memory, _ in measured] == ["kept", "huge pages", "default"]
    assert [env for _, env in started] == list("010")
    assert [round(seconds) for _, seconds in measured] == [30, 45, 90], "nothing was spent, so that all is left to the last"
    assert all(words[:2] == ["--op", "rms_norm"] and words.count("--seconds") + words.count("--seconds=90") == 1
               for words, _ in started)
    measured.clear()
    with pytest.raises(SystemExit):
        main_module.main(["--memory", "huge", "--memory=huge", "--device", "cpu"])
    assert main_module.main(started[-1][0]) == 0 and measured == [("huge pages", None)] and len(started) == 4
    assert setting.chosen(None, "cuda") == [""]


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
