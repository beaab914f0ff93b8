"""Documents to train on: text files, JSON lines, or the source of the Python standard library.

Every machine with Python has the standard library, so a first training run needs no download. Whether a document is held out
for validation depends on its name alone: adding a file moves no other file from one side to the other.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STDLIB = "stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")

# Left out: installed packages, test suites, and generated tables (code pages, help topics), which teach little Python.
STDLIB_SKIPPED = frozenset(
    "site-packages dist-packages test tests idle_test __pycache__ encodings pydoc_data lib2to3 turtledemo".split()
)


@dataclass(frozen=True)
class Document:
    """One text and its name: the path relative to the source, followed by the line number for JSON lines."""

    name: str
    text: str


def read_documents(source: str, max_bytes: int) -> list[Document]:
    """Reads the documents of a source in an order that depends on their names alone, up to max_bytes of UTF-8.

    source:    "stdlib", a text file (.txt .md .rst .py), a .jsonl file whose lines hold a "text" (or "content") string, or a
               folder of such files
    max_bytes: reading ends before the document that would exceed it. Names are ordered by their hash, so that a bounded
               selection is spread over the whole source
    Errors:    ValueError where the source does not exist or holds no document, or a JSON line has no text. Files that are not
               UTF-8 are left out.
    """
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = list(_library_files(root))
    else:
        root = Path(source)
        if root.is_file():
            root, files = root.parent, [root]
        else:
            files = [f for f in root.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file()]
    files.sort(key=lambda f: _name_hash(f.relative_to(root).as_posix()))

    documents, size = [], 0
    for document in _documents(root, files):
        size += len(document.text.encode())
        if size > max_bytes:
            break
        documents.append(document)
    if not documents:
        raise ValueError(
            f"source must hold text: {STDLIB!r}, or a file or folder of {' '.join(TEXT_SUFFIXES)} with a first document"
            f" of at most {max_bytes} bytes; got {source!r}"
        )
    return documents


def split_validation(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Splits documents into (training, validation). Both keep the order of the documents and get at least one.

    fraction: the expected share of validation documents, in (0, 1); a hash of each document's name decides
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    if len(documents) < 2:
        raise ValueError(f"documents must be two or more to hold one out, got {len(documents)}")
    # The prefix makes this hash independent of the hash that orders the corpus and so decides what max_bytes keeps.
    ranks = [int.from_bytes(_name_hash("held out " + d.name)[:8], "big") / 2**64 for d in documents]
    threshold = min(max(fraction, min(ranks)), sorted(ranks)[-2])
    train = [d for d, rank in zip(documents, ranks, strict=True) if rank > threshold]
    return train, [d for d, rank in zip(documents, ranks, strict=True) if rank <= threshold]


def _library_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = set(below) - STDLIB_SKIPPED  # os.walk then does not enter the skipped folders
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _documents(root: Path, files: list[Path]) -> Iterator[Document]:
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            if file.suffix == ".jsonl":
                yield from _json_lines(name, file.read_bytes().decode("utf-8-sig"))  # some editors write a byte-order mark
            elif (text := file.read_text(encoding="utf-8")).strip():
                yield Document(name, text)
        except UnicodeDecodeError:
            continue


def _json_lines(name: str, text: str) -> Iterator[Document]:
    # Only "\n" ends a JSON line. str.splitlines would also cut at U+2028, U+2029 and U+0085, which a JSON string may hold
    # unescaped, and universal newlines would also cut at a carriage return between two JSON tokens.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"source {name}, line {number}: expected a JSON object, got {error}") from None
        body = record.get("text", record.get("content")) if isinstance(record, dict) else None
        if not isinstance(body, str):
            raise ValueError(f'source {name}, line {number}: expected an object with a "text" string, got {line[:60]}')
        try:
            body.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell one half of a surrogate pair: "\ud800"
            raise ValueError(
                f"source {name}, line {number}: the text must be valid Unicode, got a lone surrogate at index {error.start}"
            ) from None
        if body.strip():
            yield Document(f"{name}:{number}", body)
