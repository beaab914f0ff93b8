"""Files that survive a kill and a full disk: written all or nothing, with checksums by which later damage is found.

One process at a time may write one path.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A saved file is missing, damaged, or holds something other than what is needed; the message names the file."""


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A context that gives a temporary path to write to. When it ends without an error, the file is forced onto the disk and
    renamed to `path`.

    An error, a kill or a full disk leaves whatever was at `path` unchanged.
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
    """`atomic_file` for a folder: a context that gives an empty temporary folder. When it ends without an error, a manifest of
    the files is added, all files are forced onto the disk, and the folder is renamed to `path`.

    One folder cannot replace another in a single step, so for a moment the old folder is called `.NAME.previous`. If the
    process is killed in that moment, the old folder keeps that name, and `present` (which load_model uses) finds it there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, previous = path.with_name(f".{path.name}.writing"), _previous(path)
    if temporary.exists():  # left by a process that was killed while it wrote
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary)
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        if path.exists():
            if previous.exists():  # the last save was killed after its new folder had taken its place
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
    """The folder that was last saved completely as `path`: `path` itself, or the previous folder if a save was killed between
    its two renames."""
    path = Path(path)
    return _previous(path) if not path.exists() and _previous(path).exists() else path


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _sync(path: Path) -> None:
    """Waits until a file's data, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and writes its entries in order by itself
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(directory: str | Path) -> None:
    """Writes manifest.json with the size and the sha256 digest of every file in the folder."""
    directory = Path(directory)
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    files = {n: {"bytes": (directory / n).stat().st_size, "sha256": sha256(directory / n)} for n in names if n != MANIFEST}
    text = json.dumps({"format": 1, "sha256": _digest_of(files), "files": files}, indent=1)
    with atomic_file(directory / MANIFEST) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def verify_manifest(directory: str | Path) -> None:
    """Reads every file that manifest.json lists. CheckpointError names the first one that is missing, truncated or changed."""
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("sha256") != _digest_of(files):
        raise CheckpointError(f"{directory / MANIFEST} is damaged: the checksum of its entries is not the one it states")
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            kind = "truncated" if size < entry["bytes"] else "longer than it was written"
            raise CheckpointError(f"{path} is {kind}: expected {entry['bytes']} bytes, got {size}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its sha256 differs from the one recorded when it was written")


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file; CheckpointError names a file that is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON ({error})") from error
