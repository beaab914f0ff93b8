"""TrainConfig: everything that a training run depends on; read from TOML (recipes/) with overrides, and saved with the run."""

import math
from dataclasses import dataclass, field
from typing import Literal

from internlm2.config import ModelConfig


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from, and how it is divided into sequences and batches.

    source:              "stdlib" (the source of Python's standard library), a text or JSON-lines file, or a folder of them
    max_bytes:           documents are read up to this many bytes of UTF-8
    validation_fraction: share of the documents that is held out for validation; which ones depends on their names alone
    tokenizer:           a SentencePiece model file; empty trains a byte-pair tokenizer of model.vocab_size on the source
    tokens_per_batch:    tokens of one forward and backward pass; an optimizer step takes `accumulation` such batches
    max_seqlen:          longer documents are cut into pieces of this many tokens
    """

    source: str = "stdlib"
    max_bytes: int = 8_000_000
    validation_fraction: float = 0.02
    tokenizer: str = ""
    tokens_per_batch: int = 2048
    max_seqlen: int = 1024

    def __post_init__(self):
        _require(self.max_bytes > 0, "data.max_bytes", "positive", self.max_bytes)
        _require(0 < self.validation_fraction < 1, "data.validation_fraction", "in (0, 1)", self.validation_fraction)
        _require(self.tokens_per_batch > 0, "data.tokens_per_batch", "positive", self.tokens_per_batch)
        _require(self.max_seqlen > 0, "data.max_seqlen", "positive", self.max_seqlen)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; the defaults of betas, eps, weight_decay and floor_ratio are those of
    arXiv:2403.17297 section 3.2.2.

    lr:            peak learning rate
    floor_ratio:   the cosine ends at lr * floor_ratio
    warmup_steps:  steps over which the learning rate rises linearly to lr
    max_grad_norm: gradients are scaled down where their global norm exceeds it; 0 never scales
    """

    lr: float = 3e-4
    floor_ratio: float = 0.1
    warmup_steps: int = 10
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self):
        for name in ("lr", "eps"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), f"optimizer.{name}", "positive", value)
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", "in [0, 1)", getattr(self, name))
        _require(0 <= self.floor_ratio <= 1, "optimizer.floor_ratio", "in [0, 1]", self.floor_ratio)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", "0 or more", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    out:                folder of the run; a stopped run continues when it is started again with the same folder
    steps:              optimizer steps
    accumulation:       packed batches per optimizer step; their losses are weighted by their number of targets
    seed:               of the initial weights and the order of documents
    device:             "cpu" or "cuda"
    threads:            CPU threads; 0 takes as many as this process may use. The saved configuration holds the number that was
                        taken, because with another number matrix products may sum in another order
    compute_dtype:      "bfloat16" or "float32"; parameters, gradients and optimizer state are float32
    operators:          "kernels" (internlm2_kernels) or "plain" (PyTorch eager operators)
    checkpoint_every:   steps between checkpoints; one is also written at the end and on SIGTERM or SIGINT
    keep_checkpoints:   how many of the newest checkpoints are kept
    validate_every:     steps between validations; 0 validates at the end only
    validation_batches: packed batches in one validation
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    out: str = "runs/train"
    steps: int = 100
    accumulation: int = 1
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    operators: Literal["kernels", "plain"] = "kernels"
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    validate_every: int = 25
    validation_batches: int = 4

    def __post_init__(self):
        for name in ("steps", "accumulation", "checkpoint_every", "keep_checkpoints", "validation_batches"):
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("seed", "threads", "validate_every"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(bool(self.out), "out", "a folder", self.out)
        _require(
            self.data.max_seqlen <= self.model.max_position_embeddings, "data.max_seqlen",
            f"at most model.max_position_embeddings = {self.model.max_position_embeddings}", self.data.max_seqlen,
        )  # fmt: skip
