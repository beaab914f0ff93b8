"""ModelConfig: its presets have the published sizes, it converts from and to Hugging Face dictionaries, and it is read from
TOML with overrides from the command line.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch

from internlm2.config import PRESETS, ModelConfig, dump_config, load_config, load_toml
from internlm2.layouts import config_from_hf, config_to_hf, head_of
from internlm2.model import InternLM2
from internlm2_kernels import flash_attention

TINY = PRESETS["tiny"]
# From config.json of the released 7B chat model: the keys that decide its computation.
RELEASED_7B = {
    "architectures": ["InternLM2ForCausalLM"], "bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "internlm2", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000,
    "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "vocab_size": 92544,
}  # fmt: skip


# The same keys of the released 1.8B reward model's config.json.
RELEASED_REWARD = RELEASED_7B | {
    "architectures": ["InternLM2ForRewardModel"], "attn_implementation": "eager", "hidden_size": 2048,
    "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 24, "reward_token_id": 92527,
    "rope_scaling": None,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    rate: float = 0.5
    note: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    mode: Literal["x", "y"] = "x"
    limit: int | None = 3
    table: dict | None = None
    name: str | None = None


@dataclass(frozen=True)
class Whole:
    model: ModelConfig
    part: Part = field(default_factory=Part)
    flag: bool = False
    steps: int = 10


@pytest.mark.parametrize(
    ("name", "total", "without_embeddings"),
    [
        ("1.8b", 1_889_110_016, 1_510_049_792),
        ("7b", 7_737_708_544, 6_979_588_096),
        ("20b", 19_861_149_696, 18_723_969_024),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, total, without_embeddings):
    config = PRESETS[name]
    assert config.num_parameters == total
    assert config.num_parameters_without_embeddings == without_embeddings
    assert sum(p.numel() for p in InternLM2(config, device="meta").parameters()) == total


def test_small_presets():
    demo = PRESETS["demo"]
    assert 7.5e6 < demo.num_parameters < 8.5e6 and demo.vocab_size == 4096 and demo.num_heads == 2 * demo.num_kv_heads
    assert sum(p.numel() for p in InternLM2(TINY).parameters()) == TINY.num_parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads must be a multiple of num_kv_heads = 2, got 3"),
        ({"head_dim": 15}, "head_dim must be a multiple of 8 from 32 to 256, as flash_attention's, got 15"),
        ({"head_dim": 16}, "head_dim must be a multiple of 8 from 32 to 256, as flash_attention's, got 16"),
        ({"hidden_size": 0}, "hidden_size must be a positive int, got 0"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive int, got 64.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"eos_token_id": 512}, r"eos_token_id must be an id in \[0, vocab_size = 512\), got 512"),
        ({"pad_token_id": 512}, r"pad_token_id must be an id in \[0, vocab_size = 512\), got 512"),
        ({"reward_token_id": -1}, r"reward_token_id must be an id in \[0, vocab_size = 512\), got -1"),
        ({"stop_token_ids": (3, 2.0)}, r"stop_token_ids\[1\] must be an id in \[0, vocab_size = 512\), got 2.0"),
        ({"rope_scaling": "linear"}, "rope_scaling must be None or a table, got 'linear'"),
        ({"rope_scaling": {"type": "magic", "factor": 2.0}}, "rope_scaling must have a type of linear"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "rope_scaling must have a factor of 1 or more"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "rope_scaling must have a factor of 1 or more"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"scaling\['original_max_position_embeddings'\].*got None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}},
            r"scaling\['low_freq_factor'\].*got None",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "gives no rotary table: .*'beta'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096}},
            "must be max_position_embeddings = 32768, or left out, got 4096",
        ),
        ({"rope_angles": "float16"}, "rope_angles must be 'float64' or 'float32', got 'float16'"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_every_head_size_of_the_kernels_is_a_model_and_no_other():
    """ModelConfig states the limits of flash_attention itself, so that it refuses a configuration before any tensor exists."""
    for head_dim in range(1, 300):
        q = torch.zeros(1, 1, 1, head_dim)
        try:
            flash_attention(q, q, q, backend="reference")
        except ValueError:
            with pytest.raises(ValueError, match="head_dim must be"):
                dataclasses.replace(TINY, head_dim=head_dim)
        else:
            dataclasses.replace(TINY, head_dim=head_dim)


def test_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.hidden_size = 1
    scaled = dataclasses.replace(TINY, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert len({TINY, scaled, dataclasses.replace(TINY)}) == 2


def test_released_config_json():
    config = config_from_hf(RELEASED_7B)
    assert config == ModelConfig.preset("7b", rope_scaling={"factor": 2.0, "type": "dynamic"})
    ignored = ("torch_dtype", "use_cache")
    assert {k: v for k, v in RELEASED_7B.items() if k not in ignored}.items() <= config_to_hf(config).items()


NEEDED = sorted(set(RELEASED_7B) - {"architectures", "torch_dtype", "use_cache"})


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_an_error_not_a_class_default(key):
    with pytest.raises(ValueError, match=f"^{key} is missing in config.json"):
        config_from_hf({k: v for k, v in RELEASED_7B.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [("bias", True), ("tie_word_embeddings", True), ("hidden_act", "gelu"), ("model_type", "mistral")],
)
def test_models_of_another_kind_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} must be .*, got {value!r}"):
        config_from_hf(RELEASED_7B | {key: value})


def test_the_architecture_says_which_model_it_is():
    assert head_of(RELEASED_7B) == "output" and head_of(RELEASED_REWARD) == "v_head"
    for named in (["InternLM2ForSequenceClassification"], ["InternLM2ForCausalLM", "InternLM2ForRewardModel"], "InternLM2"):
        with pytest.raises(ValueError, match=r"architectures must be one of \['InternLM2ForCausalLM'\], .*, got"):
            head_of(RELEASED_7B | {"architectures": named})


def test_the_released_reward_config_json():
    config = config_from_hf(RELEASED_REWARD)
    assert config == ModelConfig.preset("1.8b", reward_token_id=92527)
    ignored = ("torch_dtype", "use_cache", "attn_implementation")
    assert {k: v for k, v in RELEASED_REWARD.items() if k not in ignored}.items() <= config_to_hf(config, head="v_head").items()
    with pytest.raises(ValueError, match="^reward_token_id is missing in config.json"):
        config_from_hf({k: v for k, v in RELEASED_REWARD.items() if k != "reward_token_id"})


@pytest.mark.parametrize("layout", ["internlm2", "llama"])
def test_hf_round_trip(layout):
    config = dataclasses.replace(
        TINY, rope_scaling={"type": "linear", "factor": 4.0}, stop_token_ids=(7, 9), rope_angles="float32", reward_token_id=5
    )
    assert config_from_hf(config_to_hf(config, layout)) == config
    assert config_from_hf(config_to_hf(TINY, layout)) == TINY


@pytest.mark.parametrize("scaling", [
    {"type": "linear", "factor": 4},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "type": "dynamic", "factor": 4, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
])  # fmt: skip
def test_linear_and_dynamic_scaling_are_written_as_the_released_class_demands(scaling):
    """The released class accepts only a dictionary of exactly the keys `type` and `factor`, and only a float as the factor."""
    written = config_to_hf(dataclasses.replace(TINY, rope_scaling=scaling))["rope_scaling"]
    assert list(written) == ["type", "factor"] and written["type"] == scaling.get("rope_type", scaling.get("type"))
    assert written["factor"] == 4.0 and type(written["factor"]) is float


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": YARN}, "rope_scaling of type 'yarn'"),
        ({"rope_scaling": LLAMA3}, "rope_scaling of type 'llama3'"),
        ({"head_dim": 64}, "head_dim = 64, where hidden_size / num_heads is 32"),
    ],
)
def test_what_the_released_class_refuses_is_not_written(change, named):
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(ValueError, match=f"^the 'internlm2' layout cannot hold {named}: .* use layout='llama'"):
        config_to_hf(config)
    assert config_from_hf(config_to_hf(config, "llama")) == config
    # Checkpoints of a training run, which only this package reads, can hold such a configuration.
    assert config_from_hf(config_to_hf(config, exact=False)) == config


def test_llama_config_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers, a test extra, is not installed")
    hf = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, rms_norm_eps=1e-5, max_position_embeddings=32768, tie_word_embeddings=False, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    assert config_from_hf(hf.to_dict()) == TINY


def test_a_negative_padding_token_means_none():
    assert config_from_hf(config_to_hf(TINY, "llama") | {"pad_token_id": -1}) == dataclasses.replace(TINY, pad_token_id=None)


def test_toml_round_trip(tmp_path):
    part = Part(rate=1e-9, note='a "b"\n\\ ü\x7f', sizes=(), mode="y", limit=None, table={"type": "dynamic", "factor": 2.5})
    whole = Whole(dataclasses.replace(TINY, rope_scaling={"type": "linear", "factor": 2.0}), part, flag=True)
    path = tmp_path / "whole.toml"
    text = dump_config(whole, path)
    assert path.read_text(encoding="utf-8") == text
    assert load_config(Whole, path) == whole
    assert load_config(ModelConfig, None, ["preset=tiny"]) == TINY


def test_overrides():
    got = load_config(
        Whole,
        None,
        ["model.preset=7b", "model.num_layers=3", "part.rate=2", "part.note=2024", "part.sizes=[4, 5]", "flag=true",
         "part.limit=none", "part.mode=y", "model.rope_scaling={type = 'dynamic', factor = 2.0}",
         "model.rope_scaling.factor=3.0", "part.name=7"],
    )  # fmt: skip
    assert got.model == ModelConfig.preset("7b", num_layers=3, rope_scaling={"type": "dynamic", "factor": 3.0})
    assert got.part == Part(2.0, "2024", (4, 5), "y", None, None, "7") and isinstance(got.part.rate, float) and got.flag


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('steps = 5\n[model]\npreset = "tiny"\nnum_layers = 4\n')
    got = load_config(Whole, path, ["model.num_layers=6"])
    assert (got.steps, got.model) == (5, dataclasses.replace(TINY, num_layers=6))
    assert load_toml(path)["model"] == {"preset": "tiny", "num_layers": 4}


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["stesp=3"], ValueError, "unknown key stesp; the keys here are model, part, flag, steps"),
        (["part.rat=3"], ValueError, "unknown key part.rat;"),
        (["model.depth=3"], ValueError, "unknown key model.depth;"),
        (["model.preset=9b"], ValueError, "preset must be one of '1.8b', .*, got '9b'"),
        (["steps=ten"], TypeError, "steps must be of type int, got 'ten'"),
        (["steps=1.5"], TypeError, "steps must be of type int, got 1.5"),
        (["steps=true"], TypeError, "steps must be of type int, got True"),
        (["flag=1"], TypeError, "flag must be of type bool, got 1"),
        (["part=3"], TypeError, "part must be a table, got 3"),
        (["part.sizes=[1, 'a']"], TypeError, r"part.sizes\[1\] must be of type int, got 'a'"),
        (["part.limit=x"], TypeError, "part.limit must be of type int, got 'x'"),
        (["part.mode=z"], ValueError, "part.mode must be 'x' or 'y', got 'z'"),
        (["steps"], ValueError, "an override must look like a.b=c, got 'steps'"),
        (["steps=3", "steps.x=3"], ValueError, "steps is a value, not a table"),
    ],
)
def test_bad_overrides_are_named(overrides, kind, message):
    with pytest.raises(kind, match=message):
        load_config(Whole, None, ["model.preset=tiny", *overrides])


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("a = = 1")
    with pytest.raises(ValueError, match="bad.toml is not valid TOML"):
        load_config(Whole, path)
    path.write_text("stesp = 1")
    with pytest.raises(ValueError, match="bad.toml: unknown key stesp"):
        load_config(Whole, path)
    path.write_text("steps = 1")
    with pytest.raises(ValueError, match="missing key model.hidden_size"):
        load_config(Whole, path)
