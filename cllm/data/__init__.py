"""From files to batches: documents (files to text), pipeline (tokenizer and packing), tokens (shards and batches)."""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["IGNORE", "Batch", "Batches", "Dataset", "TokenSplit", "Windows", "is_packed", "prepare", "stream_texts", "train_tokenizer"]

if TYPE_CHECKING:
    from cllm.data.documents.corpus import stream_texts
    from cllm.data.pipeline import prepare
    from cllm.data.tokens.batch import IGNORE, Batch
    from cllm.data.tokens.dataset import Dataset, is_packed
    from cllm.data.tokens.loader import Batches
    from cllm.data.tokens.split import TokenSplit
    from cllm.data.tokens.tokenizer import train_tokenizer
    from cllm.data.tokens.windows import Windows

__getattr__, __dir__ = exports(
    __name__,
    {
        "Dataset": "cllm.data.tokens.dataset",
        "is_packed": "cllm.data.tokens.dataset",
        "IGNORE": "cllm.data.tokens.batch",
        "Batch": "cllm.data.tokens.batch",
        "Batches": "cllm.data.tokens.loader",
        "Windows": "cllm.data.tokens.windows",
        "prepare": "cllm.data.pipeline",
        "stream_texts": "cllm.data.documents.corpus",
        "train_tokenizer": "cllm.data.tokens.tokenizer",
        "TokenSplit": "cllm.data.tokens.split",
    },
)
