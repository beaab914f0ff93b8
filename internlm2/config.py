"""Configuration: the sizes of InternLM2, and frozen dataclasses read from TOML files with `a.b=c` overrides.

`load_config(TrainConfig, "run.toml", ["model.num_layers=4"])` builds any nested frozen dataclass; an unknown key, a missing
key or a value of the wrong type is an error that names the key. `dump_config` writes a dataclass back as TOML.
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
except ModuleNotFoundError:  # Python 3.10 has no tomllib; the package tomli has the same functions
    import tomli as tomllib

from internlm2.storage import atomic_file
from internlm2_kernels import rope_table

ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one InternLM2 model. A TOML table may name a preset and override its fields: `preset = "7b"`.

    vocab_size:               rows of the embedding and of the output matrix
    hidden_size, num_layers:  width of the residual stream, number of blocks
    num_heads, num_kv_heads:  number of query heads, and of key/value heads; every num_heads / num_kv_heads query heads share
                              one key/value head
    head_dim:                 width of one head, a multiple of 8 from 32 to 256
    intermediate_size:        width of the feed-forward layer
    rms_norm_eps:             added to the mean square
    rope_theta:               base of the rotary frequencies
    rope_scaling:             None or Hugging Face's dictionary, for example {type = "dynamic", factor = 2.0}. It is None in
                              the presets, because released checkpoints of the same size differ in it
    rope_angles:              "float64", or "float32" for the angles that the released code computes
    max_position_embeddings:  length that the model was trained for; dynamic scaling begins beyond it
    initializer_range:        standard deviation of initial weights
    bos_token_id, eos_token_id, pad_token_id: ids of the tokenizer; stop_token_ids are further ids that end a generation
    reward_token_id:          the id that ends a conversation given to a reward model, which puts its reward there
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
    reward_token_id: int | None = None

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
        if self.head_dim % 8 or not 32 <= self.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of 8 from 32 to 256, as flash_attention's, got {self.head_dim}")
        if self.rope_angles not in ("float64", "float32"):
            raise ValueError(f"rope_angles must be 'float64' or 'float32', got {self.rope_angles!r}")
        ids = dict(bos_token_id=self.bos_token_id, eos_token_id=self.eos_token_id, pad_token_id=self.pad_token_id,
                   reward_token_id=self.reward_token_id)  # fmt: skip
        ids |= {f"stop_token_ids[{i}]": token for i, token in enumerate(self.stop_token_ids)}
        for name, token in ids.items():
            if token is None and name in ("pad_token_id", "reward_token_id"):
                continue
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} must be an id in [0, vocab_size = {self.vocab_size}), got {token!r}")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", _checked_scaling(self))
        try:
            rope_table(1, self.head_dim, base=self.rope_theta, scaling=self.rope_scaling_at(1), angles=self.rope_angles,
                       device="cpu", backend="reference")  # fmt: skip
        except (ValueError, TypeError) as error:
            raise type(error)(f"rope_scaling = {self.rope_scaling!r} gives no rotary table: {error}") from None

    @property
    def rope_scaling_type(self) -> str | None:
        """The kind of rope_scaling: "linear", "dynamic", "yarn" or "llama3"; None without scaling."""
        return None if self.rope_scaling is None else self.rope_scaling.get("rope_type", self.rope_scaling.get("type"))

    def rope_scaling_at(self, length: int) -> dict[str, Any] | None:
        """The `scaling` argument of `rope_table` for a sequence of `length` tokens; the length matters to dynamic scaling."""
        if self.rope_scaling is None:
            return None
        return {"max_position_embeddings": self.max_position_embeddings} | self.rope_scaling | {"seq_len": length}

    @property
    def qkv_size(self) -> int:
        """Rows of wqkv: queries, keys and values of all heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        return 2 * self.vocab_size * self.hidden_size + self.num_parameters_without_embeddings

    @property
    def num_parameters_without_embeddings(self) -> int:
        """All parameters except the embedding and the output matrix."""
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_layers * block + self.hidden_size

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """The configuration PRESETS[name] with some fields changed."""
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
        """The table with `preset` replaced by that preset's fields; load_config calls this for every class that has it."""
        table = dict(table)
        if "preset" in table:
            table = cls.preset(str(table.pop("preset"))).to_dict() | table
        return table


def _checked_scaling(config: ModelConfig) -> dict[str, Any]:
    """rope_scaling as a plain dictionary; ValueError for a type, a factor or a length that the model does not support."""
    if not isinstance(config.rope_scaling, Mapping):
        raise ValueError(f"rope_scaling must be None or a table, got {config.rope_scaling!r}")
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ROPE_SCALINGS:
        raise ValueError(f"rope_scaling must have a type of {', '.join(ROPE_SCALINGS)}, got {scaling!r}")
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < float("inf"):
        raise ValueError(f"rope_scaling must have a factor of 1 or more, got {scaling!r}")
    if kind in ("linear", "dynamic"):
        # Dynamic scaling begins beyond the trained length. That is config.max_position_embeddings; a different one is an error.
        for key in ("max_position_embeddings", "original_max_position_embeddings"):
            if key in scaling and scaling[key] != config.max_position_embeddings:
                raise ValueError(
                    f"rope_scaling[{key!r}] must be max_position_embeddings = {config.max_position_embeddings}, or left out,"
                    f" got {scaling[key]!r}"
                )
    return scaling


PRESETS: dict[str, ModelConfig] = {
    "1.8b": ModelConfig(hidden_size=2048, num_layers=24, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=8192),
    "7b": ModelConfig(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336),
    "20b": ModelConfig(hidden_size=6144, num_layers=48, num_heads=48, num_kv_heads=8, head_dim=128, intermediate_size=16384),
    # 8.4 M parameters: in minutes on two CPU cores it learns to write text that looks like Python.
    "demo": ModelConfig(
        vocab_size=4096, hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=768
    ),
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=256
    ),
}


class _Text(str):
    """The right side c of an override `a.b=c`, before it is parsed: the type of the field decides whether it is TOML or a
    plain string."""


def load_toml(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The table of a TOML file (None: an empty table) after the overrides `a.b=c`. ValueError names the file or override."""
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
    """An instance of the frozen dataclass `cls` from a TOML file and overrides; a key in neither takes its default.

    Fields may be int, float, str, bool, Literal, T | None (None is written "none"), tuple[T, ...], dict, or another such
    dataclass. ValueError names an unknown or missing key and its file; TypeError names a value of the wrong type.
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
            values[name] = _build(hints[name], {}, f"{where}{name}.")  # raises an error that names the missing key
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` converted to the type `hint`; TypeError names the key where that is not possible."""
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
    """The TOML text of a dataclass, with every field; load_config makes an equal dataclass from it. The text is also written
    to `path` if that is given."""
    lines = _dump(config, "")
    text = "\n".join(lines).strip() + "\n"
    if path is not None:
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
