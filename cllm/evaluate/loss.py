"""How well a model predicts a split of tokens: every target of it, or of a part of it, once and in order, summed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cllm.data.tokens.batch import IGNORE
from cllm.evaluate.programs import EvaluationPrograms
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.quantities import counted

if TYPE_CHECKING:
    from cllm.data import TokenSplit
    from cllm.data.tokens.batch import EvaluationBatches
    from cllm.model.model import Model


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts `num_targets` of the `split_targets` tokens of a split.

    loss: nats per token. bits_per_byte: comparable between tokenizers. accuracy: share of tokens that the model ranks first.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    num_targets: int
    split_targets: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def extent(self) -> str:
        """What was evaluated, in words: "all 2,000,000 tokens" or "131,072 of 2,000,000 tokens"."""
        tokens = counted(self.split_targets, "token")
        if self.num_targets < self.split_targets:
            return f"{self.num_targets:,} of {tokens}"
        return tokens if self.split_targets == 1 else f"all {tokens}"

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:,.2f}, {self.bits_per_byte:.4f} bits per byte, "
            f"next-token accuracy {100 * self.accuracy:.2f} % on {self.extent}"
        )


def evaluate(
    model: Model,
    split: TokenSplit,
    seq_len: int,
    batch_size: int = 8,
    *,
    document_mask: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The mean cross entropy of the model's own logits over all targets of the split, without smoothing or z-loss.

    `progress(done, total)` is called after each batch with numbers of tokens. Raises UserError for a seq_len beyond the model's context,
    DataError for a split without a target.
    """
    if not 1 <= seq_len <= model.config.max_seq_len or batch_size < 1:
        raise UserError(f"seq_len must be within 1 and {model.config.max_seq_len} and batch_size >= 1, got {seq_len} and {batch_size}.")
    whole = split.windows(seq_len, batch_size, document_mask=document_mask)
    if not whole.num_targets:
        raise DataError(f"{split!r} holds no token that could be predicted from one before it. Give more text.")
    return evaluate_part(model, whole, whole, progress)


@torch.no_grad()
def evaluate_part(
    model: Model, part: EvaluationBatches, whole: EvaluationBatches, progress: Callable[[int, int], None] | None = None,
    programs: EvaluationPrograms | None = None,
) -> Evaluation:  # fmt: skip
    """The same over `part`, some of the rows of `whole`. Both have targets. programs: those of the model, where they are kept from call to call."""
    programs = programs or EvaluationPrograms(model)
    nats, correct, num_targets, rows = 0.0, 0, 0, 0
    device = model.embedding_weight.device
    for here in part:
        batch = here.to(device)
        with model.torch_aside():
            losses, ranked_first = programs.losses(batch)
        nats += float(losses.double().sum())
        correct += int(ranked_first.sum())
        num_targets += here.num_targets
        rows += len(here.tokens)
        if progress is not None:
            progress(rows * here.tokens.shape[1], part.num_rows * here.tokens.shape[1])
    loss = nats / num_targets
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / max(1.0, part.num_bytes),
        accuracy=correct / num_targets,
        num_targets=num_targets,
        split_targets=whole.num_targets,
    )


def unigram_loss(batches: EvaluationBatches, train: TokenSplit) -> float:
    """Nats per target of a model that knows only how frequent each token is in the training split: what a language model must beat.

    Each token counts once more than it was seen there, so that a token that training never saw is unlikely and not impossible.
    """
    seen = train.token_counts().astype(np.float64) + 1.0
    counts = np.zeros(len(seen), dtype=np.int64)
    for batch in batches:
        targets = batch.targets[batch.targets != IGNORE].numpy()
        counts += np.bincount(targets, minlength=len(counts))
    return float(-(counts * np.log(seen / seen.sum())).sum() / counts.sum())
