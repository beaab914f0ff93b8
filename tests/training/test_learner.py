"""One optimizer step: accumulation, weight decay, clipping, gradients that are not finite, optimizer state by name."""

import dataclasses
import math

import pytest
import torch
from runs import assert_same_bits, small_config, small_store

from internlm2.data import IGNORE_INDEX, PackedBatch, PackedBatches
from internlm2.training.config import OptimizerConfig
from internlm2.training.learner import Learner
from internlm2.training.stages.pretrain import build_learner


@pytest.fixture(params=("plain", "kernels"))
def operators(request):
    """Each test runs with PyTorch's operators and AdamW, and with the kernels and FusedAdamW."""
    return request.param


def batches(tokens=64, count=1, seed=0):
    stream = PackedBatches(small_store(), tokens, 40, seed)
    return [next(stream) for _ in range(count)]


def parameters(learner):
    return {n: p.detach().clone() for n, p in learner.model.named_parameters()}


def join(parts: list[PackedBatch]) -> PackedBatch:
    ends, total = [0], 0
    for part in parts:
        ends += [total + e for e in part.cu_seqlens.tolist()[1:]]
        total += part.num_tokens
    fields = (torch.cat([getattr(p, f) for p in parts]) for f in ("tokens", "labels", "positions"))
    return PackedBatch(*fields, torch.tensor(ends, dtype=torch.int32))


def test_accumulation_is_one_large_batch(tmp_path, operators):
    """Gradients accumulated over several batches give the step of one large batch, also where the batches have different
    numbers of targets, and one of them has none."""
    parts = batches(count=3)
    parts[1].labels[5:50] = IGNORE_INDEX
    parts[2].labels[:] = IGNORE_INDEX
    one, other = (build_learner(small_config(tmp_path, operators=operators)) for _ in range(2))
    a, b = one.step(parts, 1e-2), other.step([join(parts)], 1e-2)
    assert a.loss == pytest.approx(b.loss, rel=1e-6) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for (name, p), q in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_weight_decay_leaves_norms_alone(tmp_path, operators):
    config = small_config(tmp_path, operators=operators, optimizer=OptimizerConfig(weight_decay=0.5))
    learner = build_learner(config)
    before = parameters(learner)
    learner.loss = lambda model, batch: sum((p * 0).sum() for p in model.parameters())  # gradients of 0: only decay acts
    learner.step(batches(), lr=0.1)
    for name, p in learner.model.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0, msg=name)


def test_clipping_bounds_the_gradient(tmp_path):
    def gradient(max_norm):
        config = small_config(tmp_path, optimizer=OptimizerConfig(max_grad_norm=max_norm))
        learner = build_learner(config)
        result = learner.step(batches(), 1e-2)
        return result.grad_norm, math.sqrt(sum(float(p.grad.square().sum()) for p in learner.model.parameters()))

    free, left_free = gradient(0.0)
    clipped, left_clipped = gradient(free / 3)
    assert left_free == pytest.approx(free, rel=1e-5) and clipped == free  # what is reported is the norm before clipping
    assert left_clipped == pytest.approx(free / 3, rel=1e-4)


def test_both_optimizers_take_the_same_steps(tmp_path):
    """FusedAdamW, which clips by itself, changes the weights as clip_grad_norm_ followed by PyTorch's AdamW does."""
    config = small_config(tmp_path, optimizer=OptimizerConfig(max_grad_norm=0.3, eps=1e-3))
    theirs, ours = build_learner(config), build_learner(config)
    ours = Learner(ours.model, config.optimizer)
    for seed in range(5):
        a, b = (learner.step(batches(seed=seed), 1e-2) for learner in (theirs, ours))
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4) and a.grad_norm > 0.3
    for (name, p), q in zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, poison, operators):
    learner = build_learner(small_config(tmp_path, operators=operators))
    learner.step(batches(), 1e-2)
    before, moments = parameters(learner), {k: v.clone() for k, v in learner.optimizer_tensors().items()}
    sound = learner.loss
    learner.loss = lambda model, batch: sound(model, batch) * poison
    assert learner.step(batches(), 1e-2).skipped
    assert_same_bits(parameters(learner), before)
    assert_same_bits(learner.optimizer_tensors(), moments)
    learner.loss = sound
    assert not learner.step(batches(), 1e-2).skipped


def test_no_target_is_no_step(tmp_path, operators):
    learner, (batch,) = build_learner(small_config(tmp_path, operators=operators)), batches()
    batch.labels[:] = IGNORE_INDEX
    before = parameters(learner)
    assert learner.step([batch], 1e-2).skipped
    assert_same_bits(parameters(learner), before)


def test_optimizer_state_by_name(tmp_path, operators):
    one = build_learner(small_config(tmp_path, operators=operators))
    assert one.optimizer_tensors() == {}
    one.step(batches(), 1e-2)
    tensors = one.optimizer_tensors()
    assert len(tensors) == 3 * len(parameters(one)) and "model.norm.weight.exp_avg_sq" in tensors
    other = build_learner(small_config(tmp_path, operators=operators))
    other.model.load_state_dict(one.model.state_dict())
    other.load_optimizer_tensors(tensors)
    for learner in (one, other):
        learner.step(batches(seed=1), 1e-2)
    assert_same_bits(parameters(one), parameters(other))


def test_foreign_optimizer_state_is_refused(tmp_path, operators):
    learner = build_learner(small_config(tmp_path, operators=operators))
    learner.step(batches(), 1e-2)
    tensors = learner.optimizer_tensors()
    with pytest.raises(ValueError, match="'stranger.exp_avg' belongs to no parameter"):
        learner.load_optimizer_tensors(tensors | {"stranger.exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"must cover every parameter, got none for \['output.weight'\]"):
        learner.load_optimizer_tensors({k: v for k, v in tensors.items() if not k.startswith("output")})
    with pytest.raises(ValueError, match="'output.weight' must be"):
        learner.load_optimizer_tensors(tensors | {"output.weight.exp_avg": torch.zeros(3)})


def test_evaluate_weights_by_targets_and_changes_nothing(tmp_path, operators):
    learner = build_learner(small_config(tmp_path, operators=operators))
    parts = batches(count=2)
    parts[1].labels[3:] = IGNORE_INDEX
    before = parameters(learner)
    assert learner.evaluate(parts) == pytest.approx(learner.evaluate([join(parts)]), rel=1e-6)
    assert_same_bits(parameters(learner), before)


def test_configuration_errors():
    for field, value in (("lr", 0), ("lr", math.inf), ("beta2", 1.0), ("floor_ratio", 2), ("max_grad_norm", -1)):
        with pytest.raises(ValueError, match=f"optimizer.{field} must be .* got {value}"):
            dataclasses.replace(OptimizerConfig(), **{field: value})
