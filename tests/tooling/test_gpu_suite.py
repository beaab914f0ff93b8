"""The GPU benchmarks as far as they run without a GPU: the plan, what is kept after a kill, failures on the device, the report.
"""

import dataclasses
import json
import types
from collections import Counter
from dataclasses import replace

import pytest
import torch

for needed in ("pytest_benchmark", "matplotlib", "rich"):
    pytest.importorskip(needed, reason="the benchmark suite needs the extra `bench`")

from benchmarks import __main__ as command  # noqa: E402 (skipped above where pytest-benchmark is missing)
from benchmarks import current, gates, pages, plot, record, suite  # noqa: E402
from internlm2_kernels import OPS  # noqa: E402
from internlm2_kernels.workloads import Case  # noqa: E402
from tools.timing import Paired, Peaks  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PEAKS = Peaks(3e12, 3.1e12, 8e14, 5e13)
SMALL = Case("model", {"rows": 64, "cols": 64})
OPTIONS = {"ops": ["rms_norm"], "quick": False}


# ------------------------------------------------------------------------------------------------------------ the plan
def gpu_plan():
    passes = suite.plan(list(OPS), ["forward", "backward", "both", "call"], [torch.float32, torch.bfloat16], False, "cuda")
    return suite.by_importance(passes)


def test_the_most_important_rows_come_first():
    passes = gpu_plan()
    every = suite.plan(list(OPS), ["forward", "backward", "both", "call"], [torch.float32, torch.bfloat16], False, "cuda")
    assert Counter(map(str, passes)) == Counter(map(str, every))
    low = [p for p in passes if p.dtype == torch.bfloat16 and not p.small]
    assert passes[:len(low)] == low and all(p.small for p in passes[-5:])
    first = {p.op.name: p.case.dims for p in reversed(low)}
    assert [p.op.name for p in low[:3]] == ["flash_attention", "rms_norm", "linear"]
    assert (first["flash_attention"]["heads"], first["flash_attention"]["queries"]) == (32, 8192)
    assert first["rms_norm"]["cols"] == 4096 and first["swiglu"]["cols"] == 14336 and first["paged_attention"]["heads"] == 32
    assert len({p.op.name for p in low[:12]}) == 12, "operators take turns"
    places = {str(p): i for i, p in enumerate(passes)}
    longest = [i for name, i in places.items() if "131072" in name and "bfloat16" in name]
    assert longest and min(longest) >= len(low) - len(longest)


def test_the_gpu_plan_has_the_shapes_of_every_model_and_every_gate():
    rows = {(p.op.name, direction, suite.short(p.dtype), suite.size_of(p.case.dims))
            for p in gpu_plan() for direction in suite.PASSES[p.kind]}
    for model, cols, inner in (("1.8B", 2048, 8192), ("7B", 4096, 14336), ("20B", 6144, 16384)):
        assert any(op == "rms_norm" and size.startswith(f"16384x{cols}") for op, _, _, size in rows), model
        assert any(op == "swiglu" and size == f"16384x{inner}" for op, _, _, size in rows), model
    for heads, lengths in ((16, (16384,)), (32, (8192, 32768)), (48, (16384,))):
        for length in lengths:
            size = f"1x{length}x{length}x{heads}x8x128 causal"
            assert {d for op, d, dtype, s in rows if (op, dtype, s) == ("flash_attention", "bfloat16", size)} == {
                "forward", "backward", "both"}, size
    assert any(gate["device"] == "cuda" for gate in gates.load())


def test_a_pass_that_is_not_expected_to_end_in_time_is_not_begun(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(command.time, "perf_counter", lambda: now[0])
    job, other = (suite.Pass(OPS[name], SMALL, torch.bfloat16, "forward") for name in ("rms_norm", "swiglu"))
    clock = command.Clock(100.0, 60.0)
    assert clock.leaves_room_for(job)
    now[0] = 130.0
    clock.passed(job)
    now[0] = 131.0
    assert not clock.leaves_room_for(job) and clock.leaves_room_for(other) and clock.skipped == 1
    endless = command.Clock(100.0, None)
    now[0] = 1e9
    assert endless.leaves_room_for(job)


# ------------------------------------------------------------------------------------------------------- what is on disk
def bench():
    return suite.Bench(CPU, PEAKS, suite.Settings(seconds=0.0, rounds=(3, 3), compiled=False))


def jobs():
    return [suite.Pass(OPS["rms_norm"], SMALL, dtype, kind) for dtype in (torch.bfloat16, torch.float32)
            for kind in ("forward", "training")]


def test_a_run_that_was_killed_is_continued_where_it_ended(tmp_path):
    first, timer, passes = record.Record(tmp_path, CPU, PEAKS, OPTIONS), bench(), jobs()
    for job in passes[:2]:
        first.start(job)
        first.add(job, *timer.run(job))
    first.start(passes[2])  # the run is killed during this pass
    again = record.Record(tmp_path, CPU, PEAKS, OPTIONS, resume=True)
    assert again.path == first.path and again.without_recorded(passes) == [passes[3], passes[2]]
    assert len(again.head["run"]["resumed"]) == 1 and again.head["datetime"] == first.head["datetime"]
    for job in again.without_recorded(passes):
        again.start(job)
        again.add(job, *timer.run(job))
    again.finish(complete=True)
    data = record.load(again.path)
    assert len(record.rows_of(data)) == 6 and again.without_recorded(passes) == [] and "running" not in data["run"]
    assert [p.name for p in tmp_path.glob("*/*")] == [again.path.name]
    after = record.Record(tmp_path, CPU, PEAKS, OPTIONS, resume=True)
    assert after.path != again.path and after.repeated == again.path, "a complete run stays as it is, and is named"
    assert record.Record(tmp_path, CPU, PEAKS, {**OPTIONS, "quick": True}, resume=True).repeated is None


def test_a_run_in_another_setting_of_memory_is_not_continued(tmp_path):
    kept = record.Record(tmp_path, CPU, PEAKS, OPTIONS, memory="kept")
    kept.write()
    usual = record.Record(tmp_path, CPU, PEAKS, OPTIONS, resume=True)
    assert usual.path != kept.path
    usual.write()
    again = record.Record(tmp_path, CPU, PEAKS, OPTIONS, resume=True, memory="kept")
    assert again.path == kept.path and again.repeated is None
    assert "freed memory kept" in again.head["machine_info"]["allocator"]


def test_another_commit_or_other_options_are_not_mixed_in(tmp_path):
    started = record.Record(tmp_path, CPU, PEAKS, OPTIONS, commit_id="a" * 40)
    started.write()
    assert started.path.name == f"0001_{'a' * 7}.json"
    with pytest.raises(ValueError, match=f"--resume: 0001_aaaaaaa.json was measured with commit {'a' * 40}, not {'b' * 40}"):
        record.Record(tmp_path, CPU, PEAKS, OPTIONS, resume=True, commit_id="b" * 40)
    with pytest.raises(ValueError, match="was measured with options"):
        record.Record(tmp_path, CPU, PEAKS, {**OPTIONS, "quick": True}, resume=True, commit_id="a" * 40)


def test_rows_of_lists_and_of_red_operators_are_recognised(tmp_path):
    dims = {"lengths": (4, 9), "heads": 2, "causal": True}
    job = suite.Pass(OPS["flash_attention"], Case("gpu", dims), torch.bfloat16, "training")
    run = record.Record(tmp_path, CPU, PEAKS, OPTIONS)
    row = suite.Row("flash_attention", dims, "bfloat16", "backward", "cuda", "triton", True, "", 0, red="x")
    rows = [row, replace(row, direction="both")]
    run.add(job, rows, None)
    assert record.Record(tmp_path, CPU, PEAKS, OPTIONS, resume=True).without_recorded([job]) == []


# ---------------------------------------------------------------------------------------------------- what fails on a GPU
@pytest.mark.parametrize("lost", [False, True], ids=["out of memory", "fault"])
def test_a_pass_that_fails_is_red_and_the_others_run(monkeypatch, capsys, lost):
    timer, job = suite.Bench(CUDA, PEAKS, suite.Settings()), jobs()[1]

    def fails(self, job):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    def synchronize(device=None):
        if lost:
            raise RuntimeError("CUDA error")
    monkeypatch.setattr(suite.Bench, "_run", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(type(job.op), "select", lambda self, tensor, backend: "triton")
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    rows, paired = timer.run(job)
    assert paired is None and timer.lost is lost and {r.direction for r in rows} == {"backward", "both"}
    assert all(r.red == "RuntimeError: CUDA error: an illegal memory access" for r in rows)
    assert timer.notes == [f"{job}: RuntimeError: CUDA error: an illegal memory access"]
    assert "fails" in capsys.readouterr().err, "the log says where"


def test_a_peer_may_refuse_sizes_but_not_all_of_them():
    op = OPS["rms_norm"]

    def wide_only(x, *args, **kwargs):
        if x.shape[-1] < 100:
            raise RuntimeError("no available kernel")
        return op.reference(x, *args, **kwargs)

    def never(**inputs):
        raise ImportError("not installed")

    red = suite.check(op, torch.float32, CPU, {"some": wide_only, "never": never, "ours x": wide_only})
    assert set(red) == {"never", "ours x"} and red["never"] == "ImportError: not installed"


def test_one_of_two_backends_may_be_red():
    op = OPS["rms_norm"]
    fields = {f.name: getattr(op, f.name) for f in dataclasses.fields(op)}
    planted = types.SimpleNamespace(**fields, select=op.select, workload=op.workload)
    planted.usable = {"cpu": ("reference", "cpp", "cuda")}
    planted.public = lambda x, weight, *args, backend=None, **kwargs: op.reference(
        x, weight * (1.5 if backend == "cuda" else 1), *args, **kwargs)
    rows, paired = bench().run(suite.Pass(planted, SMALL, torch.float32, "forward"))
    assert [(r.backend, bool(r.red), bool(r.seconds)) for r in rows] == [("cpp", False, True), ("cuda", True, False)]
    assert "ours cuda" not in paired.times["forward"]


# --------------------------------------------------------------------------------------------------------- the report
def synthetic(folder, monkeypatch):
    """A run as a GPU would leave it, with invented numbers; it stays in the test's folder."""
    info = record.machine(CPU) | {"node": "nvidia-test", "device": "NVIDIA Test", "device_type": "cuda", "gpu_state": "clocks"}
    monkeypatch.setattr(record, "machine", lambda device, memory: info)
    run, timer = record.Record(folder, CUDA, PEAKS, {"ops": ["flash_attention"]}, commit_id="c" * 40), bench()
    timer.device = CUDA
    case = next(c for c in OPS["flash_attention"].workload.cases if c.kind == "gpu")
    for kind, stages in (("forward", ["forward"]), ("training", ["backward", "both"])):
        job = suite.Pass(OPS["flash_attention"], case, torch.bfloat16, kind)
        names = {"ours triton": 1.0, "eager SDPA": 1.2, "cudnn": 0.9, "flash": 1.6, "efficient": 2.5, "flex": 1.4}
        times = {stage: {name: [t * 1e-2] * 5 for name, t in names.items()} for stage in (*stages, "forward")}
        paired = Paired(times, {}, "cuda graph replay")
        rows = [suite.Row("flash_attention", case.dims, "bfloat16", d, "cuda", "triton", True, "", 0) for d in stages]
        run.start(job)
        run.add(job, [timer._row(row, job, paired) for row in rows], paired)
    run.note(["efficient cannot run: RuntimeError: No available kernel"])
    run.finish(complete=True, state="clocks after")
    return run


def test_report_of_a_gpu_run(tmp_path, monkeypatch):
    run = synthetic(tmp_path, monkeypatch)
    command.render(run.path)
    text = run.path.with_suffix(".md").read_text()
    for part in ("NVIDIA Test; torch", "triton", "ccccccc", "x others", "efficient 2.50 [", "flex 1.40 [", "cudnn 0.90 < 1",
                 "torch's bf16 matrix product 800.00 TFLOP/s", "efficient cannot run"):
        assert part in text, part
    assert run.path.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (device,) = current.current(tmp_path)
    assert device.on_gpu and "| flash_attention | triton | fwd | bf16 | 1 | 1.20" in (page := pages.page([device], tmp_path))
    assert "## NVIDIA Test" in page and f"nvidia-test/{run.path.name}" in page and "No run on a GPU" not in page
    assert "NVIDIA Test" in pages.status([device]) and "NVIDIA Test" in pages.speed([device], tmp_path)


def test_every_peer_has_a_look_of_its_own():
    from benchmarks.peers import PEERS
    families = {"eager", "compile", *(family for peers in PEERS.values() for family in peers)}
    assert families <= set(plot.LOOKS) and len(set(plot.LOOKS.values())) == len(plot.LOOKS)


def test_json_of_a_run_is_whole_after_every_pass(tmp_path):
    run, timer = record.Record(tmp_path, CPU, PEAKS, OPTIONS), bench()
    for count, job in enumerate(jobs()[:2], 1):
        run.start(job)
        assert json.loads(run.path.read_text())["run"]["running"] == str(job)
        rows, paired = timer.run(job)
        run.add(job, [replace(row) for row in rows], paired)
        assert len({b["group"] for b in json.loads(run.path.read_text())["benchmarks"]}) >= count


def test_peers_of_attention_are_checked_at_sizes_that_they_take():
    """The peers built on SDPA pass the error check with two of SDPA's backends that also run on a CPU. That shows that the
    layouts, the grouped heads and the mask that they pass are right.
    """
    from benchmarks import peers
    op, math = OPS["flash_attention"], peers.Peer(peers._sdpa("MATH"), ("cpu",), peers._dense_inputs)
    taken = {"flash": peers.PEERS["flash_attention"]["flash"], "efficient": math}
    assert suite.check(op, torch.float32, CPU, taken | {"ours cpp": lambda **x: op.public(**x)}) == {}
    paged = OPS["paged_attention"]
    taken = peers.PEERS["paged_attention"]
    assert suite.check(paged, torch.float32, CPU, {name: taken[name] for name in ("folded", "bf16 cache")}) == {}
    turned = peers.Peer(lambda q, k, v, causal, scale: peers._sdpa("MATH")(q, k.flip(2), v, causal, scale), ("cpu",),
                        peers._dense_inputs)
    assert set(suite.check(op, torch.float32, CPU, {"flash": turned})) == {"flash"}


def test_flex_decoding_is_the_decoding_of_one_token(monkeypatch):
    """The FlexAttention peer for decode, run without compilation, takes and returns the right layouts and gives our results; it
    refuses options that it does not support.
    """
    from torch.nn.attention.flex_attention import flex_attention

    from benchmarks import peers
    monkeypatch.setitem(peers._compiled, "flex", flex_attention)
    op, peer = OPS["paged_attention"], peers.PEERS["paged_attention"]["flex"]
    assert suite.check(op, torch.float32, CPU, {"flex": peer}) == {}
    sample = op.workload.sample(peers.CHECKED["paged_attention"][0], torch.float32, CPU, torch.Generator().manual_seed(0))
    torch.testing.assert_close(peer(**sample.inputs), op.public(**sample.inputs))
    with pytest.raises(NotImplementedError, match="equal lengths"):
        peer(**op.workload.sample(op.workload.cases[0], torch.float32, CPU, torch.Generator().manual_seed(0)).inputs)
