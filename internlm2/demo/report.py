"""The files that a finished demo writes: loss curves, a table that compares kernels with plain operators, generated text."""

import json
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from internlm2.demo.lengths import lengths_table, plot_lengths
from internlm2.storage import atomic_file
from internlm2.training.config import TrainConfig

WARM_UP_STEPS = 3
LAST = 50


@dataclass(frozen=True)
class StepCost:
    """Bytes that one step needs beyond weights and optimizer state, with the kernels and with plain operators; None where the
    system cannot tell."""

    kernels: int | None
    plain: int | None


def summarize(config: TrainConfig, log: list[dict], cost: StepCost) -> dict:
    """The figures of a paired run, from its log. A ratio above 1 means that the kernels are faster."""
    timed = log[WARM_UP_STEPS:] or log
    ratios = sorted(r["plain_step_s"] / r["step_s"] for r in timed)
    tokens = config.data.tokens_per_batch * config.accumulation
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    validated = [r for r in log if "validation_loss" in r]
    sides = {}
    for side, prefix, bytes_ in (("kernels", "", cost.kernels), ("plain", "plain_", cost.plain)):
        seconds = statistics.median(r[prefix + "step_s"] for r in timed)
        losses = [r[prefix + "loss"] for r in log]
        sides[side] = {
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            "step_memory_bytes": bytes_,
            "first_loss": losses[0],
            "last_losses_mean": statistics.fmean(losses[-LAST:]),
            "validation_loss": validated[-1][prefix + "validation_loss"] if validated else None,
        }
    return {
        "ratio": {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]], "steps": len(timed)},
        "sides": sides,
        "last": min(LAST, len(log)),
        "steps": len(log),
        "planned_steps": config.steps,
        "tokens_per_step": tokens,
        "largest_loss_difference_first_20": max(abs(r["loss"] - r["plain_loss"]) for r in log[:20]),
        "parameters": config.model.num_parameters,
        "compute_dtype": config.compute_dtype,
        "device": _device_name(config),
        "torch": torch.__version__,
    }


def markdown(summary: dict) -> str:
    """The table as Markdown, followed by what it was measured on and how."""
    kernels, plain = summary["sides"]["kernels"], summary["sides"]["plain"]
    ratio, low, high = summary["ratio"]["median"], *summary["ratio"]["quartiles"]

    def row(name: str, key: str, form: str, scale: float = 1.0) -> str:
        cells = ("-" if side[key] is None else format(side[key] * scale, form) for side in (kernels, plain))
        return f"| {name} | {' | '.join(cells)} |"

    memory = "-"
    if kernels["step_memory_bytes"] and plain["step_memory_bytes"]:
        memory = f"{kernels['step_memory_bytes'] / plain['step_memory_bytes']:.2f}"
    lines = [
        "# Kernels against plain PyTorch operators",
        "",
        "| | kernels | plain |",
        "|---|---|---|",
        row("tokens/s", "tokens_per_s", ",.0f"),
        row("step, ms", "step_s", ".1f", 1e3),
        row("memory of a step, MiB", "step_memory_bytes", ",.0f", 2**-20),
        row("first loss", "first_loss", ".4f"),
        row(f"mean of the last {summary['last']} losses", "last_losses_mean", ".4f"),
        row("validation loss", "validation_loss", ".4f"),
        "",
        f"**{ratio:.2f}x** the tokens/s of plain operators: median over {summary['ratio']['steps']} pairs of steps on the same"
        f" batch, half of them between {low:.2f} and {high:.2f}; memory {memory} of plain's.",
        "",
        f"{summary['steps']} steps of {summary['tokens_per_step']:,} tokens, {summary['parameters'] / 1e6:.1f} M parameters"
        f" in float32, computing in {summary['compute_dtype']}; {summary['device']}; torch {summary['torch']}.",
        "Both sides start from the same weights, see the same batches, and take turns in going first. A step is forward,"
        " backward, clipping and AdamW; memory of a step is what it needs beyond weights and optimizer state.",
    ]
    if summary["steps"] < summary["planned_steps"]:
        lines += ["", f"The time was up {summary['planned_steps'] - summary['steps']} steps before the planned end, since the"
                  " machine had become slower. The learning rate had not yet fallen to its final value."]
    if summary.get("lengths"):
        lines += ["", "One sequence through the forward pass, the two sides in turns:", "", lengths_table(summary["lengths"])]
    return "\n".join(lines).rstrip("\n") + "\n"


def write_report(folder: Path, summary: dict, log: list[dict], sample: str) -> list[Path]:
    """Writes loss.png, lengths.png, sample.txt, comparison.md and comparison.json and returns their paths. comparison.json is
    written last: where it exists, the demo is finished."""
    paths = [folder / name for name in ("loss.png", "lengths.png", "sample.txt", "comparison.md", "comparison.json")]
    plot_losses(paths[0], log)
    plot_lengths(paths[1], summary["lengths"])
    texts = (sample, markdown(summary), json.dumps(summary, indent=1) + "\n")
    for path, text in zip(paths[2:], texts, strict=True):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def plot_losses(path: Path, log: list[dict]) -> None:
    """Plots the training and validation losses of the kernels' model and of the plain model over the tokens seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = [r["tokens"] for r in log]
    validated = [r for r in log if "validation_loss" in r]
    axes.plot(tokens, [r["plain_loss"] for r in log], color="tab:orange", linewidth=2.2, alpha=0.7, label="plain, training")
    axes.plot(tokens, [r["loss"] for r in log], color="tab:blue", linewidth=0.9, label="kernels, training")
    where = [r["tokens"] for r in validated]
    for key, color, marker, size in (
        ("plain_validation_loss", "tab:orange", "o", 9), ("validation_loss", "tab:blue", "x", 6),
    ):  # fmt: skip
        side = "plain" if key.startswith("plain") else "kernels"
        axes.plot(where, [r[key] for r in validated], marker, color=color, markersize=size, label=f"{side}, held out")
    axes.set(xlabel="tokens seen", ylabel="loss, nats per token", title="The same model on kernels and on plain operators")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _device_name(config: TrainConfig) -> str:
    if config.device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {config.threads} threads"
