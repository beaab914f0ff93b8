"""Tokens per second at several context lengths, of the same model with the kernels and with plain PyTorch operators."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from internlm2.model import InternLM2

LENGTHS = (1024, 4096, 16384)
LEAST_PAIRS, MOST_PAIRS = 2, 9


@torch.no_grad()
def measure_lengths(
    kernels: InternLM2, plain: InternLM2, lengths: Sequence[int] = LENGTHS, seconds: float = 20.0,
    show: Callable[[str], None] = lambda text: None,
) -> list[dict]:  # fmt: skip
    """Times the forward pass (without logits) over one sequence of each length. The model with the kernels and the plain model
    are measured in turns, so that a machine whose speed drifts favours neither.

    seconds: for all lengths together; each length gets at least two and at most nine pairs of runs
    Returns, for each length, the median tokens/s of both sides and the median of the paired ratios.
    """
    rows = []
    device = kernels.output.weight.device
    for index, length in enumerate(lengths):
        show(f"context length {length:,}")
        tokens = torch.arange(length, device=device) % kernels.config.vocab_size
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        end = time.perf_counter() + seconds / len(lengths)
        pairs: list[tuple[float, float]] = []
        for model in (kernels, plain):
            model.hidden_states(tokens[:64], torch.tensor([0, 64], dtype=torch.int32))
        while len(pairs) < LEAST_PAIRS or (len(pairs) < MOST_PAIRS and time.perf_counter() < end):
            order = (kernels, plain) if (len(pairs) + index) % 2 == 0 else (plain, kernels)
            times = {id(model): _seconds(model, tokens, cu_seqlens, device) for model in order}
            pairs.append((times[id(kernels)], times[id(plain)]))
        rows.append({
            "length": length,
            "kernels_tokens_per_s": length / statistics.median(ours for ours, _ in pairs),
            "plain_tokens_per_s": length / statistics.median(theirs for _, theirs in pairs),
            "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
            "pairs": len(pairs),
        })
    return rows


def _seconds(model: InternLM2, tokens: torch.Tensor, cu_seqlens: torch.Tensor, device: torch.device) -> float:
    started = time.perf_counter()
    model.hidden_states(tokens, cu_seqlens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def lengths_table(rows: list[dict]) -> str:
    lines = ["| context length | kernels, tokens/s | plain, tokens/s | ratio |", "|---|---|---|---|"]
    lines += [f"| {r['length']:,} | {r['kernels_tokens_per_s']:,.0f} | {r['plain_tokens_per_s']:,.0f} | {r['ratio']:.2f}x |"
              for r in rows]
    return "\n".join(lines) + "\n"


def plot_lengths(path: Path, rows: list[dict]) -> None:
    """Plots the tokens/s of the kernels and of the plain operators over the context length, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    where = [r["length"] for r in rows]
    for side, color, marker in (("plain", "tab:orange", "o"), ("kernels", "tab:blue", "x")):
        axes.plot(where, [r[f"{side}_tokens_per_s"] for r in rows], color=color, marker=marker, label=side)
    for r in rows:
        axes.annotate(f"{r['ratio']:.1f}x", (r["length"], r["kernels_tokens_per_s"]), textcoords="offset points",
                      xytext=(4, 7), color="tab:blue")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(where, [f"{n // 1024}k" for n in where])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set(xlabel="context length, tokens", ylabel="tokens/s, forward pass",
             title="Reading one sequence: kernels and plain operators")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)
