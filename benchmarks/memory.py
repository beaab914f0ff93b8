"""`python -m benchmarks.memory`: peak memory of the linear cross-entropy, forward and backward, over the number of tokens.

Each form runs once in a fresh process; its peak is the largest resident size (VmHWM) while it runs, beyond what was
resident with the inputs in memory. The result is recorded as JSON and PNG in benchmarks/results/<device>/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m benchmarks.memory                              2k, 8k and 32k tokens at D = 2048, V = 92,544, bfloat16
  python -m benchmarks.memory --tokens 512 1024 --vocab 8000 --out build/memory
exit status: 0 done, 2 cannot run here"""
TOKENS, COLS, VOCAB = (2048, 8192, 32768), 2048, 92544
SAFE = 0.8  # a form that is expected to need a larger share of the free memory is left out
LIMIT = 300  # seconds after which the run of one form at one size is ended and left out


def forms() -> dict:
    import torch.nn.functional as F

    from internlm2_kernels import linear_cross_entropy

    found = {"ours": linear_cross_entropy,
             "F.cross_entropy(F.linear.float())": lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y),
             "F.cross_entropy(F.linear)": lambda h, w, y: F.cross_entropy(F.linear(h, w), y)}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    if hasattr(__import__("torch").nn, "LinearCrossEntropyOptions"):
        from torch.nn import LinearCrossEntropyOptions

        found["F.linear_cross_entropy chunked"] = lambda h, w, y: F.linear_cross_entropy(
            h, w, y, options=LinearCrossEntropyOptions())
    return found


def one(form: str, tokens: int, cols: int, vocab: int) -> dict:
    """Run one form in this process and return its row: the peak memory beyond the inputs, and the part of it that any form
    needs in any case (the gradients, and for ours the float32 accumulator)."""
    import time

    import torch

    from internlm2.training.metrics import memory_in_use, reset_peak_memory

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, cols, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, cols, generator=generator) * cols**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    function = forms()[form]
    few = [x[:8].detach().requires_grad_() for x in (hidden, weight)]
    function(*few, labels[:8] % 8).backward()  # libraries load and allocate at their first use
    device = torch.device("cpu")
    if not reset_peak_memory(device):
        raise SystemExit("memory: this system does not let a process reset its peak (/proc/self/clear_refs)")
    held = memory_in_use(device)[0]
    start = time.perf_counter()
    loss = function(hidden, weight, labels)
    loss.backward()
    seconds = time.perf_counter() - start
    gradients = 2 * (hidden.numel() + weight.numel())
    accumulator = 4 * weight.numel() if form == "ours" else 0
    peak = memory_in_use(device)[1] - held
    return {"form": form, "tokens": tokens, "seconds": round(seconds, 2), "loss": float(loss.detach()),
            "peak_bytes": peak, "gradient_bytes": gradients,
            "accumulator_bytes": accumulator, "extra_bytes": max(0, peak - gradients - accumulator)}


def available() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def expected(done: list[dict], form: str, tokens: int) -> float:
    """The peak in bytes to expect of a form at `tokens`, in proportion to its last measured size. 0 where the form was not
    measured yet, and for ours, whose memory does not grow with the logits."""
    before = [row for row in done if row["form"] == form]
    return before[-1]["peak_bytes"] * tokens / before[-1]["tokens"] if before and form != "ours" else 0


def measure(form: str, tokens: int, args: argparse.Namespace, rows: list[dict], left_out: list[dict]) -> tuple:
    """One form at one size in a fresh process: (its row, "") or (None, the reason why there is none)."""
    if form in args.skip:
        return None, "not run"
    if any(entry["form"] == form for entry in left_out):
        return None, "left out with fewer tokens"
    if expected(rows, form, tokens) > SAFE * available():
        return None, f"expected beyond {SAFE:.0%} of the free memory"
    command = [sys.executable, "-m", "benchmarks.memory", "--one", form, "--tokens", str(tokens),
               "--cols", str(args.cols), "--vocab", str(args.vocab)]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return None, f"took longer than {args.limit} s"
    if done.returncode:
        return None, f"failed: {done.stderr.strip().splitlines()[-1]}"
    return json.loads(done.stdout.splitlines()[-1]), ""


def plot(rows: list[dict], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for form in dict.fromkeys(row["form"] for row in rows):
        points = [(row["tokens"], row["extra_bytes"] / 2**30) for row in rows if row["form"] == form]
        axes.plot(*zip(*points, strict=True), marker="o", label=form, linewidth=2.2 if form == "ours" else 1.2)
    axes.set(xscale="log", yscale="log", xlabel="tokens",
             ylabel="GiB beyond inputs, gradients\nand one float32 accumulator")
    ticks = sorted({row["tokens"] for row in rows})
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.grid(color="#dddddd")
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left", wrap=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__, epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    p.add_argument("--cols", type=int, default=COLS)
    p.add_argument("--vocab", type=int, default=VOCAB)
    p.add_argument("--out", type=Path, help="folder for the record (default: benchmarks/results/<device>)")
    p.add_argument("--limit", type=int, default=LIMIT, help="seconds for one form at one size (default: %(default)s)")
    p.add_argument("--skip", action="append", default=[], metavar="FORM", help="leave this form out (repeatable)")
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if sys.platform != "linux":
        p.error("peak memory is read from /proc: Linux only")
    if args.one:
        print(json.dumps(one(args.one, args.tokens[0], args.cols, args.vocab)))
        return 0
    import torch
    from rich.console import Console

    from . import record

    console, rows, left_out = Console(), [], []
    info = record.machine(torch.device("cpu"))
    for tokens in args.tokens:
        for form in forms():
            label = f"{tokens:>7} tokens  {form:<36}"
            with console.status(label):
                row, why = measure(form, tokens, args, rows, left_out)
            if why:
                left_out.append({"form": form, "tokens": tokens, "why": why})
                console.print(f"{label} left out: {why}", markup=False, soft_wrap=True)
                continue
            rows.append(row)
            console.print(f"{label} {row['seconds']:6.1f} s, peak {row['peak_bytes'] / 2**30:6.2f} GiB, beyond gradients and "
                          f"accumulator: {row['extra_bytes'] / 2**30:6.3f} GiB", highlight=False, soft_wrap=True)
    folder = (args.out or record.RESULTS / info["node"]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    commit = record.commit()
    head = {"machine_info": info, "commit_info": commit, "cols": args.cols, "vocab": args.vocab, "dtype": "bfloat16"}
    path = folder / "memory_linear_cross_entropy.json"
    path.write_text(json.dumps(head | {"rows": rows, "left_out": left_out}, indent=1) + "\n")
    plot(rows, path.with_suffix(".png"), f"Linear cross-entropy, forward and backward, D = {args.cols}, V = {args.vocab:,}, "
         f"bfloat16; {info['device']}, torch {info['torch']}, commit {commit['id'][:7]}")
    console.print(f"{path} (.png)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
