"""How others store the same model: names and shapes of tensors, and config.json, in the InternLM2 and Llama layouts.

Only this file uses the names of Hugging Face and InternEvo; the rest of the package has one name for each thing. The
"internlm2" layout is that of the released checkpoints; its tensors have the names and shapes of the parameters of our models.
The "llama" layout is what any Llama implementation loads: queries, keys and values are separate tensors in the order of their
heads.

In the packed wqkv of InternLM2 the rows are grouped by key/value head: each group holds its query heads, then its key head,
then its value head. In the patterns below `entry` counts these heads within a group.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from internlm2.config import ModelConfig

Layout = Literal["internlm2", "llama"]
Head = Literal["output", "v_head"]

# The class that config.json names in `architectures`, by (layout, head of the model). "output" is the head of a language
# model, "v_head" that of a reward model.
_ARCHITECTURES: dict[tuple[Layout, Head], str] = {
    ("internlm2", "output"): "InternLM2ForCausalLM",
    ("internlm2", "v_head"): "InternLM2ForRewardModel",
    ("llama", "output"): "LlamaForCausalLM",
    ("llama", "v_head"): "LlamaForSequenceClassification",
}


# --- config.json --------------------------------------------------------------------------------------------------------


def layout_of(hf: Mapping[str, Any]) -> Layout:
    """The layout that a config.json announces in `model_type`."""
    layout = _needed(hf, "model_type")
    if layout not in ("internlm2", "llama"):
        raise ValueError(f"model_type must be 'internlm2' or 'llama', got {layout!r}")
    return layout


def head_of(hf: Mapping[str, Any]) -> Head:
    """The head of the model that a config.json describes: "output" for a language model, "v_head" for a reward model.

    ValueError for another architecture. A file without `architectures` describes a language model.
    """
    layout = layout_of(hf)
    classes = {_ARCHITECTURES[layout, head]: head for head in ("output", "v_head")}
    named = hf.get("architectures") or [_ARCHITECTURES[layout, "output"]]
    if not isinstance(named, Sequence) or isinstance(named, str) or len(named) != 1 or named[0] not in classes:
        raise ValueError(f"architectures must be one of {', '.join(f'[{c!r}]' for c in classes)}, got {named!r}")
    return classes[named[0]]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig in the dictionary of a Hugging Face config.json, of either layout and with either head.

    A missing key is an error. It does not take the default of the Hugging Face class, because those defaults fit no released
    InternLM2 model. ValueError also for what this model does not have: biases, tied embeddings, other activations.
    """
    layout, head = layout_of(hf), head_of(hf)
    fixed = {"hidden_act": "silu", "tie_word_embeddings": False}
    # A Llama file may leave these out. If the model has biases all the same, load_model refuses them as unexpected tensors.
    fixed |= {"bias": False} if layout == "internlm2" else {k: False for k in ("attention_bias", "mlp_bias") if k in hf}
    for key, expected in fixed.items():
        if _needed(hf, key) != expected:
            raise ValueError(f"{key} must be {expected!r} in config.json, got {hf[key]!r}")
    for key in ("rope_parameters", "rope_scaling"):
        if hf.get(key) is not None and not isinstance(hf[key], Mapping):
            raise ValueError(f"{key} must be null or a table in config.json, got {hf[key]!r}")
    rope = dict(hf.get("rope_parameters") or {})
    theta = rope.pop("rope_theta") if "rope_theta" in rope else _needed(hf, "rope_theta")
    scaling = rope if "rope_parameters" in hf else _needed(hf, "rope_scaling")
    if scaling and scaling.get("rope_type", scaling.get("type")) == "default":
        scaling = None
    eos = _needed(hf, "eos_token_id")
    eos = list(eos) if isinstance(eos, Sequence) else [eos]
    heads, hidden = _needed(hf, "num_attention_heads"), _needed(hf, "hidden_size")
    names = ("vocab_size", "intermediate_size", "rms_norm_eps", "max_position_embeddings", "initializer_range",
             "bos_token_id", "pad_token_id")  # fmt: skip
    table = {name: _needed(hf, name) for name in names}
    if isinstance(table["pad_token_id"], int) and table["pad_token_id"] < 0:
        table["pad_token_id"] = None  # early Llama files write -1 for no padding token
    table |= dict(hidden_size=hidden, num_heads=heads, head_dim=hf.get("head_dim") or hidden // heads, rope_theta=theta)
    table |= dict(num_layers=_needed(hf, "num_hidden_layers"), num_kv_heads=_needed(hf, "num_key_value_heads"))
    table |= dict(rope_scaling=scaling or None, rope_angles=hf.get("rope_angles", "float64"))
    table |= dict(eos_token_id=eos[0], stop_token_ids=eos[1:])
    released_reward = head == "v_head" and layout == "internlm2"
    table["reward_token_id"] = _needed(hf, "reward_token_id") if released_reward else hf.get("reward_token_id")
    return ModelConfig.from_dict(table)


def config_to_hf(
    config: ModelConfig, layout: Layout = "internlm2", head: Head = "output", *, exact: bool = True
) -> dict[str, Any]:
    """The dictionary of a Hugging Face config.json.

    layout, head: of the checkpoint; `layout_of` and `head_of` read them back from the dictionary
    exact:        ValueError for a configuration that Hugging Face's class for the layout refuses to load, or with which it
                  would compute something else. The released InternLM2 class knows only linear and dynamic scaling, and no
                  head_dim other than hidden_size / num_heads. False writes such a configuration for this package alone
    `rope_angles`, a key of this package that other programs ignore, is written where it is not the default.
    """
    if (layout, head) not in _ARCHITECTURES:
        raise ValueError(f"layout must be 'internlm2' or 'llama' and head 'output' or 'v_head', got {layout!r}, {head!r}")
    hf = {"model_type": layout, "architectures": [_ARCHITECTURES[layout, head]]}
    hf |= {"bias": False} if layout == "internlm2" else {"attention_bias": False, "mlp_bias": False}
    hf |= dict(hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads)
    hf |= dict(num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, vocab_size=config.vocab_size)
    hf |= dict(intermediate_size=config.intermediate_size, rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta)
    hf |= dict(rope_scaling=config.rope_scaling, max_position_embeddings=config.max_position_embeddings)
    hf |= dict(initializer_range=config.initializer_range, bos_token_id=config.bos_token_id, hidden_act="silu")
    hf |= dict(eos_token_id=[config.eos_token_id, *config.stop_token_ids] if config.stop_token_ids else config.eos_token_id)
    hf |= dict(pad_token_id=config.pad_token_id, tie_word_embeddings=False)
    if layout == "internlm2":
        hf |= _released_form(config, exact)
    if head == "v_head" or config.reward_token_id is not None:
        hf["reward_token_id"] = config.reward_token_id
    if layout == "llama" and head == "v_head":
        hf |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}  # Llama's way to say that there is one output
    if config.rope_angles != "float64":
        hf["rope_angles"] = config.rope_angles
    return hf


def _released_form(config: ModelConfig, exact: bool) -> dict[str, Any]:
    """The entries of config.json that the released InternLM2 class checks.

    It accepts rope_scaling as None or as a dictionary of exactly `type` ("linear" or "dynamic") and `factor` (a float), and
    derives the size of a head from hidden_size.
    """
    refusals = []
    if config.head_dim * config.num_heads != config.hidden_size:
        ratio = config.hidden_size / config.num_heads
        refusals.append(f"head_dim = {config.head_dim}, where hidden_size / num_heads is {ratio:g}")
    scaling = config.rope_scaling
    if scaling is not None:
        # A length in the dictionary can be left out: ModelConfig has checked that it equals max_position_embeddings, which the
        # released class reads.
        extra = set(scaling) - {"type", "rope_type", "rope_theta", "factor", "max_position_embeddings",
                                "original_max_position_embeddings"}  # fmt: skip
        if config.rope_scaling_type in ("linear", "dynamic") and not extra:
            scaling = {"type": config.rope_scaling_type, "factor": float(scaling["factor"])}
        else:
            refusals.append(f"rope_scaling of type {config.rope_scaling_type!r}")
    if refusals and exact:
        raise ValueError(
            f"the 'internlm2' layout cannot hold {' and '.join(refusals)}: the released class refuses it; use layout='llama'"
        )
    return {"rope_scaling": scaling}


def _needed(hf: Mapping[str, Any], key: str) -> Any:
    if key not in hf:
        raise ValueError(f"{key} is missing in config.json (Hugging Face's class defaults are not used: they fit no release)")
    return hf[key]


# --- Tensors ------------------------------------------------------------------------------------------------------------

_LLAMA_NAMES = {
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.wo": ("self_attn.o_proj",),
    "feed_forward.w1": ("mlp.gate_proj",),
    "feed_forward.w3": ("mlp.up_proj",),
    "feed_forward.w2": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "model.tok_embeddings.weight": ("model.embed_tokens.weight",),
    "model.norm.weight": ("model.norm.weight",),
    "output.weight": ("lm_head.weight",),
    "v_head.weight": ("score.weight",),
}


def names_in_layout(name: str, layout: Layout) -> tuple[str, ...]:
    """The names in a layout for the parameter `name` of our model: one name, or for wqkv in the Llama layout three, of queries,
    keys and values."""
    if layout == "internlm2":
        return (name,)
    if name in _LLAMA_NAMES:
        return _LLAMA_NAMES[name]
    prefix, part = name.removesuffix(".weight").split(".", 3)[:3], name.removesuffix(".weight").split(".", 3)[3]
    return tuple(f"{'.'.join(prefix)}.{other}.weight" for other in _LLAMA_NAMES[part])


def shapes_in_layout(
    name: str, shape: tuple[int, ...], layout: Layout, config: ModelConfig
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """{name: shape} of the tensors that `names_in_layout` lists for the parameter `name`, which has `shape` in our model."""
    names = names_in_layout(name, layout)
    if len(names) == 1:
        return {names[0]: tuple(shape)}
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {name: (rows, shape[1]) for name, rows in zip(names, (q_rows, kv_rows, kv_rows), strict=True)}


def split_qkv(wqkv: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """wqkv [(H + 2G) d, D], grouped by key/value head, as q [H d, D], k and v [G d, D] in the order of their heads."""
    grouped = _grouped(wqkv, config)
    q = rearrange(grouped[:, :-2], "group entry d hidden -> (group entry d) hidden")
    k, v = (rearrange(grouped[:, entry], "group d hidden -> (group d) hidden") for entry in (-2, -1))
    return q, k, v


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of split_qkv."""
    sizes = dict(group=config.num_kv_heads, d=config.head_dim)
    grouped = [rearrange(t, "(group entry d) hidden -> group entry d hidden", **sizes) for t in (q, k, v)]
    return rearrange(torch.cat(grouped, dim=1), "group entry d hidden -> (group entry d) hidden")


def rotary_halves_from_pairs(wqkv: Tensor, config: ModelConfig) -> Tensor:
    """wqkv of a model that rotates dimensions 2i and 2i + 1 of a head together, for a model that rotates i and i + d/2.

    Our model rotates dimensions i and i + d/2 together; InternEvo with adapt_hf=False trains models that rotate 2i and 2i + 1.
    Rows move within each query and key head; the rows of values stay.
    """
    grouped = _grouped(wqkv, config)
    qk = rearrange(grouped[:, :-1], "group entry (pair two) hidden -> group entry (two pair) hidden", two=2)
    return rearrange(torch.cat((qk, grouped[:, -1:]), dim=1), "group entry d hidden -> (group entry d) hidden")


def _grouped(wqkv: Tensor, config: ModelConfig) -> Tensor:
    sizes = dict(group=config.num_kv_heads, d=config.head_dim)
    return rearrange(wqkv, "(group entry d) hidden -> group entry d hidden", **sizes)
