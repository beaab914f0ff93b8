"""The demo: in a few minutes from text to a tokenizer to a trained model, compared with the same model on plain PyTorch.

    python -m internlm2 demo
    python -m internlm2 demo --device cuda --out runs/gpu --minutes 2

After a signal or a kill the same command continues the run. A finished run in the folder is renamed, never overwritten.
"""

import dataclasses
import itertools
import time
from pathlib import Path

import torch
from rich.console import Console

from internlm2.config import load_config
from internlm2.demo.lengths import LENGTHS, measure_lengths
from internlm2.demo.paired import PairedTrainer, probe
from internlm2.demo.report import StepCost, markdown, summarize, write_report
from internlm2.model import InternLM2
from internlm2.tokenizer import Tokenizer
from internlm2.training.config import TrainConfig
from internlm2.training.display import RunDisplay
from internlm2.training.metrics import read_log
from internlm2.training.runfolder import RunLock, resolve_config, resolve_machine, saved_config
from internlm2.training.stages.pretrain import RECIPES, Corpus, build_batches, build_learner, describe, prepare_corpus
from internlm2.training.trainer import exit_status

RECIPE = RECIPES / "demo.toml"
FINISHED = "comparison.json"
MIN_STEPS = 30
# Overrides of the recipe. `steps` is an upper bound, about one pass over the corpus; a GPU needs larger batches to be busy.
FOR_DEVICE = {"cpu": ("steps=600",), "cuda": ("steps=300", "data.tokens_per_batch=8192")}
# The report takes about REPORT_S seconds. Of the time without the report and LENGTHS_S, training steps are planned to take
# SHARE_FOR_STEPS; checkpoints, validation and steps slower than the timed ones need the remainder.
SHARE_FOR_STEPS, REPORT_S = 0.88, 12.0
LENGTHS_S = 20.0  # seconds for the last part, which measures tokens/s at several context lengths (lengths.py)
PROMPT = 'def read_lines(path):\n    """'
SAMPLE_TOKENS, TEMPERATURE = 200, 0.7


def demo(device: str = "cpu", out: str = "runs/demo", minutes: float = 3.4) -> int:
    """Runs the demo and returns the exit status.

    device:  "cpu" or "cuda"
    out:     folder of the run
    minutes: time for everything. A few timed steps decide how many steps fit, at least 30
    """
    if minutes <= 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    started = time.perf_counter()
    folder = Path(out)
    if (folder / FINISHED).exists():
        print(f"the finished run in {folder} is now {_move_aside(folder)}")
    with RunLock(folder):
        return _demo(device, folder, started + 60 * minutes, Console())


def _demo(device: str, folder: Path, deadline: float, console: Console) -> int:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    saved = saved_config(folder)
    config = resolve_machine(saved or load_config(TrainConfig, RECIPE, [f"device={device}", *FOR_DEVICE[device]]))
    config = dataclasses.replace(config, out=str(folder))
    torch.set_num_threads(config.threads)
    with console.status("preparing text and tokenizer"):
        corpus = prepare_corpus(config, say)
    with console.status("timing a few steps"):
        times, cost = _probe_both(config, corpus)
    if saved is None:
        config = _fit_into(config, deadline - time.perf_counter(), sum(times))
    config = resolve_config(config)
    say(describe(config))

    learner, plain = build_learner(config), build_learner(config, operators="plain")
    display = RunDisplay(PairedTrainer.title, config.steps, console)
    trainer = PairedTrainer(config, learner, *build_batches(config, corpus), display, plain=plain)
    if trainer.resume():
        say(f"continuing at step {trainer.step} of {config.steps}")
    result = trainer.fit(deadline - REPORT_S - LENGTHS_S, at_least=MIN_STEPS)
    if result.stopped_by is None:
        log = read_log(folder / "log.jsonl")
        with console.status("timing context lengths") as status:
            lengths = measure_lengths(learner.model, plain.model, LENGTHS, LENGTHS_S, status.update)
        summary = summarize(config, log, cost) | {"lengths": lengths}
        paths = write_report(folder, summary, log, sample_text(learner.model, corpus.tokenizer, PROMPT))
        say("\n" + markdown(summary))
        say("written: " + "  ".join(map(str, paths)))
    return exit_status(result)


def _probe_both(config: TrainConfig, corpus: Corpus) -> tuple[list[float], StepCost]:
    """([seconds of a step with the kernels, with plain operators], memory that a step needs), measured on new models, which are
    discarded afterwards."""
    times, bytes_ = [], []
    for operators in ("kernels", "plain"):
        stream, _ = build_batches(config, corpus)
        batches = [b.to(config.device) for b in itertools.islice(stream, config.accumulation)]
        learner = build_learner(config, operators=operators)
        seconds, needed = probe(learner, batches, config.optimizer.lr, torch.device(config.device))
        times.append(seconds)
        bytes_.append(needed)
        del learner
    return times, StepCost(*bytes_)


def _fit_into(config: TrainConfig, seconds: float, step_s: float) -> TrainConfig:
    """The configuration with as many steps as fit into the time, and a warm-up in proportion to them."""
    steps = int((seconds - REPORT_S - LENGTHS_S) * SHARE_FOR_STEPS / step_s)
    steps = min(max(steps, MIN_STEPS), config.steps)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=max(5, steps // 5))
    return dataclasses.replace(config, steps=steps, optimizer=optimizer)


@torch.no_grad()
def sample_text(model: InternLM2, tokenizer: Tokenizer, prompt: str, count: int = SAMPLE_TOKENS, seed: int = 0) -> str:
    """The prompt and the model's continuation: `count` tokens drawn at temperature 0.7, or fewer where it writes </s>."""
    device = model.output.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt, bos=True)
    start = len(ids)
    for _ in range(count):
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        last = model.hidden_states(torch.tensor(ids, device=device), cu_seqlens)[-1:]
        probabilities = torch.softmax(model.output(last)[0].float().cpu() / TEMPERATURE, dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if ids[-1] == tokenizer.eos_id:
            break
    return prompt + tokenizer.decode(ids[start:], skip_special=True) + "\n"


def _move_aside(folder: Path) -> Path:
    """Renames a finished run to FOLDER-N with the first free N."""
    target = next(p for n in itertools.count(1) if not (p := folder.with_name(f"{folder.name}-{n}")).exists())
    return folder.rename(target)
