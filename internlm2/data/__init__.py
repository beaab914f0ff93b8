"""From text to packed training batches: corpus.py reads documents, tokens.py stores their ids, packing.py forms batches."""

from internlm2.data.corpus import Document, read_documents, split_validation
from internlm2.data.packing import IGNORE_INDEX, PackedBatch, PackedBatches
from internlm2.data.tokens import TokenStore

__all__ = [
    "IGNORE_INDEX",
    "Document",
    "PackedBatch",
    "PackedBatches",
    "TokenStore",
    "read_documents",
    "split_validation",
]
