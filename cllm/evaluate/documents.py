"""How well a model predicts each document of a split, and what that says: confidence intervals, sources, the documents that it knows least.

    scores = score_documents(model, split, tokenizer, seq_len=1024, stride=512)
    print(scores.total(), scores.interval(0.95).loss, scores.by_source(), scores.worst(5))

Every document is one sum of nats, one of hits, a number of targets and of their bytes. All figures are ratios of such sums, so that they can be
computed again for any group of documents and for any resample of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cllm.data import Windows
from cllm.data.documents.scan import file_of
from cllm.data.tokens.batch import IGNORE
from cllm.evaluate.loss import Evaluation
from cllm.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    from cllm.data import TokenSplit
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

RESAMPLES = 1000
FEW_DOCUMENTS = 20  # a percentile bootstrap of fewer is known to come out too narrow
SHORT_DOCUMENT = 32  # targets; the loss of a shorter document is mostly chance, so it is named among the worst only when there are no longer ones
GROUPINGS = ("auto", "file", "folder")


@dataclass(frozen=True)
class Interval:
    """(low, high) of each figure of an Evaluation."""

    loss: tuple[float, float]
    perplexity: tuple[float, float]
    bits_per_byte: tuple[float, float]
    accuracy: tuple[float, float]


@dataclass(frozen=True)
class Group:
    """A source (a file or a top folder) or a single document, with its figures; `interval` is None for fewer than two documents."""

    name: str
    num_documents: int
    num_bytes: int
    evaluation: Evaluation
    interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        interval = None if self.interval is None else asdict(self.interval)
        return {"name": self.name, "documents": self.num_documents, "bytes": self.num_bytes, **self.evaluation.to_dict(), "interval": interval}


@dataclass(frozen=True)
class DocumentScores:
    """One entry for each document that has a target: names, nats float64, correct, targets and bytes int64, all (num_documents,).

    `num_bytes` are those of the targets alone: neither the first token of a document, which nothing predicts, nor end-of-text tokens count.
    """

    names: list[str]
    nats: np.ndarray
    correct: np.ndarray
    targets: np.ndarray
    num_bytes: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.names)

    def total(self) -> Evaluation:
        return _evaluation(*(float(each.sum()) for each in self._sums()))

    def interval(self, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval | None:
        """The percentile bootstrap over documents (Efron 1979): documents are drawn with replacement, as many as there are, and every figure is
        computed again. The same seed gives the same interval. None for a single document, which says nothing about others."""
        if not 0.0 < confidence < 1.0:
            raise UserError(f"confidence must be between 0 and 1, got {confidence}. Use a value like 0.95.")
        if resamples < 1:
            raise UserError(f"resamples must be at least 1, got {resamples}. Use a value like {RESAMPLES}.")
        if self.num_documents < 2:
            return None
        # Raw Philox output is the same in every version of numpy; the bias of the remainder is below 2^-40.
        generator = np.random.Philox(np.random.SeedSequence([seed, self.num_documents]))
        sums = np.stack(self._sums(), axis=1)  # (num_documents, 4)
        drawn = np.empty((resamples, 4))
        for number in range(resamples):
            chosen = generator.random_raw(self.num_documents) % np.uint64(self.num_documents)
            drawn[number] = sums[chosen.astype(np.int64)].sum(axis=0)
        nats, correct, targets, num_bytes = drawn.T
        edges = [50 * (1 - confidence), 50 * (1 + confidence)]

        def between(values: np.ndarray) -> tuple[float, float]:
            low, high = np.percentile(values, edges)
            return float(low), float(high)

        loss = between(nats / targets)
        bits = between(nats / math.log(2) / np.maximum(num_bytes, 1))
        return Interval(loss, (_exp(loss[0]), _exp(loss[1])), bits, between(correct / targets))

    def by_source(self, by: str = "auto", confidence: float = 0.95) -> list[Group]:
        """One group for each file or top folder, the largest first. "auto" takes folders where there are at least two."""
        if by not in GROUPINGS:
            raise UserError(f"by must be one of {', '.join(GROUPINGS)}, got {by!r}.")
        folders, files = [_folder(name) for name in self.names], [file_of(name) for name in self.names]
        sources = folders if by == "folder" or (by == "auto" and len(set(folders)) > 1) else files
        members: dict[str, list[int]] = {}
        for document, source in enumerate(sources):
            members.setdefault(source, []).append(document)
        groups = [self._group(name, documents, confidence) for name, documents in members.items()]
        return sorted(groups, key=lambda group: (-group.evaluation.num_targets, group.name))

    def worst(self, count: int = 5) -> list[Group]:
        """The documents with the highest loss per token, short ones left out where there are others."""
        long = np.flatnonzero(self.targets >= SHORT_DOCUMENT)
        documents = long if len(long) else np.arange(self.num_documents)
        loss = self.nats[documents] / self.targets[documents]
        order = documents[np.argsort(-loss, kind="stable")][:count]
        return [self._group(self.names[document], [int(document)], 0.95) for document in order]

    def _group(self, name: str, documents: Sequence[int], confidence: float) -> Group:
        part = self.select(documents)
        return Group(name, part.num_documents, int(part.num_bytes.sum()), part.total(), part.interval(confidence))

    def select(self, documents: Sequence[int]) -> DocumentScores:
        """The scores of some documents."""
        rows = np.asarray(documents, dtype=np.int64)
        return DocumentScores([self.names[row] for row in rows], self.nats[rows], self.correct[rows], self.targets[rows], self.num_bytes[rows])

    def _sums(self) -> tuple[np.ndarray, ...]:
        return self.nats, self.correct, self.targets, self.num_bytes


@torch.no_grad()
def score_documents(
    model: Model,
    split: TokenSplit,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int = 8,
    *,
    stride: int | None = None,
    document_mask: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> DocumentScores:
    """Scores every target of the split once and adds up by document; stride as in `Windows` (the sliding window of Hugging Face's guide to
    perplexity). With the default stride, seq_len, every target is predicted from the same tokens as in `evaluate`.

    `progress(done, total)` is called after each batch with numbers of windows. Raises UserError for a seq_len beyond the model's context or a
    wrong stride, DataError for a split without a target.
    """
    if not 1 <= seq_len <= model.config.max_seq_len or batch_size < 1:
        raise UserError(f"seq_len must be within 1 and {model.config.max_seq_len} and batch_size >= 1, got {seq_len} and {batch_size}.")
    windows = Windows(split, seq_len, batch_size, document_mask=document_mask, stride=stride)
    byte_lengths, device = tokenizer.byte_lengths, model.embedding_weight.device
    ends = np.append(split.document_starts[1:], split.num_tokens)
    sums = np.zeros((4, split.num_documents))  # nats, correct, targets, bytes
    for index, here in enumerate(windows):
        batch = here.to(device)
        _, stats = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, return_stats=True)
        targets = here.targets.numpy()
        row, column = np.nonzero(targets != IGNORE)
        place = (index * batch_size + row) * windows.stride + column + 1  # of the target in the split
        document = np.searchsorted(ends, place, side="right")
        first = int(document.min()) if len(document) else 0
        losses, correct = (each.reshape(targets.shape).double().cpu().numpy()[row, column] for each in (stats.losses, stats.correct))
        for total, values in zip(sums, (losses, correct, np.ones(len(row)), byte_lengths[targets[row, column]])):
            added = np.bincount(document - first, weights=values)
            total[first : first + len(added)] += added
        if progress is not None:
            progress(min(windows.num_windows, (index + 1) * batch_size), windows.num_windows)
    scored = np.flatnonzero(sums[2])
    if not len(scored):
        raise DataError(f"{split!r} holds no token that could be predicted from one before it. Give more text.")
    names = split.document_names()
    nats, correct, targets, num_bytes = sums[:, scored]
    whole = (each.astype(np.int64) for each in (correct, targets, num_bytes))
    return DocumentScores([names[document] for document in scored], nats, *whole)


def _evaluation(nats: float, correct: float, targets: float, num_bytes: float) -> Evaluation:
    loss = nats / targets
    return Evaluation(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=nats / math.log(2) / max(1.0, num_bytes),
        accuracy=correct / targets,
        num_targets=int(targets),
        split_targets=int(targets),
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _folder(name: str) -> str:
    top, slash, _ = name.partition("/")
    return top + "/" if slash else "(no folder)"
