"""Trainer: the one loop of every training stage. A stage is a configuration, a data source and a loss.

The folder of a run holds config.toml, log.jsonl (one line for each step) and checkpoints/. A run that was stopped by a
signal, a crash or a kill continues from its newest undamaged checkpoint. On the same machine with the same number of threads
it then has exactly the losses and weights of a run that was not stopped.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from internlm2.data import PackedBatch, PackedBatches
from internlm2.training.checkpoints import RunCheckpoints
from internlm2.training.config import TrainConfig
from internlm2.training.display import RunDisplay
from internlm2.training.learner import Learner, StepResult
from internlm2.training.metrics import StepLog, memory_in_use
from internlm2.training.schedule import cosine_with_warmup

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class FitResult:
    """How `Trainer.fit` ended. step: steps done; stopped_by: the signal that stopped the run, or None; saved: whether a
    checkpoint of the state at `step` is on the disk."""

    step: int
    stopped_by: signal.Signals | None
    saved: bool


def exit_status(result: FitResult) -> int:
    """The exit status of a command that ended with `result`. If the run did not reach its end, a line on stderr says what to
    do."""
    if result.stopped_by:
        saved = "saved" if result.saved else "NOT saved"
        text = f"stopped by {result.stopped_by.name} at step {result.step}, {saved}; the same command continues"
        print(text, file=sys.stderr)
        return 128 + result.stopped_by
    if not result.saved:
        print(f"error: the state at step {result.step} could not be saved (see the warnings above)", file=sys.stderr)
        return 1
    return 0


class StopSignals:
    """A context in which the first SIGTERM or SIGINT becomes a request to stop after the current step, noted in `received`.
    A second one acts at once, as it would without this context."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        # Python lets only the main thread install handlers. In another thread the caller has to stop the run itself.
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_exception) -> None:
        self._restore()

    def _request(self, number: int, _frame) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class Trainer:
    """Trains one learner on a packed stream.

    config:     the resolved configuration
    learner:    model, optimizer and loss, on config.device
    batches:    the training stream
    validation: held-out batches, the same ones at every validation; may be empty
    display:    what a person sees of the run
    Attributes: step is the number of optimizer steps done

    A subclass may train something else as well: it overrides `train_step`, and `state` and `load_state` for its own state.
    """

    title = "training"

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        batches: PackedBatches,
        validation: Sequence[PackedBatch] = (),
        display: RunDisplay | None = None,
    ):
        self.config, self.learner, self.batches = config, learner, batches
        self.device = torch.device(config.device)
        self.validation = [b.to(self.device) for b in validation]
        self.display = display or RunDisplay(self.title, config.steps)
        self.step = 0
        self.out = Path(config.out)
        self.log = StepLog(self.out / "log.jsonl", self.display.warn)
        self.checkpoints = RunCheckpoints(self.out / "checkpoints", config.keep_checkpoints)
        self._saved_step = -1
        self._skipped = 0

    def resume(self) -> bool:
        """Continues from the newest undamaged checkpoint; False where the folder has no checkpoint yet.

        A damaged checkpoint is reported with its file and fault, and the one before it is used.
        Errors: CheckpointError where all checkpoints are damaged, ValueError where the checkpoint is of another run
        """
        found = self.checkpoints.load_newest(self.display.warn)
        if found is None:
            self.log.truncate_after(0)
            return False
        tensors, record = found
        self.load_state(tensors, record)
        self._saved_step = self.step
        self.log.truncate_after(self.step)
        return True

    def fit(self, deadline: float = math.inf, at_least: int = 0) -> FitResult:
        """Runs the remaining steps, then saves.

        It stops early, also with a checkpoint, on SIGTERM or SIGINT, and before a step that would probably end after
        `deadline` (a time of time.perf_counter()), but not before step `at_least`.
        Errors: FloatingPointError after 10 steps in a row without a finite gradient
        """
        self.display.start_at(self.step)
        with StopSignals() as stop, self.display:
            longest = 0.0
            while self.step < self.config.steps and not stop.received:
                if self.step >= at_least and time.perf_counter() + longest > deadline:
                    break
                started = time.perf_counter()
                self._one_step()
                longest = max(longest, time.perf_counter() - started)
                if self.step % self.config.checkpoint_every == 0:
                    self.save()
            # The state is saved at the end unless it is saved already. If the save at the last step failed, it is tried again.
            if self._saved_step != self.step:
                self.save()
        return FitResult(self.step, stop.received, self._saved_step == self.step)

    def train_step(self, batches: list[PackedBatch], lr: float) -> tuple[StepResult, dict[str, float]]:
        """One optimizer step. Returns its result and further numbers for the log."""
        return self.learner.step(batches, lr), {}

    def validate(self) -> dict[str, float]:
        """{name in the log: loss} on the held-out batches; empty without such batches."""
        return {"validation_loss": self.learner.evaluate(self.validation)} if self.validation else {}

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        """Everything that the rest of the run depends on: tensors by file name, and a record that JSON can hold."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {
            "model.safetensors": dict(self.learner.model.state_dict()),
            "optimizer.safetensors": self.learner.optimizer_tensors(),
            "rng.safetensors": rng,
        }
        return tensors, {"step": self.step, "skipped": self._skipped, "data": self.batches.state_dict()}

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]], record: dict) -> None:
        """Restores the state from the two results of `state`."""
        self.batches.load_state_dict(record["data"])
        self.learner.model.load_state_dict(tensors["model.safetensors"])
        self.learner.load_optimizer_tensors(tensors["optimizer.safetensors"])
        rng = tensors["rng.safetensors"]
        torch.set_rng_state(rng["cpu"].clone())
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"].clone(), self.device)
        self.step, self._skipped = record["step"], record["skipped"]

    def save(self) -> bool:
        """Writes a checkpoint; False where that fails, for example on a full disk. A failure is shown; earlier checkpoints
        are kept and training continues."""
        try:
            self.log.sync()
            self.checkpoints.save(self.step, *self.state(), self.learner.model)
        except OSError as error:
            self.display.warn(f"no checkpoint at step {self.step}: {error}")
            return False
        self._saved_step = self.step
        return True

    def _one_step(self) -> None:
        optimizer = self.config.optimizer
        lr = cosine_with_warmup(
            self.step, peak=optimizer.lr, steps=self.config.steps, warmup=optimizer.warmup_steps,
            floor_ratio=optimizer.floor_ratio,
        )  # fmt: skip
        batches = [next(self.batches).to(self.device) for _ in range(self.config.accumulation)]
        started = time.perf_counter()
        result, further = self.train_step(batches, lr)
        seconds = further.pop("step_s", None) or time.perf_counter() - started
        self.step += 1
        self._count_skipped(result)
        tokens = sum(b.num_tokens for b in batches)
        record = {
            "step": self.step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped": result.skipped,
            "tokens": self.step * tokens,
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "peak_memory_bytes": memory_in_use(self.device)[1],
        } | further
        every = self.config.validate_every
        if self.step == self.config.steps or (every and self.step % every == 0):
            record |= self.validate()
        self.log.append(record)
        self.display.update(self.step, f"loss {result.loss:.3f}  {tokens / seconds:,.0f} tokens/s")

    def _count_skipped(self, result: StepResult) -> None:
        self._skipped = self._skipped + 1 if result.skipped else 0
        if result.skipped:
            self.display.warn(f"step {self.step} skipped: its gradient norm is {result.grad_norm}")
        if self._skipped >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{self._skipped} steps in a row had no finite gradient (step {self.step}); lower optimizer.lr"
            )
