"""InternLM2 equals transformers' Llama, an independent implementation, with random weights that checkpoint.py converts."""

import dataclasses

import pytest
import torch

import internlm2.plain
import internlm2_kernels
from internlm2.checkpoint import load_model, save_model
from internlm2.config import ModelConfig
from internlm2.layouts import names_in_layout, split_qkv
from internlm2.model import InternLM2
from internlm2.reward import RewardModel

transformers = pytest.importorskip("transformers", reason="transformers, a test extra, is not installed")

OPERATORS = {"kernels": internlm2_kernels, "plain": internlm2.plain}
LENGTH = 48


def llama(per_group, **changes):
    """A random Llama with `per_group` query heads for each key head; its norm weights differ from 1."""
    torch.manual_seed(per_group)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=96, num_hidden_layers=3, num_attention_heads=2 * per_group, num_key_value_heads=2,
        head_dim=40, intermediate_size=200, rms_norm_eps=1e-5, tie_word_embeddings=False, pad_token_id=2,
        attn_implementation="eager", **({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} | changes),
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.float32).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.08)  # larger than at initialisation, so that attention is not nearly uniform
    return model


def run_llama(model, tokens, labels):
    cos, _ = model.model.rotary_emb(torch.zeros(1, 1, 8), torch.arange(4)[None])
    assert model.model.rotary_emb.inv_freq.dtype == cos.dtype == torch.float32
    logits = model(tokens[None]).logits[0]
    torch.nn.functional.cross_entropy(logits, labels).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def run_ours(model, tokens, labels):
    """Our logits, and our gradients under Llama's names."""
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    model.loss(tokens, labels, cu_seqlens).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        names = names_in_layout(name, "llama")
        parts = split_qkv(parameter.grad, model.config) if len(names) == 3 else (parameter.grad,)
        gradients |= dict(zip(names, parts, strict=True))
    with torch.no_grad():
        return model(tokens, cu_seqlens), gradients


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def variant(path, config_changes, **options):
    model = load_model(path, **options)
    config = dataclasses.replace(model.config, **config_changes)
    changed = InternLM2(config, dtype=options.get("dtype", torch.float32), operators=options.get("operators"))
    changed.load_state_dict(model.state_dict())
    return changed


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("per_group", [2, 4, 6])
def test_logits_and_gradients_are_llamas(per_group, operators, tmp_path, generator):
    hf = llama(per_group)
    hf.save_pretrained(tmp_path)
    tokens, labels = torch.randint(0, 320, (2, LENGTH), generator=generator)
    their_logits, their_grads = run_llama(hf, tokens, labels)
    single = {"rope_angles": "float32"}
    logits, grads = run_ours(variant(tmp_path, single, operators=OPERATORS[operators]), tokens, labels)
    gold_logits, gold_grads = run_ours(load_model(tmp_path, dtype=torch.float64), tokens, labels)

    assert distance(logits, their_logits) <= 1e-5
    assert grads.keys() == their_grads.keys()
    for name, gradient in grads.items():
        assert distance(gradient, their_grads[name]) <= 1e-5, name
    ours, theirs = distance(logits, gold_logits), distance(their_logits, gold_logits)
    print(f"logits: ours {ours:.2e}, Llama {theirs:.2e} from the float64 reference")
    assert ours <= 1.5 * theirs
    flat = [torch.cat([g[name].flatten().double() for name in grads]) for g in (grads, their_grads, gold_grads)]
    ours, theirs = distance(flat[0], flat[2]), distance(flat[1], flat[2])
    print(f"gradients: ours {ours:.2e}, Llama {theirs:.2e}")
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("per_group", [2, 4, 6])
def test_converted_back_weights_are_equal_bit_for_bit(per_group, tmp_path):
    hf = llama(per_group)
    hf.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "back", layout="llama", max_shard_bytes=100_000)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    ours, theirs = back.state_dict(), hf.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert back.config.rope_parameters == hf.config.rope_parameters and back.config.rms_norm_eps == 1e-5


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },  # fmt: skip
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rotary_is_llamas(kind, tmp_path, generator):
    """48 tokens exceed the 16 of max_position_embeddings, so every scaling takes effect. Each comparison uses a new Llama,
    since its dynamic scaling remembers the longest sequence that it has seen."""
    hf = llama(2, max_position_embeddings=16, rope_parameters={"rope_theta": 1e4} | SCALINGS[kind])
    hf.save_pretrained(tmp_path)
    tokens, labels = torch.randint(0, 320, (2, LENGTH), generator=generator)
    their_logits, _ = run_llama(hf, tokens, labels)
    ours = load_model(tmp_path)
    assert distance(run_ours(ours, tokens, labels)[0], their_logits) <= 1e-5
    plain = variant(tmp_path, {"rope_scaling": None})
    assert distance(run_ours(plain, tokens, labels)[0], their_logits) > 1e-3  # so the assertion above can fail


def test_a_wrong_rotary_layout_is_seen(tmp_path, generator):
    """Weights converted with the wrong pairing of rotary dimensions exceed the bound of the tests above by far."""
    hf = llama(2)
    hf.save_pretrained(tmp_path)
    tokens, labels = torch.randint(0, 320, (2, LENGTH), generator=generator)
    their_logits, _ = run_llama(hf, tokens, labels)
    wrong = load_model(tmp_path, adapt_hf=False)
    assert distance(run_ours(wrong, tokens, labels)[0], their_logits) > 1e-3


def test_the_exported_configuration_is_complete(tmp_path):
    model = InternLM2(ModelConfig.preset("tiny", rope_scaling={"type": "dynamic", "factor": 2.0}, stop_token_ids=(5,)))
    save_model(model, tmp_path / "llama", layout="llama")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "llama")
    assert config.rope_parameters["rope_type"] == "dynamic" and config.rope_parameters["factor"] == 2.0
    assert config.eos_token_id == [2, 5] and config.head_dim == 32
    assert load_model(tmp_path / "llama").config.rope_scaling["factor"] == 2.0


def test_a_reward_model_is_llamas_classifier_of_one_class(tmp_path, generator):
    """transformers loads the exported reward model and gives the same reward at the last token, the reward token."""
    model = RewardModel(ModelConfig.preset("tiny", reward_token_id=5), seed=7)
    save_model(model, tmp_path, layout="llama")
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(10, 512, (LENGTH,), generator=generator)
    tokens[-1] = model.config.reward_token_id
    with torch.no_grad():
        ours = model.rewards(tokens, torch.tensor([0, LENGTH], dtype=torch.int32))
        assert theirs(tokens[None]).logits.shape == (1, 1)
        torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], rtol=1e-4, atol=1e-6)
