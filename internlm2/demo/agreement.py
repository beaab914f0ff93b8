"""Does a model learn with the kernels as it does with plain PyTorch operators? Two checks over whole runs of the demo's model.

float32:  the first 20 losses of both sides, from the same weights on the same batches, differ by at most 1e-4.
bfloat16: the mean of the last 50 losses with the kernels lies within 2 standard deviations of its mean over three plain runs.
          The plain runs differ in the seed of their weights, and the run with the kernels has the seed of the first of them.
          All runs see the same batches.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from internlm2.config import load_config
from internlm2.data import PackedBatches
from internlm2.storage import atomic_file
from internlm2.training.config import TrainConfig
from internlm2.training.display import RunDisplay
from internlm2.training.learner import Learner
from internlm2.training.runfolder import RunLock, resolve_machine
from internlm2.training.schedule import cosine_with_warmup
from internlm2.training.stages.pretrain import RECIPES, build_batches, build_learner, prepare_corpus

FIRST, LAST = 20, 50
LARGEST_DIFFERENCE, STANDARD_DEVIATIONS = 1e-4, 2.0
PLAIN_SEEDS = (1, 2, 3)

Stream = Callable[[], PackedBatches]


@dataclass(frozen=True)
class Agreement:
    """The result of the comparison.

    float32_difference: largest difference between the losses of kernels and plain operators over the first 20 steps
    kernels_mean:       mean of the kernels' last 50 losses in bfloat16
    plain_means:        mean of the last 50 losses of each plain run in bfloat16
    """

    float32_difference: float
    kernels_mean: float
    plain_means: tuple[float, ...]

    @property
    def deviations(self) -> float:
        """How far kernels_mean is from the mean of the plain runs, in standard deviations of the plain runs."""
        distance = abs(self.kernels_mean - statistics.fmean(self.plain_means))
        return distance / statistics.stdev(self.plain_means)

    @property
    def holds(self) -> bool:
        return self.float32_difference <= LARGEST_DIFFERENCE and self.deviations <= STANDARD_DEVIATIONS

    def lines(self) -> list[str]:
        plain = ", ".join(f"{m:.4f}" for m in self.plain_means)
        return [
            f"float32: the first {FIRST} losses differ by at most {self.float32_difference:.1e}"
            f" (allowed {LARGEST_DIFFERENCE:.0e})",
            f"bfloat16: mean of the last {LAST} losses {self.kernels_mean:.4f}; plain {plain}:"
            f" {self.deviations:.2f} standard deviations apart (allowed {STANDARD_DEVIATIONS:.0f})",
            "the model learns with the kernels as with plain operators" if self.holds else
            "the model does NOT learn with the kernels as with plain operators",
        ]


def losses(learner: Learner, config: TrainConfig, stream: Stream, count: int, display: RunDisplay) -> list[float]:
    """The first `count` losses of a run of config.steps steps, which writes no checkpoints and no log."""
    display.start_at(0)
    found = []
    batches = stream()
    with display:
        for step in range(count):
            optimizer = config.optimizer
            lr = cosine_with_warmup(
                step, peak=optimizer.lr, steps=config.steps, warmup=optimizer.warmup_steps, floor_ratio=optimizer.floor_ratio
            )
            micro_batches = [b.to(config.device) for b in itertools.islice(batches, config.accumulation)]
            found.append(learner.step(micro_batches, lr).loss)
            display.update(step + 1, f"loss {found[-1]:.4f}")
    return found


def measure(config: TrainConfig, stream: Stream, plain: str = "plain", kernels: str = "kernels") -> tuple[Agreement, dict]:
    """The agreement of two sets of operators on a configuration, and all the losses that it was computed from.

    Errors: ValueError where fewer than 50 of config.steps follow the warm-up
    """
    if config.steps < config.optimizer.warmup_steps + LAST:
        raise ValueError(f"steps must be at least {config.optimizer.warmup_steps + LAST}, got {config.steps}")

    def run(operators: str, seed: int, dtype: str, count: int) -> list[float]:
        of_type = dataclasses.replace(config, compute_dtype=dtype)
        display = RunDisplay(f"{operators}, {dtype}, seed {seed}", count)
        return losses(build_learner(of_type, operators=operators, seed=seed), of_type, stream, count, display)

    curves = {f"{o} float32": run(o, PLAIN_SEEDS[0], "float32", FIRST) for o in (kernels, plain)}
    curves[f"{kernels} bfloat16"] = run(kernels, PLAIN_SEEDS[0], "bfloat16", config.steps)
    for seed in PLAIN_SEEDS:
        curves[f"{plain} bfloat16 seed {seed}"] = run(plain, seed, "bfloat16", config.steps)
    pairs = zip(curves[f"{kernels} float32"], curves[f"{plain} float32"], strict=True)
    means = [statistics.fmean(curve[-LAST:]) for name, curve in curves.items() if "bfloat16" in name]
    return Agreement(max(abs(a - b) for a, b in pairs), means[0], tuple(means[1:])), curves


def check(device: str = "cpu", out: str = "runs/demo-check", steps: int = 150) -> int:
    """Measures the agreement on the demo's model and text and writes OUT/agreement.json. Returns 0 if it holds, else 1."""
    overrides = [f"device={device}", f"out={out}", f"steps={steps}"]
    config = resolve_machine(load_config(TrainConfig, RECIPES / "demo.toml", overrides))
    torch.set_num_threads(config.threads)
    with RunLock(Path(out)):
        corpus = prepare_corpus(config)
        agreement, curves = measure(config, lambda: build_batches(config, corpus)[0])
        path = Path(out) / "agreement.json"
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(agreement) | {"losses": curves}, indent=1) + "\n")
    print("\n".join([*agreement.lines(), f"written: {path}"]))
    return 0 if agreement.holds else 1
