"""Model weights on disk: safetensors with checksums, written all or nothing; Hugging Face InternLM2 and Llama layouts.

A checkpoint is a folder: config.json, model.safetensors (or shards with model.safetensors.index.json), and where we wrote
it manifest.json with the size and sha256 of every file. The layout on disk is Hugging Face's InternLM2, so other programs
read it as it is; `layout="llama"` writes what any Llama implementation loads. This file alone knows other layouts.

`atomic_file`, `atomic_directory`, `write_manifest` and `verify_manifest` serve everything else that must survive a kill or
a full disk too. One process at a time may write one path.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from internlm2.config import ModelConfig
from internlm2.model import InternLM2

Layout = Literal["internlm2", "llama"]
MANIFEST, CONFIG = "manifest.json", "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A file of a checkpoint is missing, damaged, or holds something else than the model needs; the message names it."""


# --- All or nothing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write; on leaving without an error its file is on disk and takes `path`'s place at once.

    An error, a kill or a full disk leaves what was at `path` as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """The same for a folder: gives an empty temporary one, which takes `path`'s place once all its files are on disk.

    A manifest of its files is added on leaving. A folder cannot replace another in one step: for a moment the old one is
    called `.NAME.previous`. A process killed in that moment leaves it so, and `present` (which load_model uses) finds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, previous = path.with_name(f".{path.name}.writing"), _previous(path)
    if temporary.exists():  # left behind by a process that was killed
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary)
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        if path.exists():
            if previous.exists():  # the last save was killed when its new folder stood already
                shutil.rmtree(previous)
            os.rename(path, previous)
        os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if previous.exists() and not path.exists():
            os.rename(previous, path)
        raise
    if previous.exists():
        shutil.rmtree(previous)


def present(path: str | Path) -> Path:
    """The folder that was last saved completely as `path`: itself, or the one before if a save was killed at its very end."""
    path = Path(path)
    return _previous(path) if not path.exists() and _previous(path).exists() else path


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _sync(path: Path) -> None:
    """Waits until a file's data, or a folder's list of names, is on disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and orders their entries itself
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Checksums ----------------------------------------------------------------------------------------------------------


def write_manifest(directory: str | Path) -> None:
    """Writes manifest.json: size and sha256 of every file in the folder."""
    directory = Path(directory)
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    files = {n: {"bytes": (directory / n).stat().st_size, "sha256": sha256(directory / n)} for n in names if n != MANIFEST}
    text = json.dumps({"format": 1, "sha256": _digest_of(files), "files": files}, indent=1)
    with atomic_file(directory / MANIFEST) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def verify_manifest(directory: str | Path) -> None:
    """Reads every file that manifest.json lists; CheckpointError names the first that is missing, truncated or changed."""
    directory = Path(directory)
    manifest = _read_json(directory / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("sha256") != _digest_of(files):
        raise CheckpointError(f"{directory / MANIFEST} is damaged: its entries do not have the checksum it gives for them")
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            kind = "truncated" if size < entry["bytes"] else "longer than it was written"
            raise CheckpointError(f"{path} is {kind}: expected {entry['bytes']} bytes, got {size}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its bytes are not the ones written (sha256 differs)")


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON ({error})") from error


# --- Tensors ------------------------------------------------------------------------------------------------------------


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes named tensors to one safetensors file, which is not atomic by itself. OSError names the file (a full disk)."""
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


# --- Layouts ------------------------------------------------------------------------------------------------------------

_LLAMA_NAMES = {
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.wo": ("self_attn.o_proj",),
    "feed_forward.w1": ("mlp.gate_proj",),
    "feed_forward.w3": ("mlp.up_proj",),
    "feed_forward.w2": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "model.tok_embeddings.weight": ("model.embed_tokens.weight",),
    "output.weight": ("lm_head.weight",),
}


def names_in_layout(name: str, layout: Layout) -> tuple[str, ...]:
    """What the tensor `name` of our model is called in a layout; Llama holds queries, keys and values apart."""
    if layout == "internlm2" or name == "model.norm.weight":
        return (name,)
    if name in _LLAMA_NAMES:
        return _LLAMA_NAMES[name]
    prefix, part = name.removesuffix(".weight").split(".", 3)[:3], name.removesuffix(".weight").split(".", 3)[3]
    return tuple(f"{'.'.join(prefix)}.{other}.weight" for other in _LLAMA_NAMES[part])


def split_qkv(wqkv: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """wqkv [(H + 2G) d, D], grouped by key/value head, as q [H d, D], k and v [G d, D] in head order."""
    per_group = config.num_heads // config.num_kv_heads
    groups = wqkv.view(config.num_kv_heads, per_group + 2, config.head_dim, -1)
    return tuple(t.flatten(0, -2) for t in (groups[:, :per_group], groups[:, per_group], groups[:, per_group + 1]))


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of split_qkv."""
    groups = [t.view(config.num_kv_heads, -1, config.head_dim, t.shape[-1]) for t in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, -2)


def rotary_halves_from_pairs(wqkv: Tensor, config: ModelConfig) -> Tensor:
    """wqkv of a model that rotates dimensions 2i and 2i + 1 together, for one that rotates i and i + d/2 (ours).

    InternEvo trains the former with adapt_hf=False. Rows of query and key heads move; values stay.
    """
    per_group = config.num_heads // config.num_kv_heads
    groups = wqkv.view(config.num_kv_heads, per_group + 2, config.head_dim, -1)
    qk = groups[:, : per_group + 1].unflatten(2, (config.head_dim // 2, 2)).transpose(2, 3).flatten(2, 3)
    return torch.cat((qk, groups[:, per_group + 1 :]), dim=1).flatten(0, -2)


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in InternLM2(config, device="meta").state_dict().items()}


def _parts(shape: torch.Size, names: tuple[str, ...], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if len(names) == 1:
        return {names[0]: tuple(shape)}
    rows = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.num_kv_heads * config.head_dim)
    return {name: (r, shape[1]) for name, r in zip(names, rows, strict=True)}


# --- Saving -------------------------------------------------------------------------------------------------------------


def save_model(
    model: InternLM2, directory: str | Path, *, layout: Layout = "internlm2", dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:  # fmt: skip
    """Writes config.json, weights and manifest.json as the folder `directory`; what was there before goes when all is on disk.

    layout:          "internlm2" (ours and Hugging Face's), or "llama"
    dtype:           of the stored weights; default the parameters'
    max_shard_bytes: beyond it the weights are cut into several files with an index; one tensor is never cut
    Errors:          OSError (a full disk among them) leaves the previous folder in place
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    config, state = model.config, model.state_dict()
    with atomic_directory(directory) as temporary:
        shards: list[list[tuple[str, tuple[str, ...]]]] = [[]]
        filled = total = 0
        for name, tensor in state.items():
            size = tensor.numel() * (dtype or tensor.dtype).itemsize
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, names_in_layout(name, layout)))
            filled, total = filled + size, total + size
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name, names in shard:
                whole = state[name].to(dtype or state[name].dtype)
                parts = (whole,) if len(names) == 1 else split_qkv(whole, config)
                tensors |= dict(zip(names, parts, strict=True))
            save_tensors(tensors, temporary / file)
            weight_map |= dict.fromkeys(tensors, file)
        hf = config.to_hf(layout) | {"torch_dtype": str(dtype or model.output.weight.dtype).removeprefix("torch.")}
        (temporary / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# --- Loading ------------------------------------------------------------------------------------------------------------


def load_model(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", adapt_hf: bool = True,
    verify: bool = True, **options: Any,
) -> InternLM2:  # fmt: skip
    """The model in a folder that save_model or Hugging Face wrote: InternLM2 or Llama layout, one file or shards.

    dtype, device: of the parameters; further options go to InternLM2 (operators, compute_dtype, ...)
    adapt_hf:      False for InternEvo weights trained with adapt_hf=False, whose rotary pairs are neighbours; it cannot be
                   told from the weights, and the wrong choice gives a model that is finite and bad
    verify:        hold all files against manifest.json, where there is one
    Errors:        CheckpointError names the file, and the tensor that is missing, unexpected or of another shape
    Memory:        the model and one tensor more. Code that a folder may hold is never run
    """
    directory = present(directory)
    if verify and (directory / MANIFEST).exists():
        verify_manifest(directory)
    config = read_config(directory)
    layout = _read_json(directory / CONFIG)["model_type"]
    files = _weight_files(directory)
    shapes = _shapes(config)
    wanted = {n: s for name, shape in shapes.items() for n, s in _parts(shape, names_in_layout(name, layout), config).items()}
    with contextlib.ExitStack() as stack:
        found = _open_all(directory, files, stack)
        _compare(wanted, found, directory)
        model = InternLM2(config, device="meta", dtype=dtype, **options).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parts = [found[n][1].get_tensor(n) for n in names_in_layout(name, layout)]
                whole = parts[0] if len(parts) == 1 else merge_qkv(*parts, config)
                if not adapt_hf and name.endswith("attention.wqkv.weight"):
                    whole = rotary_halves_from_pairs(whole, config)
                parameter.copy_(whole)
    return model


def read_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig in a folder's config.json; CheckpointError names the file and what it lacks."""
    path = Path(directory) / CONFIG
    try:
        return ModelConfig.from_hf(_read_json(path))
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _weight_files(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file from the index; None where there is a single file."""
    if (directory / INDEX).exists():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{directory / INDEX} is damaged: it has no weight_map")
        return weight_map
    if not (directory / WEIGHTS).exists():
        raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    return None


def _open_all(directory: Path, files: dict[str, str] | None, stack: contextlib.ExitStack) -> dict[str, tuple[str, Any]]:
    """Tensor name -> (file, open handle), after holding the index against the files."""
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
        # Old files carry rotary buffers, which the configuration gives.
        if name not in wanted and not name.endswith(".inv_freq"):
            raise CheckpointError(f"{directory / file}: unexpected tensor {name}")
