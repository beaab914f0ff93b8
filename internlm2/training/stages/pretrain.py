"""Pre-training: from text to a language model.

    python -m internlm2 train internlm2/recipes/tiny.toml
    python -m internlm2 train internlm2/recipes/tiny.toml out=runs/mine data.source=my_texts/ optimizer.lr=1e-3

A run that was stopped continues when it is started again with the same folder.
"""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import internlm2.plain
import internlm2_kernels
from internlm2.data import PackedBatch, PackedBatches, TokenStore, read_documents, split_validation
from internlm2.model import InternLM2
from internlm2.storage import atomic_directory, verify_manifest
from internlm2.tokenizer import Tokenizer, train_bpe
from internlm2.training.config import TrainConfig
from internlm2.training.learner import Learner
from internlm2.training.runfolder import RunLock, resolve_config
from internlm2.training.trainer import FitResult, Trainer

RECIPES = Path(internlm2.__file__).parent / "recipes"
TOKENIZER_CHARACTERS = 3_000_000
OPERATORS = {"kernels": internlm2_kernels, "plain": internlm2.plain}


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, and the training and validation documents as ids of this tokenizer."""

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore


def prepare_corpus(config: TrainConfig, say: Callable[[str], None] = print) -> Corpus:
    """Reads and tokenizes the corpus into OUT/data, or opens that folder where an earlier start of the run has written it.

    The folder appears complete or not at all, with a sha256 manifest. A continued run uses it again, so the source may
    change in the meantime. Errors: ValueError for a bad source, CheckpointError for a damaged folder.
    """
    folder = Path(config.out) / "data"
    if not folder.exists():
        documents = read_documents(config.data.source, config.data.max_bytes)
        train, validation = split_validation(documents, config.data.validation_fraction)
        say(f"corpus: {len(train)} documents to train on, {len(validation)} held out, from {config.data.source}")
        with atomic_directory(folder) as temporary:
            tokenizer = _make_tokenizer(config, [d.text for d in train], temporary / "tokenizer.model", say)
            for name, part in (("train", train), ("validation", validation)):
                ids = (tokenizer.encode(d.text, bos=True, eos=True) for d in part)
                TokenStore.from_documents(ids).save(temporary, name)
    verify_manifest(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    corpus = Corpus(tokenizer, TokenStore.load(folder, "train"), TokenStore.load(folder, "validation"))
    say(f"tokens: {len(corpus.train.tokens):,} to train on, {len(corpus.validation.tokens):,} held out")
    return corpus


def _make_tokenizer(config: TrainConfig, texts: list[str], path: Path, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer of the run, written to `path`: trained on the texts, or a copy of the file that the configuration names."""
    vocab_size = config.model.vocab_size
    if not config.data.tokenizer:
        # A part of the texts is enough to train on: the pieces of a small vocabulary are frequent in any part.
        sample, size = [], 0
        for text in texts:
            sample.append(text)
            size += len(text)
            if size > TOKENIZER_CHARACTERS:
                break
        say(f"tokenizer: byte pairs, {vocab_size} pieces, from {size / 1e6:.1f} M characters")
        return train_bpe(sample, vocab_size, path, threads=config.threads)
    tokenizer = Tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size} ({config.data.tokenizer}), "
            f"got {vocab_size}"
        )
    shutil.copyfile(config.data.tokenizer, path)
    return tokenizer


def build_learner(config: TrainConfig, *, operators: str | None = None, seed: int | None = None) -> Learner:
    """A new model of config.model with its optimizer; operators and seed override those of the configuration."""
    model = InternLM2(
        config.model,
        operators=OPERATORS[operators or config.operators],
        compute_dtype=getattr(torch, config.compute_dtype),
        device=config.device,
        seed=config.seed if seed is None else seed,
    )
    return Learner(model, config.optimizer, plain=(operators or config.operators) == "plain")


def build_batches(config: TrainConfig, corpus: Corpus) -> tuple[PackedBatches, list[PackedBatch]]:
    """The training stream, and the validation batches, which are the same at every validation and come from all held-out
    documents."""
    sizes = config.data.tokens_per_batch, config.data.max_seqlen
    held_out = PackedBatches(corpus.validation, *sizes, seed=0)
    # At most one pass, so that no held-out token counts twice.
    count = min(config.validation_batches, max(1, len(corpus.validation.tokens) // config.data.tokens_per_batch))
    return PackedBatches(corpus.train, *sizes, seed=config.seed), list(itertools.islice(held_out, count))


def run(config: TrainConfig, say: Callable[[str], None] = print) -> FitResult:
    """Runs the training in config.out to its end, from the start or from its newest checkpoint."""
    with RunLock(Path(config.out)):
        config = resolve_config(config)
        torch.set_num_threads(config.threads)
        corpus = prepare_corpus(config, say)
        trainer = Trainer(config, build_learner(config), *build_batches(config, corpus))
        say(describe(config))
        if trainer.resume():
            say(f"continuing at step {trainer.step} of {config.steps}")
        return trainer.fit()


def describe(config: TrainConfig) -> str:
    """One line that says which model is trained, how, and where."""
    where = f"cpu, {config.threads} threads" if config.device == "cpu" else torch.cuda.get_device_name()
    tokens = config.data.tokens_per_batch * config.accumulation
    return (
        f"model: {config.model.num_parameters / 1e6:.1f} M parameters, float32, computing in {config.compute_dtype} with "
        f"{config.operators}; {config.steps} steps of {tokens:,} tokens on {where}; in {config.out}"
    )
