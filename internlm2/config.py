"""Configuration: the sizes of InternLM2, and frozen dataclasses from TOML files with `a.b=c` overrides.

`load_config(TrainConfig, "run.toml", ["model.num_layers=4"])` builds any nested frozen dataclass; an unknown key, a missing
one or a value of the wrong type is an error that names it. `dump_config` writes the same thing back.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one InternLM2 model. A TOML table may name a preset and override its fields: `preset = "7b"`.

    vocab_size:               rows of the embedding and of the output matrix
    hidden_size, num_layers:  width of the residual stream, number of blocks
    num_heads, num_kv_heads:  query heads, and key/value heads that num_heads / num_kv_heads of them share
    head_dim:                 width of one head
    intermediate_size:        width of the feed-forward layer
    rms_norm_eps:             added to the mean square
    rope_theta:               base of the rotary frequencies
    rope_scaling:             None or Hugging Face's dictionary, e.g. {type = "dynamic", factor = 2.0}; differs from
                              checkpoint to checkpoint of one size, so presets have none
    rope_angles:              "float64", or "float32" for the angles that the released code computes
    max_position_embeddings:  length the model was trained for; dynamic scaling begins beyond it
    initializer_range:        standard deviation of fresh weights
    bos, eos, pad_token_id:   ids of the tokenizer; stop_token_ids are further ids that end a generation
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 92544
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: dict | None = field(default=None, hash=False)
    rope_angles: Literal["float64", "float32"] = "float64"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int | None = 2
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        counts = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size",
                  "max_position_embeddings")  # fmt: skip
        for kind, names in ((int, counts), (int | float, ("rms_norm_eps", "rope_theta", "initializer_range"))):
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < float("inf"):
                    noun = "int" if kind is int else "number"
                    raise ValueError(f"{name} must be a positive {noun}, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary turns pairs), got {self.head_dim}")
        if self.rope_angles not in ("float64", "float32"):
            raise ValueError(f"rope_angles must be 'float64' or 'float32', got {self.rope_angles!r}")
        for token in (self.bos_token_id, self.eos_token_id, *self.stop_token_ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token ids must lie in [0, vocab_size = {self.vocab_size}), got {token}")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", _checked_scaling(self.rope_scaling))

    @property
    def qkv_size(self) -> int:
        """Rows of wqkv: queries, keys and values of all heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        return 2 * self.vocab_size * self.hidden_size + self.num_parameters_without_embeddings

    @property
    def num_parameters_without_embeddings(self) -> int:
        """All parameters save the embedding and the output matrix."""
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_layers * block + self.hidden_size

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """PRESETS[name] with some fields changed."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
        return dataclasses.replace(PRESETS[name], **changes)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "ModelConfig":
        return _build(cls, table, "")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def expand_table(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The hook by which load_config understands `preset`."""
        table = dict(table)
        if "preset" in table:
            table = cls.preset(str(table.pop("preset"))).to_dict() | table
        return table

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """From the dictionary of a Hugging Face config.json, model_type "internlm2" or "llama".

        A key that the file leaves out is an error and never the Hugging Face class's default, which fits no released
        InternLM2 model. ValueError also for what this model does not have: biases, tied embeddings, other activations.
        """
        kind = _hf_value(hf, "model_type")
        if kind not in ("internlm2", "llama"):
            raise ValueError(f"model_type must be 'internlm2' or 'llama', got {kind!r}")
        fixed = {"hidden_act": "silu", "tie_word_embeddings": False}
        # A Llama file may leave these out; a bias in the weights would still be refused there, as an unexpected tensor.
        fixed |= {"bias": False} if kind == "internlm2" else {k: False for k in ("attention_bias", "mlp_bias") if k in hf}
        for key, expected in fixed.items():
            if _hf_value(hf, key) != expected:
                raise ValueError(f"{key} must be {expected!r} in config.json, got {hf[key]!r}")
        rope = dict(hf.get("rope_parameters") or {})
        theta = rope.pop("rope_theta") if "rope_theta" in rope else _hf_value(hf, "rope_theta")
        scaling = rope if "rope_parameters" in hf else _hf_value(hf, "rope_scaling")
        if scaling and scaling.get("rope_type", scaling.get("type")) == "default":
            scaling = None
        eos = _hf_value(hf, "eos_token_id")
        eos = list(eos) if isinstance(eos, Sequence) else [eos]
        heads, hidden = _hf_value(hf, "num_attention_heads"), _hf_value(hf, "hidden_size")
        head_dim = hf.get("head_dim") or hidden // heads
        names = ("vocab_size", "intermediate_size", "rms_norm_eps", "max_position_embeddings", "initializer_range",
                 "bos_token_id", "pad_token_id")  # fmt: skip
        return cls.from_dict(
            {name: _hf_value(hf, name) for name in names}
            | dict(hidden_size=hidden, num_heads=heads, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling or None)
            | dict(num_layers=_hf_value(hf, "num_hidden_layers"), num_kv_heads=_hf_value(hf, "num_key_value_heads"))
            | dict(eos_token_id=eos[0], stop_token_ids=eos[1:], rope_angles=hf.get("rope_angles", "float64"))
        )

    def to_hf(self, layout: Literal["internlm2", "llama"] = "internlm2") -> dict[str, Any]:
        """The dictionary of a Hugging Face config.json, and `rope_angles`, a key of ours, where it is not the default."""
        if layout not in ("internlm2", "llama"):
            raise ValueError(f"layout must be 'internlm2' or 'llama', got {layout!r}")
        architecture = {"internlm2": "InternLM2ForCausalLM", "llama": "LlamaForCausalLM"}[layout]
        return (
            {"model_type": layout, "architectures": [architecture]}
            | ({"bias": False} if layout == "internlm2" else {"attention_bias": False, "mlp_bias": False})
            | dict(hidden_size=self.hidden_size, num_hidden_layers=self.num_layers, num_attention_heads=self.num_heads)
            | dict(num_key_value_heads=self.num_kv_heads, head_dim=self.head_dim, vocab_size=self.vocab_size)
            | dict(intermediate_size=self.intermediate_size, rms_norm_eps=self.rms_norm_eps, rope_theta=self.rope_theta)
            | dict(rope_scaling=self.rope_scaling, max_position_embeddings=self.max_position_embeddings)
            | dict(initializer_range=self.initializer_range, bos_token_id=self.bos_token_id, hidden_act="silu")
            | dict(eos_token_id=[self.eos_token_id, *self.stop_token_ids] if self.stop_token_ids else self.eos_token_id)
            | dict(pad_token_id=self.pad_token_id, tie_word_embeddings=False)
            | ({} if self.rope_angles == "float64" else {"rope_angles": self.rope_angles})
        )


def _hf_value(hf: Mapping[str, Any], key: str) -> Any:
    if key not in hf:
        raise ValueError(f"{key} is missing in config.json (Hugging Face's class defaults are not used: they fit no release)")
    return hf[key]


def _checked_scaling(scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ROPE_SCALINGS:
        raise ValueError(f"rope_scaling must have a type of {', '.join(ROPE_SCALINGS)}, got {dict(scaling)!r}")
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 1:
        raise ValueError(f"rope_scaling must have a factor of 1 or more, got {dict(scaling)!r}")
    return dict(scaling)


PRESETS: dict[str, ModelConfig] = {
    "1.8b": ModelConfig(hidden_size=2048, num_layers=24, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=8192),
    "7b": ModelConfig(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336),
    "20b": ModelConfig(hidden_size=6144, num_layers=48, num_heads=48, num_kv_heads=8, head_dim=128, intermediate_size=16384),
    # 8.4 M parameters: learns to write something Python-like in minutes on two CPU cores.
    "demo": ModelConfig(
        vocab_size=4096, hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=768
    ),
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=128
    ),
}


class _Text(str):
    """The right side of an override: TOML if it reads as TOML, else a bare string; which one, the field's type decides."""


def load_toml(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The table of a TOML file (None: an empty one) with overrides `a.b=c` laid over it. ValueError names file or override."""
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = [key.strip() for key in dotted.split(".")]
        if not equals or not all(keys):
            raise ValueError(f"an override must look like a.b=c, got {override!r}")
        at = table
        for key in keys[:-1]:
            value = at.get(key, {})
            at[key] = _read_text(value, dict) if isinstance(value, _Text) else value
            at = at[key]
            if not isinstance(at, dict):
                raise ValueError(f"override {override!r}: {key} is a value, not a table")
        at[keys[-1]] = _Text(text.strip())
    return table


def load_config(cls: type, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """An instance of the frozen dataclass `cls` from a TOML file and overrides; what neither names takes its default.

    Fields may be int, float, str, bool, Literal, T | None (written "none"), tuple[T, ...], dict, or such a dataclass.
    ValueError names an unknown or missing key and its file; TypeError a value of the wrong type.
    """
    try:
        return _build(cls, load_toml(path, overrides), "")
    except (ValueError, TypeError) as error:
        if path is None or str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def _build(cls: type, table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise TypeError(f"{where.rstrip('.')} must be a table, got {table!r}")
    if hasattr(cls, "expand_table"):
        table = cls.expand_table(table)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]}; the keys here are {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, f in fields.items():
        if name in table:
            values[name] = _convert(table[name], hints[name], where + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            if not dataclasses.is_dataclass(hints[name]):
                raise ValueError(f"missing key {where}{name}")
            values[name] = _build(hints[name], {}, f"{where}{name}.")  # so that the error names what is missing in it
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a TypeError that names the key."""
    if isinstance(value, _Text):
        value = _read_text(value, hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where + ".")
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            if type(None) in options:
                return None
        errors = []
        for option in (o for o in options if o is not type(None)):
            try:
                return _convert(value, option, where)
            except TypeError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{where} must be {' or '.join(map(repr, options))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(item, options[0], f"{where}[{i}]") for i, item in enumerate(value))
    if (hint is dict or origin is dict) and isinstance(value, Mapping):
        return {key: _read_text(item, Any) if isinstance(item, _Text) else item for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = origin or hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{where} must be of type {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def _read_text(text: str, hint: Any) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)
    wants_text = hint is str or str in typing.get_args(hint)
    return str(text) if wants_text and not isinstance(value, str) else value


def dump_config(config: Any, path: str | Path | None = None) -> str:
    """The TOML text of a dataclass, every field included; load_config gives it back equal. Written to `path` too, if given."""
    lines = _dump(config, "")
    text = "\n".join(lines).strip() + "\n"
    if path is not None:
        from internlm2.checkpoint import atomic_file  # it imports this module

        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return text


def _dump(config: Any, prefix: str) -> list[str]:
    plain, tables = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            tables += ["", f"[{prefix}{f.name}]", *_dump(value, f"{prefix}{f.name}.")]
        elif value is not None or f.default is not None:
            plain.append(f"{f.name} = {_toml(value)}")
    return plain + tables


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"a configuration value must be a number, string, bool, list or dict, got {value!r}")
