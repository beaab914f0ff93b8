"""Learner: a model with its AdamW optimizer, which takes optimizer steps over packed batches and saves its state by name."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from internlm2.data import PackedBatch
from internlm2.training.config import OptimizerConfig
from internlm2_kernels import FusedAdamW

Loss = Callable[[torch.nn.Module, PackedBatch], torch.Tensor]


def next_token_loss(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Mean cross-entropy in nats over the targets of a packed batch: the loss of pre-training."""
    return model.loss(batch.tokens, batch.labels, batch.cu_seqlens)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step: the mean loss over all targets, the gradient norm before clipping, and whether the
    update was skipped because a gradient was not finite or there was no target."""

    loss: float
    grad_norm: float
    skipped: bool


class Learner:
    """A model, its optimizer and the loss that it minimises.

    The optimizer is AdamW (arXiv:1711.05101) with float32 moments: `FusedAdamW`, or with plain=True, for comparison, that of
    PyTorch. Weight decay applies to all matrices, also the embedding and the output head, but not to the weights of norms,
    because the layer after a norm cannot compensate for a weight that decay has shrunk.
    """

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig, loss: Loss = next_token_loss, *,
                 plain: bool = False):
        self.model, self.config, self.loss = model, config, loss
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = [p for p in self._named.values() if p.ndim >= 2]
        others = [p for p in self._named.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups, options = [g for g in groups if g["params"]], {"betas": (config.beta1, config.beta2), "eps": config.eps}
        self.plain, max_norm = plain, config.max_grad_norm or None
        self.optimizer = (torch.optim.AdamW(groups, lr=config.lr, fused=True, **options) if plain else
                          FusedAdamW(groups, lr=config.lr, max_grad_norm=max_norm, **options))

    def step(self, batches: Sequence[PackedBatch], lr: float) -> StepResult:
        """One update from one or more packed batches. Each is weighted by its number of targets, as if they were one batch.

        A gradient whose norm is not finite changes neither weights nor moments.
        """
        targets = [b.num_targets for b in batches]
        total = sum(targets)
        if total == 0:
            return StepResult(0.0, 0.0, skipped=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = 0.0
        for batch, count in zip(batches, targets, strict=True):
            if count:
                loss = self.loss(self.model, batch) * (count / total)
                loss.backward()
                loss_sum += float(loss.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = self._update()
        return StepResult(loss_sum, grad_norm, skipped=not math.isfinite(grad_norm))

    def _update(self) -> float:
        """Clips the gradients and updates the weights, unless the gradient norm is not finite. Returns that norm."""
        if not self.plain:
            self.optimizer.step()
            return float(self.optimizer.grad_norm)
        max_norm = self.config.max_grad_norm or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._named.values(), max_norm))
        if math.isfinite(grad_norm):
            self.optimizer.step()
        return grad_norm

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> float:
        """Mean loss over the targets of all batches. It changes neither parameters nor optimizer state."""
        targets = [b.num_targets for b in batches]
        losses = (float(self.loss(self.model, b)) * n for b, n in zip(batches, targets, strict=True) if n)
        return sum(losses) / max(1, sum(targets))

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state under the names `PARAMETER.exp_avg`, `.exp_avg_sq`, `.step`; empty before the first step."""
        state = self.optimizer.state
        return {f"{name}.{key}": value for name, p in self._named.items() for key, value in state.get(p, {}).items()}

    def load_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores what optimizer_tensors returned. ValueError where names or shapes are not this model's."""
        by_parameter: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            name, _, field = key.rpartition(".")
            if name not in self._named:
                raise ValueError(f"optimizer state {key!r} belongs to no parameter of this model")
            by_parameter.setdefault(name, {})[field] = value
        if by_parameter and set(by_parameter) != set(self._named):
            missing = sorted(set(self._named) - set(by_parameter))
            raise ValueError(f"optimizer state must cover every parameter, got none for {missing}")
        expected = {"step", "exp_avg", "exp_avg_sq"}  # a parameter that is not float32 also has a master copy
        for name, fields in by_parameter.items():
            shape = self._named[name].shape
            if set(fields) - {"master"} != expected or any(fields[k].shape != shape for k in set(fields) - {"step"}):
                got = {k: list(v.shape) for k, v in fields.items()}
                raise ValueError(f"optimizer state of {name!r} must be {sorted(expected)} of {list(shape)}, got {got}")
        saved = self.optimizer.state_dict()
        index = {name: i for i, name in enumerate(self._names_in_group_order())}
        # The tensors are copied: those of a memory-mapped file would keep the file open, and may be badly aligned.
        saved["state"] = {index[n]: {k: v.clone() for k, v in f.items()} for n, f in by_parameter.items()}
        self.optimizer.load_state_dict(saved)

    def _names_in_group_order(self) -> list[str]:
        names = {id(p): name for name, p in self._named.items()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
