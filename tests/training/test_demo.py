"""The demo and the command line, from start to end with a tiny recipe."""

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import small_config

from internlm2.cli import main
from internlm2.demo import run as demo_module
from internlm2.demo.report import StepCost, markdown, summarize
from internlm2.training.metrics import read_log
from internlm2.training.runfolder import RunLock, saved_config, usable_cpus
from internlm2_kernels import memory

RECIPE = """
steps = {steps}
threads = 1
checkpoint_every = 10
validate_every = 10
validation_batches = 1

[model]
preset = "tiny"
hidden_size = 64
intermediate_size = 128

[data]
source = "{source}"
tokens_per_batch = 128
max_seqlen = 64
validation_fraction = 0.2

[optimizer]
lr = 1e-2
warmup_steps = 5
"""


@pytest.fixture(autouse=True)
def usual_memory():
    """The commands make their process keep freed memory, which is this one here."""
    yield
    memory.release()


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe that trains on a few files of the standard library, and returns its path."""
    source = tmp_path / "text"
    source.mkdir()
    library = Path(json.__file__).parent
    for file in (*library.glob("*.py"), library.parent / "textwrap.py", library.parent / "heapq.py"):
        (source / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")

    def write(steps=12):
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(source=source.as_posix(), steps=steps))
        return path

    return write


def test_demo(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "RECIPE", recipe())
    monkeypatch.setattr(demo_module, "FOR_DEVICE", {"cpu": ["steps=34"]})
    monkeypatch.setattr(demo_module, "MIN_STEPS", 34)
    monkeypatch.setattr(demo_module, "SAMPLE_TOKENS", 8)
    monkeypatch.setattr(demo_module, "LENGTHS", (64, 130))
    monkeypatch.setattr(demo_module, "LENGTHS_S", 0.1)
    out = tmp_path / "runs" / "demo"
    assert main(["demo", "--out", str(out), "--minutes", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert sum(line.startswith("memory: ") and memory.found().name in line for line in shown.splitlines()) == 1

    log = read_log(out / "log.jsonl")
    assert len(log) == 34 == saved_config(out).steps
    assert log[-1]["loss"] < log[0]["loss"] - 0.2 and log[-1]["plain_loss"] < log[0]["plain_loss"] - 0.2
    # Both models start from the same weights, up to bfloat16's rounding, and do not run the same operators.
    assert log[0]["loss"] == pytest.approx(log[0]["plain_loss"], abs=1e-2)
    assert any(r["loss"] != r["plain_loss"] for r in log)

    summary = json.loads((out / "comparison.json").read_text())
    ratios = [r["plain_step_s"] / r["step_s"] for r in log[3:]]
    assert summary["ratio"]["median"] == statistics.median(ratios)
    assert summary["sides"]["plain"]["validation_loss"] == log[-1]["plain_validation_loss"]
    assert f"**{summary['ratio']['median']:.2f}x**" in (out / "comparison.md").read_text()
    assert (out / "sample.txt").read_text().startswith(demo_module.PROMPT)
    for name in ("loss.png", "lengths.png"):
        picture = (out / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert [r["length"] for r in summary["lengths"]] == [64, 130]
    assert all(2 <= r["pairs"] <= 9 and r["kernels_tokens_per_s"] > 0 for r in summary["lengths"])
    assert "| 130 |" in (out / "comparison.md").read_text()
    names = ("comparison.md", "comparison.json", "loss.png", "lengths.png", "sample.txt")
    assert all(str(out / name) in shown for name in names)

    # Repeating the command renames the folder of the finished run, and changes no file in it.
    monkeypatch.setattr(demo_module, "FOR_DEVICE", {"cpu": ["steps=3"]})
    monkeypatch.setattr(demo_module, "MIN_STEPS", 3)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert main(["demo", "--out", str(out), "--minutes", "0.01"]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "runs" / "demo-1").iterdir() if p.is_file()} == before
    assert len(read_log(out / "log.jsonl")) == 3


def test_a_stopped_demo_continues(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "RECIPE", recipe())
    monkeypatch.setattr(demo_module, "FOR_DEVICE", {"cpu": ["steps=12"]})
    monkeypatch.setattr(demo_module, "MIN_STEPS", 12)
    monkeypatch.setattr(demo_module, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(demo_module, "LENGTHS", (64,))
    monkeypatch.setattr(demo_module, "LENGTHS_S", 0.1)

    class StopsAtFour(demo_module.PairedTrainer):
        def train_step(self, batches, lr):
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(batches, lr)

    out = tmp_path / "demo"
    with monkeypatch.context() as stopping:
        stopping.setattr(demo_module, "PairedTrainer", StopsAtFour)
        assert main(["demo", "--out", str(out), "--minutes", "0.01"]) == 128 + signal.SIGTERM
    assert not (out / "comparison.json").exists() and len(read_log(out / "log.jsonl")) == 4
    first = read_log(out / "log.jsonl")
    assert main(["demo", "--out", str(out), "--minutes", "0.01"]) == 0
    log = read_log(out / "log.jsonl")
    assert log[:4] == first and [r["step"] for r in log] == list(range(1, 13))


def test_train_command(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", str(recipe()), f"out={out}", "optimizer.lr=5e-3"]
    assert main(arguments) == 0
    assert len(read_log(out / "log.jsonl")) == 12 and saved_config(out).optimizer.lr == 5e-3
    weights = (out / "checkpoints" / "step-00000012" / "model.safetensors").read_bytes()
    # Repeating the command on a finished run changes nothing in it.
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "continuing at step 12 of 12" in shown and shown.count(f"({memory.found().name})") == 2
    assert (out / "checkpoints" / "step-00000012" / "model.safetensors").read_bytes() == weights
    # The run keeps its own copy of the text, so a change of the source does not matter.
    for file in (tmp_path / "text").iterdir():
        file.unlink()
    assert main(arguments) == 0


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.rate=1", "unknown key optimizer.rate"),
        ("steps=0", "steps must be 1 or more, got 0"),
        ("data.source=/nowhere", "source must hold text"),
        ("device=tpu", "device must be 'cpu' or 'cuda', got 'tpu'"),
        ("data.max_seqlen=40000", "data.max_seqlen must be at most model.max_position_embeddings = 32768, got 40000"),
        ("data.tokenizer=missing.model", "missing.model"),
        ("model.vocab_size=3000000", "no tokenizer of vocab_size 3000000"),
    ],
)
def test_bad_input_is_named(recipe, tmp_path, capsys, override, message):
    assert main(["train", str(recipe()), f"out={tmp_path / 'run'}", override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_changed_configuration_is_refused(recipe, tmp_path, capsys):
    arguments = ["train", str(recipe(steps=2)), f"out={tmp_path / 'run'}"]
    assert main(arguments) == 0
    assert main([*arguments, "seed=5", "optimizer.lr=0.5"]) == 2
    error = capsys.readouterr().err
    assert "seed (saved 0, given 5)" in error and "optimizer.lr (saved 0.01, given 0.5)" in error
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 2


def test_damaged_tokens_are_refused(recipe, tmp_path, capsys):
    arguments = ["train", str(recipe(steps=2)), f"out={tmp_path / 'run'}"]
    assert main(arguments) == 0
    tokens = tmp_path / "run" / "data" / "train.tokens.npy"
    os.truncate(tokens, 1000)
    assert main(arguments) == 2
    assert "train.tokens.npy is truncated: expected" in capsys.readouterr().err


def test_one_process_at_a_time(recipe, tmp_path, capsys):
    pytest.importorskip("fcntl")
    with RunLock(tmp_path / "run"):
        assert main(["train", str(recipe()), f"out={tmp_path / 'run'}"]) == 2
    assert "another process is training in" in capsys.readouterr().err
    with RunLock(tmp_path / "run"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(recipe, tmp_path, capsys):
    assert main(["train", str(recipe()), f"out={tmp_path / 'run'}", "device=cuda"]) == 2
    assert main(["demo", "--device", "cuda", "--out", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err.count("device must be 'cpu' here, got 'cuda'") == 2


def test_help_shows_examples():
    output = subprocess.run([sys.executable, "-m", "internlm2", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("demo", "train", "demo-check"):
        assert f"python -m internlm2 {command}" in output


def test_summary_of_a_known_log():
    log = []
    for s in range(1, 102):
        losses = {"loss": 5 - 0.01 * s, "plain_loss": 5 - 0.01 * s + 0.001}
        log.append({"step": s, "step_s": 0.5, "plain_step_s": 0.5 * (1 + s / 100)} | losses)
    log[-1] |= {"validation_loss": 3.0, "plain_validation_loss": 3.5}
    summary = summarize(small_config("nowhere"), log, StepCost(10 << 20, 40 << 20))
    assert summary["ratio"]["median"] == pytest.approx(1.525) and summary["ratio"]["steps"] == 98
    assert summary["largest_loss_difference_first_20"] == pytest.approx(0.001)
    assert summary["sides"]["kernels"]["last_losses_mean"] == pytest.approx(5 - 0.01 * 76.5)
    assert summary["sides"]["kernels"]["tokens_per_s"] == pytest.approx(96 / 0.5)
    table = markdown(summary)
    assert "| tokens/s | 192 | 126 |" in table and "| memory of a step, MiB | 10 | 40 |" in table
    assert "**1.52x**" in table or "**1.53x**" in table
    assert "memory 0.25 of plain's" in table
    assert "| memory of a step, MiB | - | - |" in markdown(summarize(small_config("nowhere"), log, StepCost(None, None)))


def test_time_that_is_up_is_told():
    log = [{"step": s, "step_s": 0.5, "plain_step_s": 0.6, "loss": 5.0, "plain_loss": 5.0} for s in range(1, 8)]
    table = markdown(summarize(small_config("nowhere", steps=20), log, StepCost(None, None)))
    assert "The time was up 13 steps before the planned end" in table
    assert "The time was up" not in markdown(summarize(small_config("nowhere", steps=7), log, StepCost(None, None)))


def test_usable_cpus():
    assert 1 <= usable_cpus() <= os.cpu_count()
