"""From files to batches: documents (files to text), corpus (which and on which side), prepare (tokenizer and packing), shards, loader."""

from cllm.data.dataset import Dataset, is_packed
from cllm.data.loader import IGNORE, Batch, Batches, Windows
from cllm.data.prepare import prepare, stream_texts, train_tokenizer
from cllm.data.shards import TokenSplit

__all__ = ["IGNORE", "Batch", "Batches", "Dataset", "TokenSplit", "Windows", "is_packed", "prepare", "stream_texts", "train_tokenizer"]
