"""PackedBatches: documents laid end to end and cut into batches of exactly T tokens, without padding.

Documents longer than max_seqlen are cut into pieces of that length, and the pieces are shuffled, so that no batch consists of
one long document. A piece that does not fit into the rest of a batch is cut there, and what remains of it begins the next
batch. Every fragment is a sequence of its own: it has an entry in cu_seqlens, attention stays within it, and its positions
start at 0. Labels are already shifted: label i is the token that follows token i in the document, even across a cut, so that a
cut loses no target. Only the last token of a document has no target.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from internlm2.data.tokens import TokenStore

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedBatch:
    """One batch of T tokens in n sequences.

    tokens, labels, positions: int64 [T]; positions restart at 0 in every sequence; a token with label -100 has no target
    cu_seqlens:                int32 [n + 1] on the CPU, strictly increasing from 0 to T
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """The number of labels other than -100. If the labels are on a GPU, this waits for the GPU."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch on a device. cu_seqlens stays on the CPU, where its values can be checked without a copy back."""
        if torch.device(device).type == "cpu":
            return self
        moved = (t.pin_memory().to(device, non_blocking=True) for t in (self.tokens, self.labels, self.positions))
        return PackedBatch(*moved, self.cu_seqlens)


class PackedBatches:
    """An endless stream of packed batches that can be resumed. It passes over the documents again and again (each pass is an
    epoch); a batch may hold the end of one epoch and the beginning of the next.

    store:            the documents
    tokens_per_batch: T, the number of tokens in every batch
    max_seqlen:       length of the longest piece of a document, and so of the longest sequence
    seed:             the order of the pieces in epoch e is a permutation drawn from (seed, e); None keeps the stored order

    The stream depends on these arguments alone. `state_dict()` is a position in it; a stream that loads the position
    continues with exactly the batches that would have come.
    """

    def __init__(self, store: TokenStore, tokens_per_batch: int, max_seqlen: int, seed: int | None = 0):
        for name, value in (("tokens_per_batch", tokens_per_batch), ("max_seqlen", max_seqlen)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.store, self.tokens_per_batch, self.max_seqlen, self.seed = store, tokens_per_batch, max_seqlen, seed
        lengths = np.diff(store.offsets)
        counts = -(-lengths // max_seqlen)
        self._document_of = np.repeat(np.arange(store.num_documents), counts)
        first_pieces = np.cumsum(counts) - counts
        within = np.arange(len(self._document_of)) - first_pieces[self._document_of]
        self._starts = store.offsets[self._document_of] + within * max_seqlen
        self._move_to(epoch=0, piece=0, offset=0)

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        total = self.tokens_per_batch
        tokens, labels = np.empty(total, np.int64), np.empty(total, np.int64)
        positions, ends, filled = np.empty(total, np.int64), [0], 0
        while filled < total:
            piece = self._order[self._piece]
            document_end = self.store.offsets[self._document_of[piece] + 1]
            piece_end = min(self._starts[piece] + self.max_seqlen, document_end)
            start = self._starts[piece] + self._offset
            end = min(piece_end, start + total - filled)
            count = int(end - start)
            here = slice(filled, filled + count)
            following = self.store.tokens[start : min(end + 1, document_end)]
            tokens[here] = following[:count]
            positions[here] = np.arange(count)
            labels[here] = IGNORE_INDEX
            labels[filled : filled + len(following) - 1] = following[1:]
            filled += count
            ends.append(filled)
            self._advance(count, finished=end == piece_end)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        return PackedBatch(*(torch.from_numpy(a) for a in (tokens, labels, positions)), cu_seqlens)

    @property
    def epoch(self) -> int:
        """The epoch that the next token comes from, counted from 0."""
        return self._epoch

    def state_dict(self) -> dict[str, int | str | None]:
        """The position in the stream, and the arguments and the fingerprint of the documents by which `load_state_dict`
        recognises the stream; a few values that JSON can hold."""
        return {"epoch": self._epoch, "piece": self._piece, "offset": self._offset} | self._identity()

    def load_state_dict(self, state: dict[str, int | str | None]) -> None:
        """Continues from a position. ValueError where it belongs to other documents, other sizes or another seed."""
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise ValueError(f"data state must have {key} = {here!r}, as this stream has, got {state.get(key)!r}")
        self._move_to(state["epoch"], state["piece"], state["offset"])

    def _identity(self) -> dict[str, int | str | None]:
        sizes = {"tokens_per_batch": self.tokens_per_batch, "max_seqlen": self.max_seqlen}
        return {"documents": self.store.fingerprint, "seed": self.seed} | sizes

    def _move_to(self, epoch: int, piece: int, offset: int) -> None:
        self._epoch, self._piece, self._offset = epoch, piece, offset
        count = len(self._starts)
        self._order = np.arange(count)
        if self.seed is not None:
            # numpy promises never to change the raw numbers of a bit generator, but not how Generator.permutation uses them.
            keys = np.random.PCG64([self.seed, epoch]).random_raw(count)
            self._order = np.argsort(keys, kind="stable")

    def _advance(self, count: int, finished: bool) -> None:
        self._offset += count
        if finished:
            self._piece, self._offset = self._piece + 1, 0
            if self._piece == len(self._starts):
                self._move_to(self._epoch + 1, 0, 0)
