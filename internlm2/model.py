"""InternLM2: a decoder of pre-norm blocks with grouped-query attention, rotary positions and SwiGLU (arXiv:2403.17297).

Everything is packed: the tokens [T] of all sequences end to end, and cu_seqlens int32 [sequences + 1], which starts at 0
and ends at T. A token attends only to tokens of its own sequence. Parameters carry the names of the released checkpoints.
Every operator that is not an embedding comes from `operators`.

Under torch.compile the checks and the computation of `Packing`, which read cu_seqlens on the host, run outside the graph;
everything after them is one graph, whatever the lengths of the sequences. Under torch.autocast the residual stream keeps the
dtype of the parameters, matrix products and attention run in the dtype of autocast, and losses, log-probabilities and rewards
are float32.

Sizes: T tokens, D hidden_size, H num_heads, G num_kv_heads, d head_dim, V vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import internlm2_kernels
from internlm2.config import ModelConfig

_TABLES_KEPT = 16  # rotary tables that a model keeps, for different numbers of rows
_LARGEST_TABLE = 1 << 22  # the most rows of a rotary table: 2 GiB at a head size of 128, far beyond any trained length


@dataclass(frozen=True)
class Operators:
    """The operators that a model calls, as single functions: a model that held the Python module they come from could not be
    pickled."""

    rms_norm: Callable
    swiglu: Callable
    rope_table: Callable
    qkv_rope: Callable
    flash_attention: Callable
    linear: Callable
    linear_cross_entropy: Callable

    @classmethod
    def of(cls, module: Any) -> "Operators":
        names = cls.__dataclass_fields__
        missing = [name for name in names if not hasattr(module, name)]
        if missing:
            raise TypeError(f"operators must offer {', '.join(names)}; {module!r} lacks {', '.join(missing)}")
        return cls(**{name: getattr(module, name) for name in names})


@dataclass(frozen=True)
class Packing:
    """What every block of the network needs to know about a batch.

    cu_seqlens, max_seqlen: where the sequences begin and end, and the length of the longest
    cos, sin:  rotary tables [rows, d/2]; token t takes row positions[t], or row t where positions is None
    """

    cu_seqlens: Tensor
    max_seqlen: int
    cos: Tensor
    sin: Tensor
    positions: Tensor | None


class Linear(nn.Module):
    """x @ weight^T. The weight [out, in] is rounded to x's dtype, so float32 parameters can compute in bfloat16."""

    def __init__(self, in_features: int, out_features: int, operators: Operators, **factory):
        super().__init__()
        self.op = operators.linear
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight)


class Embedding(nn.Module):
    """Rows of weight [V, D]. There is no padding index: the padding token shares its id with the end-of-sequence token, whose
    embedding must learn."""

    def __init__(self, config: ModelConfig, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **factory))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Norm(nn.Module):
    """RMSNorm with weight [D]. Returns (normalised x, x); called with a residual (normalised x + residual, x + residual)."""

    def __init__(self, config: ModelConfig, operators: Operators, **factory):
        super().__init__()
        self.eps, self.op = config.rms_norm_eps, operators.rms_norm
        self.weight = nn.Parameter(torch.empty(config.hidden_size, **factory))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (self.op(x, self.weight, self.eps), x) if residual is None else self.op(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """Causal attention within each sequence. The rows of wqkv form G groups, each of H/G query heads, a key head and a value
    head."""

    def __init__(self, config: ModelConfig, operators: Operators, **factory):
        super().__init__()
        self.heads = dict(num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
        self.rope, self.attend = operators.qkv_rope, operators.flash_attention
        self.wqkv = Linear(config.hidden_size, config.qkv_size, operators, **factory)
        self.wo = Linear(config.num_heads * config.head_dim, config.hidden_size, operators, **factory)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        q, k, v = self.rope(self.wqkv(x), packing.cos, packing.sin, packing.positions, **self.heads)
        out = self.attend(q, k, v, causal=True, cu_seqlens_q=packing.cu_seqlens, cu_seqlens_k=packing.cu_seqlens,
                          max_seqlen_q=packing.max_seqlen, max_seqlen_k=packing.max_seqlen)
        return self.wo(out.flatten(1))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): w1 is the gate, w3 the up projection."""

    def __init__(self, config: ModelConfig, operators: Operators, **factory):
        super().__init__()
        self.op = operators.swiglu
        self.w1 = Linear(config.hidden_size, config.intermediate_size, operators, **factory)
        self.w3 = Linear(config.hidden_size, config.intermediate_size, operators, **factory)
        self.w2 = Linear(config.intermediate_size, config.hidden_size, operators, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.op(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """One layer. It returns the output of its feed-forward and the residual stream as two tensors, because the next norm adds
    and normalises them in one pass."""

    def __init__(self, config: ModelConfig, operators: Operators, **factory):
        super().__init__()
        self.attention_norm = Norm(config, operators, **factory)
        self.attention = Attention(config, operators, **factory)
        self.ffn_norm = Norm(config, operators, **factory)
        self.feed_forward = FeedForward(config, operators, **factory)

    def forward(self, x: Tensor, residual: Tensor | None, packing: Packing) -> tuple[Tensor, Tensor]:
        y, residual = self.attention_norm(x, residual)
        y, residual = self.ffn_norm(self.attention(y, packing), residual)
        return self.feed_forward(y), residual


class Backbone(nn.Module):
    """Embedding, blocks and final norm: the module whose parameters have names that begin with `model.`."""

    def __init__(self, config: ModelConfig, operators: Operators, **factory):
        super().__init__()
        self.tok_embeddings = Embedding(config, **factory)
        self.layers = nn.ModuleList(Block(config, operators, **factory) for _ in range(config.num_layers))
        self.norm = Norm(config, operators, **factory)


class Decoder(nn.Module):
    """The network with a head of `outputs` rows. Users take one of its two subclasses: InternLM2, or RewardModel (reward.py).

    config:            sizes
    operators:         a module with rms_norm, swiglu, rope_table, qkv_rope, flash_attention, linear_cross_entropy;
                       default internlm2_kernels
    compute_dtype:     dtype of activations and matrix products; None: that of the parameters. Weights of norms are not cast
    device, dtype:     of the parameters; device "meta" allocates and initialises nothing
    seed:              of the initial weights: normal with standard deviation initializer_range, divided by sqrt(2 (i + 1))
                       for wo and w2 of layer i; 1 for norms. Equal seeds give equal weights on one kind of device
    checkpoint_layers: keep only each block's input for backward, and compute the rest of the block again there
    """

    head_name: str  # name of the head's module, which each subclass defines

    def __init__(
        self, config: ModelConfig, outputs: int, *, operators: Any = None,
        compute_dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32, seed: int = 0, checkpoint_layers: bool = False,
    ):  # fmt: skip
        super().__init__()
        _check_config(config)
        self.config, self.operators = config, Operators.of(internlm2_kernels if operators is None else operators)
        self.compute_dtype, self.checkpoint_layers = compute_dtype or dtype, checkpoint_layers
        if self.compute_dtype != dtype and (dtype != torch.float32 or self.compute_dtype == torch.float64):
            raise ValueError(f"compute_dtype must be dtype, or narrower than float32, got {compute_dtype} with {dtype}")
        self.model = Backbone(config, self.operators, device=device, dtype=dtype)
        self.add_module(self.head_name, Linear(config.hidden_size, outputs, self.operators, device=device, dtype=dtype))
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        if self.model.norm.weight.device.type != "meta":
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Draws all parameters anew, with the distributions that the docstring of Decoder gives under `seed`."""
        generator = torch.Generator(self.model.norm.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = self.config.initializer_range
            if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
                std /= math.sqrt(2 * (int(name.split(".")[2]) + 1))
            parameter.normal_(0.0, std, generator=generator)

    def hidden_states(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None) -> Tensor:
        """[T, D] after the final norm, in compute_dtype.

        tokens:     int64 or int32 [T], values in [0, V)
        cu_seqlens: int32 [sequences + 1]. On the CPU it costs no synchronisation; on another device it costs one
        positions:  int [T]; the default counts 0, 1, ... in every sequence. Positions on a GPU must be below
                    max_position_embeddings: they are not read back for a check
        Errors: TypeError, ValueError. Values of tensors are checked only where the tensors are on the CPU.
        """
        return self._hidden_states(tokens, self._packing(tokens, cu_seqlens, positions))

    def _hidden_states(self, tokens: Tensor, packing: Packing) -> Tensor:
        x, residual = self.model.tok_embeddings(tokens).to(self.compute_dtype), None
        for layer in self.model.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                x, residual = checkpoint(layer, x, residual, packing, use_reentrant=False, preserve_rng_state=False)
            else:
                x, residual = layer(x, residual, packing)
        return self.model.norm(x, residual)[0]

    @torch.compiler.disable
    def _packing(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None) -> Packing:
        """Checks the arguments of hidden_states and prepares what the blocks share.

        It is kept out of torch.compile: the lengths of sequences are numbers on the host, so that every batch with other
        lengths would need a new graph.
        """
        lengths, device = _check_packing(tokens, cu_seqlens, positions, self.config.vocab_size), tokens.device
        where = cu_seqlens.to(device, non_blocking=True), max(lengths, default=0)
        longest = self.config.max_position_embeddings
        if positions is None:
            counts = torch.tensor(lengths, dtype=torch.int32)
            starts = (counts.cumsum(0) - counts).to(torch.int32)
            positions = torch.arange(sum(lengths), dtype=torch.int32) - starts.repeat_interleave(counts)
            ends = lengths
        elif positions.device.type == "cpu":
            ends = [int(p.max()) + 1 if p.numel() else 0 for p in positions.split(lengths)]
            if max(ends, default=0) > _LARGEST_TABLE:
                raise ValueError(f"positions must be below {_LARGEST_TABLE}, got {max(ends) - 1}")
        else:
            ends = [longest] * len(lengths)
        dynamic = self.config.rope_scaling_type == "dynamic"
        if not dynamic or max(ends, default=0) <= longest:
            # The number of rows is rounded up to a power of two, so that a few tables serve all lengths.
            rows = 1 << (max(ends, default=1) - 1).bit_length() if ends else 1
            cos, sin = self._table(rows if not dynamic else min(rows, longest), device)
            return Packing(*where, cos, sin, positions.to(device, non_blocking=True))
        # Dynamic NTK scaling beyond the trained length: the base of each sequence depends on its own length only, and not on
        # the sequences that are packed with it.
        tables = [self._table(max(end, 1) if end > longest else longest, device) for end in ends]
        rows = [p.to(device, torch.int64, non_blocking=True) for p in positions.split(lengths)]
        cos, sin = (torch.cat([table[i][p] for table, p in zip(tables, rows, strict=True)]) for i in (0, 1))
        return Packing(*where, cos, sin, None)

    def _table(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [rows, d/2]. They are computed once for each number of rows, kept, and never changed."""
        key = (rows, device)
        if key not in self._tables:
            config, scaling = self.config, self.config.rope_scaling_at(rows)
            with torch.inference_mode(False):  # the table is kept, and a later training step may save it for its backward
                table = self.operators.rope_table(
                    rows, config.head_dim, base=config.rope_theta, scaling=scaling, angles=config.rope_angles
                )
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = tuple(t.to(device) for t in table)
        return self._tables[key]


class InternLM2(Decoder):
    """A causal language model. It takes the arguments of `Decoder` except `outputs`."""

    head_name = "output"

    def __init__(self, config: ModelConfig, **options: Any):
        _check_config(config)
        super().__init__(config, config.vocab_size, **options)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [T, V] in compute_dtype; arguments and errors as in hidden_states."""
        return self.output(self.hidden_states(tokens, cu_seqlens, positions))

    def loss(
        self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None, *,
        reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        """The cross-entropy in nats, float32 []. With the operators of internlm2_kernels the logits are never held in memory.

        labels:    int64 [T], the token that follows each token; -100 leaves the token out
        reduction: "mean" divides the sum by the number of labels that count (the loss is 0 if none does); "sum" does not
        """
        _check_labels(tokens, labels, self.config.vocab_size, reduction)
        hidden = self._hidden_states(tokens, self._packing(tokens, cu_seqlens, positions))
        head = self.output.weight.to(hidden.dtype)
        return self.operators.linear_cross_entropy(hidden, head, labels, ignore_index=-100, reduction=reduction)

    def logprobs(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None, *,
        temperature: float = 1.0, return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probability in nats, float32 [T], of targets int64 [T] after each token; with return_entropy also the entropy
        [T] of each prediction. The logits are never held in memory, neither in the forward nor in the backward.

        Every target must lie in [0, V). For a token without a target pass any id and ignore its result.
        """
        _check_targets(tokens, targets)
        hidden = self._hidden_states(tokens, self._packing(tokens, cu_seqlens, positions))
        return internlm2_kernels.linear_logprobs(hidden, self.output.weight.to(hidden.dtype), targets,
                                                 temperature=temperature, return_entropy=return_entropy)


def _check_config(config: Any) -> None:
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config must be a ModelConfig, got {type(config).__name__}")


@torch.compiler.disable
def _check_labels(tokens: Tensor, labels: Tensor, vocab_size: int, reduction: str) -> None:
    _check_integers("tokens", tokens)
    _check_integers("labels", labels, tokens.shape[0], (torch.int64,))
    if labels.device.type == "cpu":
        wrong = labels[((labels < 0) & (labels != -100)) | (labels >= vocab_size)]
        if wrong.numel():
            raise ValueError(f"labels must be -100 or in [0, {vocab_size}), got {int(wrong[0])}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")


@torch.compiler.disable
def _check_targets(tokens: Tensor, targets: Tensor) -> None:
    _check_integers("tokens", tokens)
    _check_integers("targets", targets, tokens.shape[0])


def _check_packing(tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None, vocab_size: int) -> list[int]:
    """Checks the arguments as far as that needs no values from a GPU. Returns the lengths of the sequences."""
    _check_integers("tokens", tokens)
    _check_integers("cu_seqlens", cu_seqlens, dtypes=(torch.int32,))
    total, bounds = tokens.shape[0], cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if not bounds or bounds[0] != 0 or bounds[-1] != total or any(n < 0 for n in lengths):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(f"cu_seqlens must start at 0, never fall and end at the number of tokens {total}, got {shown}")
    if tokens.device.type == "cpu" and total:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"tokens must lie in [0, vocab_size = {vocab_size}), got values from {low} to {high}")
    if positions is None:
        return lengths
    _check_integers("positions", positions, total)
    if positions.device.type == "cpu" and total and int(positions.min()) < 0:
        raise ValueError(f"positions must be 0 or more, got {int(positions.min())}")
    return lengths


def _check_integers(name: str, value: Any, length: int | None = None, dtypes: tuple = (torch.int64, torch.int32)) -> None:
    size = "one dimension" if length is None else f"shape [{length}]"
    expected = f"a tensor of {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} with {size}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if value.dtype not in dtypes or value.ndim != 1 or (length is not None and value.shape[0] != length):
        raise ValueError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')} {list(value.shape)}")
