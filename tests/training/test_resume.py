"""A run that is stopped and continued has, to the last bit, the losses and weights of a run that was not stopped."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal

import pytest
import torch
from runs import MODEL, assert_same_bits, deterministic_part, small_config, small_trainer, weights

from internlm2.checkpoint import load_model
from internlm2.demo.paired import PairedTrainer
from internlm2.model import InternLM2
from internlm2.reward import RewardModel
from internlm2.storage import CheckpointError
from internlm2.training.checkpoints import RunCheckpoints
from internlm2.training.metrics import read_log
from internlm2.training.stages.pretrain import build_learner
from internlm2.training.trainer import Trainer


class StopAfter(Trainer):
    """A trainer that receives a signal in the middle of a step."""

    def __init__(self, *arguments, at, number=signal.SIGTERM, **options):
        super().__init__(*arguments, **options)
        self.at, self.number = at, number

    def train_step(self, batches, lr):
        if self.step + 1 == self.at:
            os.kill(os.getpid(), self.number)
        return super().train_step(batches, lr)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not stopped."""
    trainer = small_trainer(small_config(tmp_path_factory.mktemp("whole")))
    assert trainer.resume() is False
    result = trainer.fit()
    assert (result.step, result.stopped_by, result.saved) == (20, None, True)
    return trainer


def assert_as_whole(trainer, whole):
    assert_same_bits(weights(trainer), weights(whole))
    assert_same_bits(trainer.learner.optimizer_tensors(), whole.learner.optimizer_tensors())
    logs = [deterministic_part(read_log(t.log.path)) for t in (trainer, whole)]
    assert logs[0] == logs[1]
    assert [r["step"] for r in logs[0]] == list(range(1, 21))


def test_it_learns(whole):
    log = read_log(whole.log.path)
    assert log[-1]["loss"] < log[0]["loss"] - 0.01 and math.isfinite(log[-1]["validation_loss"])
    assert [r["step"] for r in log if "validation_loss" in r] == [10, 20]


def test_the_newest_two_checkpoints_stay(whole):
    folder = whole.checkpoints.folder
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000015", "step-00000020"]


def test_a_checkpoint_is_a_model(whole):
    model = load_model(whole.checkpoints.path(20))
    assert_same_bits({n: p.detach() for n, p in model.named_parameters()}, weights(whole))


def test_a_checkpoint_says_which_model_it_is(tmp_path):
    """load_model reads the checkpoint of a reward model, and of a model with a scaling that the released class lacks."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    for model in (RewardModel(dataclasses.replace(MODEL, reward_token_id=3)),
                  InternLM2(dataclasses.replace(MODEL, rope_scaling=yarn))):
        path = RunCheckpoints(tmp_path, keep=1).save(1, {"model.safetensors": model.state_dict()}, {}, model)
        loaded = load_model(path)
        assert type(loaded) is type(model) and loaded.config == model.config
        assert_same_bits(*({n: p.detach() for n, p in m.named_parameters()} for m in (loaded, model)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 7, 10])
def test_a_signal_saves_and_the_run_continues_exactly(tmp_path, whole, at, number):
    config = small_config(tmp_path)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    result = small_trainer(config, StopAfter, at=at, number=number).fit()
    assert (result.step, result.stopped_by, result.saved) == (at, number, True)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    trainer = small_trainer(config)
    assert trainer.resume() and trainer.step == at
    trainer.fit()
    assert_as_whole(trainer, whole)


class Crash(Exception):
    pass


class CrashAfter(Trainer):
    def train_step(self, batches, lr):
        if self.step == 13:
            raise Crash
        return super().train_step(batches, lr)


@pytest.fixture(scope="module")
def crashed_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashed")
    with pytest.raises(Crash):
        small_trainer(small_config(folder), CrashAfter).fit()
    return folder


@pytest.fixture
def crashed(crashed_run, tmp_path):
    """The configuration to continue a run that crashed after step 13, with checkpoints at steps 5 and 10."""
    shutil.copytree(crashed_run, tmp_path, dirs_exist_ok=True)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 14))
    return small_config(tmp_path)


def test_a_crash_goes_back_to_the_checkpoint_and_doubles_no_line(crashed, whole):
    trainer = small_trainer(crashed)
    assert trainer.resume() and trainer.step == 10
    trainer.fit()
    assert_as_whole(trainer, whole)


def test_what_a_kill_left_half_done_is_cleaned_up(tmp_path, crashed, whole):
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000010", folder / ".step-00000015.writing")
    (folder / ".step-00000015.writing" / "manifest.json").unlink()
    (folder / "step-00000010").rename(folder / ".step-00000010.previous")  # killed between the two renames
    trainer = small_trainer(crashed)
    assert trainer.resume() and trainer.step == 10
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000005", "step-00000010"]
    trainer.fit()
    assert_as_whole(trainer, whole)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage, fault", [(truncate, "truncated"), (flip_a_bit, "damaged"), (remove, "missing")])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "run.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path, crashed, whole, damage, fault, file):
    damage(tmp_path / "checkpoints" / "step-00000010" / file)
    trainer = small_trainer(crashed)
    assert trainer.resume() and trainer.step == 5
    (warning,) = trainer.display.warnings
    assert f"step-00000010/{file} is " in warning
    assert fault in warning or (file == "manifest.json" and "is damaged" in warning)
    if file == "model.safetensors":
        trainer.fit()
        assert_as_whole(trainer, whole)


def test_no_sound_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path, crashed):
    for step in (5, 10):
        flip_a_bit(tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    for _ in range(2):  # the second attempt gives the same error
        with pytest.raises(CheckpointError, match="no sound checkpoint in .*Remove the run's folder"):
            small_trainer(crashed).resume()
    assert len(read_log(tmp_path / "log.jsonl")) == 13


def test_a_checkpoint_of_other_data_is_refused(crashed):
    changed = dataclasses.replace(crashed, seed=1)
    with pytest.raises(ValueError, match="data state must have seed = 1, as this stream has, got 0"):
        small_trainer(changed).resume()


def test_a_full_disk_costs_only_the_checkpoint(tmp_path, whole):
    """From step 8 to 13 no file may grow beyond 8 KiB: the save at step 10 fails, but the older checkpoint stays and training
    continues."""

    class FullDisk(Trainer):
        def train_step(self, batches, lr):
            if self.step in (7, 13):
                size = 8192 if self.step == 7 else unlimited
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            return super().train_step(batches, lr)

    unlimited, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = small_trainer(small_config(tmp_path), FullDisk)
    seen = {}
    save = trainer.checkpoints.save

    def watched(step, *rest):
        try:
            return save(step, *rest)
        finally:
            seen[step] = sorted(p.name for p in trainer.checkpoints.folder.iterdir())

    trainer.checkpoints.save = watched
    try:
        result = trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, hard))
    assert seen[10] == ["step-00000005"]  # the failed save left nothing behind
    assert seen[15] == ["step-00000005", "step-00000015"] and result.saved
    (warning,) = trainer.display.warnings
    assert warning.startswith("no checkpoint at step 10: ") and "step-00000010" in warning
    assert_as_whole(trainer, whole)


def test_a_failed_last_save_is_told(tmp_path):
    trainer = small_trainer(small_config(tmp_path, steps=3))
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    result = trainer.fit()
    assert result.step == 3 and not result.saved and "no checkpoint at step 3" in trainer.display.warnings[0]


def test_a_run_without_finite_gradients_stops(tmp_path):
    trainer = small_trainer(small_config(tmp_path))
    trainer.learner.loss = lambda model, batch: model.output.weight.sum() * math.nan
    with pytest.raises(FloatingPointError, match="10 steps in a row had no finite gradient"):
        trainer.fit()
    assert json.loads(trainer.log.path.read_text().splitlines()[0])["loss"] is None


def test_a_paired_run_continues_exactly(tmp_path):
    """The checkpoint of a paired run holds the plain model too. In this test both models run the plain operators."""

    class StoppedPair(PairedTrainer):
        def train_step(self, batches, lr):
            if self.step + 1 == 7 and self.config.out.endswith("stopped"):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(batches, lr)

    runs = {}
    for name in ("whole", "stopped"):
        config = small_config(tmp_path / name, steps=12)
        for _ in range(2):
            plain = build_learner(config, seed=5)  # other weights, so that mixing the two up is noticed
            runs[name] = small_trainer(config, StoppedPair, plain=plain)
            runs[name].resume()
            runs[name].fit()
    whole, stopped = runs["whole"], runs["stopped"]
    assert stopped.step == 12
    logs = [deterministic_part(read_log(t.log.path)) for t in (stopped, whole)]
    assert logs[0] == logs[1] and logs[0][5]["plain_loss"] != logs[0][5]["loss"]
    assert_same_bits(weights(stopped), weights(whole))
    assert_same_bits(stopped.plain.optimizer_tensors(), whole.plain.optimizer_tensors())


def test_random_state_is_restored(tmp_path, whole):
    torch.manual_seed(3)
    trainer = small_trainer(small_config(tmp_path, steps=5))
    trainer.fit()
    expected = torch.rand(4)
    torch.manual_seed(99)
    small_trainer(small_config(tmp_path, steps=5)).resume()
    assert torch.equal(torch.rand(4), expected)


def test_a_deadline_stops_between_steps(tmp_path, whole):
    """The run stops at the deadline, but not before step `at_least`. Its steps are saved, and it can be continued."""
    trainer = small_trainer(small_config(tmp_path))
    result = trainer.fit(deadline=0.0, at_least=3)
    assert (result.step, result.stopped_by, result.saved) == (3, None, True)
    again = small_trainer(small_config(tmp_path))
    assert again.resume() and again.fit().step == 20
    assert_as_whole(again, whole)
