"""How sizes, dtypes and rows are written in tables, records and gates."""

import json
from typing import Any

import torch


def size_of(dims: dict[str, Any]) -> str:
    """A size as text: lists with their name, numbers joined by x, then the names of true flags and name=word for strings."""
    lists = [f"{key} {_list(v)}" for key, v in dims.items() if isinstance(v, (tuple, list))]
    numbers = [str(v) for v in dims.values() if isinstance(v, int) and not isinstance(v, bool)]
    words = [str(k) if v is True else f"{k}={v}" for k, v in dims.items() if v and (v is True or isinstance(v, str))]
    return " ".join([*lists, "x".join(numbers), *words])


def _list(values: tuple[int, ...]) -> str:
    """A list of numbers in short: "8x512" for eight times 512, "8 of 256-2816" for eight numbers in that range."""
    if len(set(values)) == 1:
        return f"{len(values)}x{values[0]}"
    return f"{len(values)} of {min(values)}-{max(values)}" if values else "none"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(value: Any) -> Any:
    """A value as JSON holds it. Floats are rounded to six digits: times are not more precise, and people read the file too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def key_of(op: str, dims: dict[str, Any], dtype: str, direction: str) -> str:
    """The key that identifies a row within a run; a row that was read back from JSON has the same key."""
    return json.dumps([op, plain(dims), dtype, direction])
