"""Models on disk: safetensors with checksums, written all or nothing, in the released InternLM2 layout or in Llama's.

A checkpoint is a folder with config.json and model.safetensors (or shards with model.safetensors.index.json). Where this
package wrote it, it also has manifest.json with the size and sha256 of every file. The default layout is that of the released
checkpoints, so other programs read the folder as it is; `layout="llama"` writes what any Llama implementation loads. The two
layouts are described in layouts.py, and storage.py writes files so that they survive a kill.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from internlm2.config import ModelConfig
from internlm2.layouts import (
    Layout,
    config_from_hf,
    config_to_hf,
    head_of,
    layout_of,
    merge_qkv,
    names_in_layout,
    rotary_halves_from_pairs,
    shapes_in_layout,
    split_qkv,
)
from internlm2.model import Decoder, InternLM2
from internlm2.reward import RewardModel
from internlm2.storage import MANIFEST, CheckpointError, atomic_directory, present, read_json, verify_manifest

__all__ = ["CheckpointError", "load_model", "load_tensors", "read_config", "save_model", "save_tensors", "write_config"]

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODELS = {model.head_name: model for model in (InternLM2, RewardModel)}


# --- Tensors ------------------------------------------------------------------------------------------------------------


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes named tensors to one safetensors file. A kill may leave a part of the file: write into storage.atomic_directory.
    OSError (a full disk, for example) names the file."""
    try:
        save_file({n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU; CheckpointError names a file that is missing or damaged."""
    with _opened(Path(path)) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (a handle is no mapping)


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from error


# --- Saving -------------------------------------------------------------------------------------------------------------


def save_model(
    model: Decoder, directory: str | Path, *, layout: Layout = "internlm2", dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:  # fmt: skip
    """Writes config.json, weights and manifest.json as the folder `directory`.

    What was at `directory` before is removed once the new folder is complete on the disk.

    model:           an InternLM2 or a RewardModel; config.json names the class of the layout that has the same head
    layout:          "internlm2" (that of this package and of the released checkpoints), or "llama"
    dtype:           dtype of the stored weights; by default that of the parameters
    max_shard_bytes: larger models are cut into several files with an index; a single tensor is never cut
    Errors:          ValueError for a configuration that the layout cannot hold; OSError (a full disk, for example) leaves
                     the previous folder in place
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    hf = config_to_hf(model.config, layout, model.head_name)
    state = model.state_dict()
    with atomic_directory(directory) as temporary:
        shards: list[list[str]] = [[]]
        filled = total = 0
        for name, tensor in state.items():
            size = tensor.numel() * (dtype or tensor.dtype).itemsize
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled, total = filled + size, total + size
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in shard:
                names = names_in_layout(name, layout)
                whole = state[name].to(dtype or state[name].dtype)
                parts = (whole,) if len(names) == 1 else split_qkv(whole, model.config)
                tensors |= dict(zip(names, parts, strict=True))
            save_tensors(tensors, temporary / file)
            weight_map |= dict.fromkeys(tensors, file)
        write_config(hf, temporary, dtype or model.model.norm.weight.dtype)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(hf: Mapping[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Writes config.json: the dictionary `hf` from `layouts.config_to_hf`, with the dtype of the stored weights."""
    text = json.dumps(dict(hf) | {"torch_dtype": str(dtype).removeprefix("torch.")}, indent=2)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


# --- Loading ------------------------------------------------------------------------------------------------------------


def load_model(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", adapt_hf: bool = True,
    verify: bool = True, **options: Any,
) -> InternLM2 | RewardModel:  # fmt: skip
    """The model in a folder that save_model or Hugging Face wrote: InternLM2 or Llama layout, one file or shards.

    An InternLM2 or a RewardModel, whichever config.json names.

    dtype, device: of the parameters; further options go to the model's class (operators, compute_dtype, ...)
    adapt_hf:      False for InternEvo weights trained with adapt_hf=False, which rotate neighbouring dimensions together.
                   The weights do not show which they are, and the wrong choice gives a bad model without any error
    verify:        compare all files with manifest.json, where there is one
    Errors:        CheckpointError names the file, and the tensor that is missing, unexpected or of another shape
    Memory:        the model and one more tensor. Code that a folder may hold is never run
    """
    directory = present(directory)
    if verify and (directory / MANIFEST).exists():
        verify_manifest(directory)
    hf, config = _read_hf(directory)
    layout, model_class = layout_of(hf), MODELS[head_of(hf)]
    files = _weight_files(directory)
    shapes = {name: t.shape for name, t in model_class(config, device="meta").state_dict().items()}
    wanted = {n: s for name, shape in shapes.items() for n, s in shapes_in_layout(name, shape, layout, config).items()}
    with contextlib.ExitStack() as stack:
        found = _open_all(directory, files, stack)
        _compare(wanted, found, directory)
        model = model_class(config, device="meta", dtype=dtype, **options).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parts = [found[n][1].get_tensor(n) for n in names_in_layout(name, layout)]
                whole = parts[0] if len(parts) == 1 else merge_qkv(*parts, config)
                if not adapt_hf and name.endswith("attention.wqkv.weight"):
                    whole = rotary_halves_from_pairs(whole, config)
                parameter.copy_(whole)
    return model


def read_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig in the config.json of a folder; CheckpointError names the file and what is missing or wrong in it."""
    return _read_hf(Path(directory))[1]


def _read_hf(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    path = directory / CONFIG
    hf = read_json(path)
    try:
        if not isinstance(hf, dict):
            raise ValueError(f"expected a JSON object, got {type(hf).__name__}")
        return hf, config_from_hf(hf)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _weight_files(directory: Path) -> dict[str, str] | None:
    """{tensor name: file} from the index; None where the weights are one file without an index."""
    if (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{directory / INDEX} is damaged: it has no weight_map")
        return weight_map
    if not (directory / WEIGHTS).exists():
        raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    return None


def _open_all(directory: Path, files: dict[str, str] | None, stack: contextlib.ExitStack) -> dict[str, tuple[str, Any]]:
    """{tensor name: (file, open handle)}, after a check that the files hold the tensors that the index lists."""
    found: dict[str, tuple[str, Any]] = {}
    for file in sorted(set(files.values())) if files else [WEIGHTS]:
        if Path(file).name != file:
            raise CheckpointError(f"{directory / INDEX} names the file {file!r}, which lies outside the folder")
        handle = stack.enter_context(_opened(directory / file))
        found |= {name: (file, handle) for name in handle.keys()}  # noqa: SIM118  (a handle is no mapping)
    for name, file in (files or {}).items():
        if name not in found or found[name][0] != file:
            raise CheckpointError(f"{directory / INDEX} says that {file} holds {name}, but it does not")
    return found


def _compare(wanted: Mapping[str, tuple], found: Mapping[str, tuple[str, Any]], directory: Path) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{directory}: the tensor {name} {list(shape)} is in none of its files")
        file, handle = found[name]
        stored = handle.get_slice(name)
        if tuple(stored.get_shape()) != tuple(shape):
            raise CheckpointError(f"{directory / file}: {name} must be {list(shape)}, got {stored.get_shape()}")
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(f"{directory / file}: {name} must be of a floating-point type, got {stored.get_dtype()}")
    for name, (file, _) in found.items():
        # Old files also hold the rotary frequencies. They are ignored: this package computes them from the configuration.
        if name not in wanted and not name.endswith(".inv_freq"):
            raise CheckpointError(f"{directory / file}: unexpected tensor {name}")
