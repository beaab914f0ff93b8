"""A model learns with the kernels as with plain PyTorch operators, and operators that are slightly wrong are detected."""

import dataclasses
import types

import pytest
from runs import small_config, small_store

import internlm2.plain
from internlm2.config import ModelConfig
from internlm2.data import PackedBatches
from internlm2.demo import agreement
from internlm2.training.config import DataConfig, OptimizerConfig
from internlm2.training.stages import pretrain

SMALL = dict(vocab_size=64, hidden_size=64, intermediate_size=128)  # half the width of the preset: the runs take seconds


def config(tmp_path, steps):
    model = ModelConfig.preset("tiny", **SMALL)
    data = DataConfig(tokens_per_batch=128, max_seqlen=64)
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=5)
    return small_config(tmp_path, model=model, data=data, optimizer=optimizer, steps=steps, compute_dtype="bfloat16")


def stream():
    return PackedBatches(small_store(documents=200), 128, 64, seed=0)


def altered(**changes):
    """The operators of internlm2.plain, with those in `changes` in place of some."""
    return types.SimpleNamespace(**{name: getattr(internlm2.plain, name) for name in internlm2.plain.__all__} | changes)


def test_kernels_learn_as_plain_operators_do(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "LAST", 20)
    found, curves = agreement.measure(config(tmp_path, steps=25), stream)
    assert found.holds, found.lines()
    assert 0 < found.float32_difference  # 0 would mean that both sides ran the same operators
    assert len(curves) == 6 and all(len(c) == (20 if "float32" in name else 25) for name, c in curves.items())


def values_of_the_wrong_group(*arguments, **options):
    q, k, v = internlm2.plain.qkv_rope(*arguments, **options)
    return q, k, v.flip(1)


def first_losses(tmp_path, operators):
    short = dataclasses.replace(config(tmp_path, steps=55), compute_dtype="float32")
    learner = pretrain.build_learner(short, operators=operators, seed=1)
    return agreement.losses(learner, short, stream, agreement.FIRST, agreement.RunDisplay("test", agreement.FIRST))


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory):
    return first_losses(tmp_path_factory.mktemp("plain"), "plain")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rms_norm": lambda x, w, eps=1e-5, residual=None: internlm2.plain.rms_norm(x, w, eps + 1e-4, residual)},
        {"swiglu": lambda gate, up=None: internlm2.plain.swiglu(gate, up) * 1.01},
        {"qkv_rope": values_of_the_wrong_group},
    ],
    ids=["rms_norm", "swiglu", "qkv_rope"],
)
def test_wrong_operators_are_detected(tmp_path, monkeypatch, plain_losses, wrong):
    monkeypatch.setitem(pretrain.OPERATORS, "wrong", altered(**wrong))
    difference = max(abs(a - b) for a, b in zip(first_losses(tmp_path, "wrong"), plain_losses, strict=True))
    assert difference > agreement.LARGEST_DIFFERENCE


def test_the_verdict():
    verdict = agreement.Agreement(1e-5, 2.0, (1.9, 2.0, 2.1))
    assert verdict.deviations == pytest.approx(0) and verdict.holds
    assert not agreement.Agreement(2e-4, 2.0, (1.9, 2.0, 2.1)).holds
    far = agreement.Agreement(1e-5, 2.21, (1.9, 2.0, 2.1))
    assert far.deviations == pytest.approx(2.1) and not far.holds
    assert "does NOT learn" in far.lines()[-1] and "2.10 standard deviations" in far.lines()[1]


def test_too_few_steps(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 55, got 54"):
        agreement.measure(config(tmp_path, steps=54), stream)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_agreement_on_text(tmp_path, monkeypatch):
    """The comparison as the command runs it, on the source of the standard library with a smaller model, finds agreement."""
    monkeypatch.setattr(agreement, "RECIPES", tmp_path)
    recipe = (pretrain.RECIPES / "tiny.toml").read_text()
    (tmp_path / "demo.toml").write_text(recipe)
    assert agreement.check("cpu", str(tmp_path / "check"), steps=150) == 0
    assert (tmp_path / "check" / "agreement.json").exists()
