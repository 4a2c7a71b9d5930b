"""How well a model predicts a whole split of tokens: every target once, in order, summed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from cllm.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    from cllm.data import TokenSplit
    from cllm.model.model import Model


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token; bits_per_byte: comparable between tokenizers; accuracy: share of tokens that the model ranks first."""

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    num_targets: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:,.2f}, {self.bits_per_byte:.4f} bits per byte, "
            f"next-token accuracy {100 * self.accuracy:.2f} % over {self.num_targets:,} tokens"
        )


@torch.no_grad()
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
    nats, correct, num_targets, done = 0.0, 0, 0, 0
    device = model.embedding_weight.device
    for here in split.windows(seq_len, batch_size, document_mask=document_mask):
        batch = here.to(device)
        _, stats = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, return_stats=True)
        nats += float(stats.losses.double().sum())
        correct += int(stats.correct.sum())
        num_targets += here.num_targets
        done += batch.tokens.numel()
        if progress is not None:
            progress(min(done, split.num_tokens), split.num_tokens)
    if not num_targets:
        raise DataError(f"{split!r} holds no token that could be predicted from one before it. Give more text.")
    loss = nats / num_targets
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / max(1, split.num_bytes),
        accuracy=correct / num_targets,
        num_targets=num_targets,
    )
