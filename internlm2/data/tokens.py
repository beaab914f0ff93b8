"""TokenStore: the token ids of many documents in one flat array, with the offset at which each document starts."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class TokenStore:
    """The documents of a corpus as token ids, end to end.

    tokens:  ids [N], uint16 where every id fits (which halves disk and memory for small vocabularies), else uint32
    offsets: int64 [documents + 1], from 0 to N; document i is tokens[offsets[i] : offsets[i + 1]] and is never empty
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __post_init__(self):
        if self.tokens.ndim != 1 or self.tokens.dtype not in (np.uint16, np.uint32):
            raise TypeError(f"tokens must be uint16 or uint32 [N], got {self.tokens.dtype} {list(self.tokens.shape)}")
        if self.offsets.ndim != 1 or self.offsets.dtype != np.int64:
            raise TypeError(f"offsets must be int64 [documents + 1], got {self.offsets.dtype}")
        if len(self.offsets) < 2 or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise ValueError(f"offsets must run from 0 to {len(self.tokens)} over one document or more")
        if (np.diff(self.offsets) <= 0).any():
            raise ValueError("offsets must increase: a document may not be empty")

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the contents, by which a resumed stream of batches recognises that its documents are the same."""
        digest = hashlib.sha256(self.offsets.tobytes())
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()[:16]

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int]]) -> "TokenStore":
        """Builds a store from lists of ids; empty documents are left out."""
        arrays = [np.asarray(ids, dtype=np.int64) for ids in documents]
        arrays = [ids for ids in arrays if len(ids)]
        if not arrays:
            raise ValueError("documents must hold one token or more, got none")
        tokens = np.concatenate(arrays)
        if tokens.min() < 0 or tokens.max() >= 2**32:
            raise ValueError(f"token ids must lie in [0, 2^32), got {tokens.min()} to {tokens.max()}")
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in arrays])]).astype(np.int64)
        return cls(tokens.astype(np.uint16 if tokens.max() < 2**16 else np.uint32), offsets)

    def save(self, folder: Path, name: str) -> None:
        """Writes NAME.tokens.npy and NAME.offsets.npy into a folder. Not atomic: write into storage.atomic_directory."""
        np.save(folder / f"{name}.tokens.npy", self.tokens, allow_pickle=False)
        np.save(folder / f"{name}.offsets.npy", self.offsets, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, name: str) -> "TokenStore":
        """Opens what save wrote. The tokens stay on disk and are memory-mapped, so a corpus may be larger than memory."""
        tokens = np.load(folder / f"{name}.tokens.npy", mmap_mode="r", allow_pickle=False)
        return cls(tokens, np.load(folder / f"{name}.offsets.npy", allow_pickle=False))
