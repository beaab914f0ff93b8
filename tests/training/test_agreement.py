"""The kernels learn as plain PyTorch operators do; and operators that are a little wrong are found out."""

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


def config(tmp_path, steps):
    model = ModelConfig.preset("tiny", vocab_size=64)
    data = DataConfig(tokens_per_batch=128, max_seqlen=64)
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=5)
    return small_config(tmp_path, model=model, data=data, optimizer=optimizer, steps=steps, compute_dtype="bfloat16")


def stream():
    return PackedBatches(small_store(documents=200), 128, 64, seed=0)


def altered(**changes):
    """The plain operators with some replaced."""
    return types.SimpleNamespace(**{name: getattr(internlm2.plain, name) for name in internlm2.plain.__all__} | changes)


def test_kernels_learn_as_plain_operators_do(tmp_path, capsys):
    found, curves = agreement.measure(config(tmp_path, steps=55), stream)
    assert found.holds, found.lines()
    assert 0 < found.float32_difference  # 0 would mean that both sides ran the same operators
    assert len(curves) == 6 and all(len(c) == (20 if "float32" in name else 55) for name, c in curves.items())


def values_of_the_wrong_group(*arguments, **options):
    q, k, v = internlm2.plain.qkv_rope(*arguments, **options)
    return q, k, v.flip(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rms_norm": lambda x, w, eps=1e-5, residual=None: internlm2.plain.rms_norm(x, w, eps + 1e-4, residual)},
        {"swiglu": lambda gate, up=None: internlm2.plain.swiglu(gate, up) * 1.01},
        {"qkv_rope": values_of_the_wrong_group},
    ],
    ids=["rms_norm", "swiglu", "qkv_rope"],
)
def test_wrong_operators_are_found_out(tmp_path, monkeypatch, wrong):
    monkeypatch.setitem(pretrain.OPERATORS, "wrong", altered(**wrong))
    short = config(tmp_path, steps=55)
    runs = {}
    for operators in ("wrong", "plain"):
        of_type = dataclasses.replace(short, compute_dtype="float32")
        learner = pretrain.build_learner(of_type, operators=operators, seed=1)
        runs[operators] = agreement.losses(learner, of_type, stream, agreement.FIRST, agreement.RunDisplay("test", 20))
    difference = max(abs(a - b) for a, b in zip(*runs.values(), strict=True))
    assert difference > agreement.LARGEST_DIFFERENCE


def test_the_verdict():
    verdict = agreement.Agreement(1e-5, 2.0, (1.9, 2.0, 2.1))
    assert verdict.deviations == pytest.approx(0) and verdict.holds
    assert not agreement.Agreement(2e-4, 2.0, (1.9, 2.0, 2.1)).holds
    far = agreement.Agreement(1e-5, 2.21, (1.9, 2.0, 2.1))
    assert far.deviations == pytest.approx(2.1) and not far.holds
    assert "do NOT learn" in far.lines()[-1] and "2.10 standard deviations" in far.lines()[1]


def test_too_few_steps(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 55, got 54"):
        agreement.measure(config(tmp_path, steps=54), stream)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_agreement_on_text(tmp_path, monkeypatch):
    """The command's own path, on the standard library's text with a smaller model."""
    monkeypatch.setattr(agreement, "RECIPES", tmp_path)
    recipe = (pretrain.RECIPES / "tiny.toml").read_text()
    (tmp_path / "demo.toml").write_text(recipe)
    assert agreement.check("cpu", str(tmp_path / "check"), steps=150) == 0
    assert (tmp_path / "check" / "agreement.json").exists()
