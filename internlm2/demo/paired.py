"""PairedTrainer: trains a model on the kernels and the same model on plain PyTorch operators, one step of each in turn.

The two models start from the same weights and see the same batches. Which of them goes first alternates, so that a machine
whose speed drifts favours neither. Every checkpoint also holds the plain model, so that a resumed run continues the comparison.
"""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from internlm2.data import PackedBatch
from internlm2.training.learner import Learner, StepResult
from internlm2.training.metrics import memory_in_use, reset_peak_memory
from internlm2.training.trainer import Trainer


class PairedTrainer(Trainer):
    """A Trainer that also trains the plain model, whose plain_loss, plain_step_s and plain_validation_loss are in its log.

    plain: the learner of the plain model, built like the trainer's own but with operators="plain"
    """

    title = "kernels and plain"

    def __init__(self, *arguments, plain: Learner, **options):
        super().__init__(*arguments, **options)
        self.plain = plain

    def train_step(self, batches: list[PackedBatch], lr: float) -> tuple[StepResult, dict[str, float]]:
        results, seconds = {}, {}
        order = (self.learner, self.plain) if self.step % 2 == 0 else (self.plain, self.learner)
        for learner in order:
            results[learner], seconds[learner] = timed_step(learner, batches, lr, self.device)
        further = {"plain_loss": results[self.plain].loss, "plain_step_s": seconds[self.plain]}
        return results[self.learner], further | {"step_s": seconds[self.learner]}

    def validate(self) -> dict[str, float]:
        losses = super().validate()
        if self.validation:
            losses["plain_validation_loss"] = self.plain.evaluate(self.validation)
        return losses

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        tensors, record = super().state()
        tensors["plain.model.safetensors"] = dict(self.plain.model.state_dict())
        tensors["plain.optimizer.safetensors"] = self.plain.optimizer_tensors()
        return tensors, record

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]], record: dict) -> None:
        super().load_state(tensors, record)
        self.plain.model.load_state_dict(tensors["plain.model.safetensors"])
        self.plain.load_optimizer_tensors(tensors["plain.optimizer.safetensors"])


def timed_step(learner: Learner, batches: Sequence[PackedBatch], lr: float, device: torch.device) -> tuple[StepResult, float]:
    """One optimizer step, and its wall time in seconds including the device's work."""
    _wait_for(device)
    started = time.perf_counter()
    result = learner.step(batches, lr)
    _wait_for(device)
    return result, time.perf_counter() - started


def probe(
    learner: Learner, batches: Sequence[PackedBatch], lr: float, device: torch.device, repeats: int = 2
) -> tuple[float, int | None]:
    """The median time of a step in seconds, and the memory in bytes that a step needs beyond weights and optimizer state.

    The memory holds the gradients, what forward keeps for backward, and workspace; None where the system cannot tell. The
    learner is trained by the measurement, so it must not be used afterwards.
    """
    timed_step(learner, batches, lr, device)  # the first step allocates optimizer state and selects kernels
    seconds = [timed_step(learner, batches, lr, device)[1] for _ in range(repeats)]
    learner.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    _give_back_free_memory(device)
    can_reset = reset_peak_memory(device)
    held, _ = memory_in_use(device)
    timed_step(learner, batches, lr, device)
    peak = memory_in_use(device)[1] - held
    return statistics.median(seconds), peak if can_reset else None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_back_free_memory(device: torch.device) -> None:
    """Returns freed memory to the system. What the allocator keeps for reuse would be counted as in use before the step, and
    the step would seem to need less."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:  # the C library is not glibc
            pass
