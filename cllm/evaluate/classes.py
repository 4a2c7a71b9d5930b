"""What kinds of tokens a model predicts well: classes of tokens, their confusion matrix, top-5 accuracy and calibration.

A token's class is that of its text: whitespace, word, number or punctuation; rare are the tokens that make up the last 1 % of the training text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cllm.data.tokens.batch import IGNORE

if TYPE_CHECKING:
    from cllm.data import TokenSplit
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

CLASSES = ("whitespace", "word", "number", "punctuation", "rare")
RARE_SHARE = 0.01  # of the training tokens
BINS = 15  # of confidence, as in Guo et al. 2017 (arXiv 1706.04599)
_ROWS = 1024  # of logits at a time


def class_of_text(text: str) -> str:
    """The class of a token by its text: the kind of its first character that is not a blank."""
    stripped = text.strip()
    if not stripped:
        return "whitespace"
    first = stripped[0]
    return "word" if first.isalpha() or first == "\ufffd" else "number" if first.isnumeric() else "punctuation"


def classify(tokenizer: Tokenizer, counts: np.ndarray) -> np.ndarray:
    """tokenizer, how often each token occurs in the training text (V,) -> the index into CLASSES of each token, (V,) int64.

    Half of a character (a byte of a byte-level tokenizer) counts as a word, as most such characters are letters.
    """
    names = [class_of_text(tokenizer.decode([token])) for token in range(min(tokenizer.vocab_size, len(counts)))]
    classes = np.array([CLASSES.index(name) for name in names] + [CLASSES.index("rare")] * (len(counts) - len(names)), dtype=np.int64)
    order = np.argsort(counts, kind="stable")
    classes[order[np.cumsum(counts[order]) <= RARE_SHARE * counts.sum()]] = CLASSES.index("rare")
    return classes


@dataclass(frozen=True)
class ClassReport:
    """confusion[i, j]: targets of class i for which the likeliest token was of class j (C, C). calibration_error: the mean distance between
    confidence and accuracy over BINS bins (Guo et al. 2017)."""

    confusion: np.ndarray
    top5: float
    calibration_error: float
    num_targets: int

    def scores(self) -> dict[str, dict[str, float | None]]:
        """Precision, recall and F1 of each class; None where nothing was predicted (or there was nothing to predict)."""
        hits, said, there = np.diag(self.confusion), self.confusion.sum(0), self.confusion.sum(1)
        rows = {}
        for i, name in enumerate(CLASSES):
            precision = float(hits[i] / said[i]) if said[i] else None
            recall = float(hits[i] / there[i]) if there[i] else None
            f1 = float(2 * hits[i] / (said[i] + there[i])) if said[i] + there[i] else None
            rows[name] = {"precision": precision, "recall": recall, "f1": f1, "targets": int(there[i])}
        return rows

    def to_dict(self) -> dict[str, Any]:
        confusion = {name: dict(zip(CLASSES, map(int, row))) for name, row in zip(CLASSES, self.confusion)}
        return {
            "top5_accuracy": self.top5, "calibration_error": self.calibration_error, "class_targets": self.num_targets,
            "classes": self.scores(), "confusion": confusion,
        }  # fmt: skip


@torch.no_grad()
def report_classes(
    model: Model, split: TokenSplit, classes: np.ndarray, seq_len: int, batch_size: int = 8, *, document_mask: bool = True,
    max_targets: int = 16384, progress: Callable[[int, int], None] | None = None,
) -> ClassReport:  # fmt: skip
    """Classes, top-5 accuracy and calibration over at most about `max_targets` targets, in rows spread evenly over the split.

    `progress(done, total)` is called after each batch with numbers of tokens. Counts and sums are the same for any number of threads.
    """
    from cllm import kernels

    windows = split.windows(seq_len, batch_size, document_mask=document_mask).part(max(1, max_targets // seq_len))
    device = model.embedding_weight.device
    confusion = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    bins = np.zeros((BINS, 3))  # count, summed confidence, hits
    in_top5 = total = done = 0
    for here in windows:
        batch = here.to(device)
        hidden = model.hidden(batch.tokens, cu_seqlens=batch.cu_seqlens).reshape(-1, model.config.embed_dim)
        targets = here.targets.reshape(-1)
        rows = torch.nonzero(targets != IGNORE).squeeze(1)
        for some in rows.split(_ROWS):
            logits = kernels.matmul(hidden[some.to(device)], model.output_weight.T.to(hidden.dtype)).float()
            if model.config.softcap is not None:
                logits = model.config.softcap * torch.tanh(logits / model.config.softcap)
            shares, ranked = kernels.softmax(logits).topk(min(5, logits.shape[1]), dim=1)
            target, likeliest = targets[some].numpy(), ranked.cpu().numpy()
            confidence, hit = shares[:, 0].cpu().double().numpy(), likeliest[:, 0] == target
            in_top5 += int((likeliest == target[:, None]).any(axis=1).sum())
            np.add.at(confusion, (classes[target], classes[likeliest[:, 0]]), 1)
            which = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
            np.add.at(bins, which, np.stack([np.ones_like(confidence), confidence, hit], 1))
            total += len(some)
        done += here.tokens.numel()
        if progress is not None:
            progress(done, windows.num_rows * seq_len)
    error = float(np.abs(bins[:, 1] - bins[:, 2]).sum() / max(1, total))
    return ClassReport(confusion, in_top5 / max(1, total), error, total)
