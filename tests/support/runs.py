"""Small runs for the tests of training: a small model of two layers, documents of random tokens, one thread."""

import dataclasses

import numpy as np
import torch

from internlm2.config import ModelConfig
from internlm2.data import PackedBatches, TokenStore
from internlm2.training.config import DataConfig, OptimizerConfig, TrainConfig
from internlm2.training.display import RunDisplay
from internlm2.training.stages.pretrain import build_learner
from internlm2.training.trainer import Trainer

MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=48)


def small_config(out, **changes) -> TrainConfig:
    config = TrainConfig(
        model=MODEL,
        data=DataConfig(tokens_per_batch=96, max_seqlen=40),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=4),
        out=str(out),
        steps=20,
        checkpoint_every=5,
        validate_every=10,
        threads=1,
        compute_dtype="float32",
        operators="plain",
    )
    return dataclasses.replace(config, **changes)


def small_store(documents=30, seed=0) -> TokenStore:
    rng = np.random.default_rng(seed)
    return TokenStore.from_documents(rng.integers(0, 64, rng.integers(2, 90)) for _ in range(documents))


class Silent(RunDisplay):
    """A display that shows nothing and collects the warnings."""

    def __init__(self, total=0):
        super().__init__("test", total)
        self.warnings = []

    def update(self, step, text):
        pass

    def say(self, text):
        pass

    def warn(self, text):
        self.warnings.append(text)


def small_trainer(config, trainer_class=Trainer, **options) -> Trainer:
    batches = PackedBatches(small_store(), config.data.tokens_per_batch, config.data.max_seqlen, config.seed)
    held_out = PackedBatches(small_store(5, seed=1), config.data.tokens_per_batch, config.data.max_seqlen, None)
    return trainer_class(config, build_learner(config), batches, [next(held_out)], Silent(), **options)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.learner.model.named_parameters()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        # Compared as integers, so that a NaN equals itself and -0.0 differs from 0.0.
        assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), name


LOSSES = ("loss", "grad_norm", "lr", "validation_loss", "plain_loss", "plain_validation_loss", "tokens", "skipped")


def deterministic_part(log: list[dict]) -> list[dict]:
    """The records of a log without times and memory."""
    return [{k: r[k] for k in ("step", *LOSSES) if k in r} for r in log]
