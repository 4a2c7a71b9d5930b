"""Predicts the memory of a training run before it starts, by adding up what the step keeps alive at its peak (the end of the forward pass)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cllm.config.model import ModelConfig
from cllm.runtime.device import free_memory
from cllm.runtime.errors import UserError, is_out_of_memory
from cllm.runtime.gpu import gpu_of

# Logits exist only in chunks of rows; this is what a chunk and the packed panels of a matrix product may take on a CPU.
LOGIT_ROWS = 1024
CPU = torch.device("cpu")
# Python, torch and compiled kernels, before any tensor: measured 0.35 to 0.5 GB.
PROCESS_BYTES = 450 << 20


# Of memory that a step on a CPU and its evaluation may take as recorded programs. Larger ones run operation by operation: Python's share is small.
MOST_PROGRAM_BYTES = 256 << 20


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of each part of a training process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int = PROCESS_BYTES
    checkpoint: int = 0
    logit_rows: int = LOGIT_ROWS
    program: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        kept = self.weights + self.gradients + self.optimizer + self.update + self.checkpoint + self.program
        return kept + self.activations + self.logits + self.process

    def rows(self) -> list[tuple[str, int, str]]:
        """(part, bytes, what it counts), largest first."""
        parts = [
            ("weights", self.weights, "float32 masters"),
            ("gradients", self.gradients, "float32"),
            ("optimizer", self.optimizer, "float32 moments, averages of the weights"),
            ("activations", self.activations, "kept for the backward of one microbatch"),
            ("logits", self.logits, f"one chunk of {self.logit_rows:,} rows and the gradient of the output matrix"),
            ("process", self.process, "Python, torch, compiled kernels"),
            *([("update", self.update, "what Muon computes its updates in")] if self.update else []),
            *([("checkpoint", self.checkpoint, "the copy that is written while training goes on")] if self.checkpoint else []),
            *([("program", self.program, "recorded step and evaluation: activations, gradients, logits")] if self.program else []),
        ]
        return sorted(parts, key=lambda part: -part[1])


RECOMPUTE = ("none", "feed_forward", "blocks")  # what the backward computes again, in rising order of work


def predict(
    config: ModelConfig, batch_size: int, seq_len: int, precision: str = "fp32", recompute: str = "none",
    optimizer: str = "adamw", average: bool = False, background_checkpoint: bool = False, device: torch.device = CPU,
) -> MemoryPrediction:  # fmt: skip
    """The memory of training with microbatches of batch_size x seq_len tokens on `device`. `average`: an average of the weights is kept;
    `background_checkpoint`: checkpoints are written from a copy, which lies in the host's memory where training runs on a GPU."""
    parameters, tokens = config.num_parameters(), batch_size * seq_len
    width = 4 if precision == "fp32" else 2
    queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
    # Per token and layer: the residual stream and its normalised copy, twice; q, k, v before and after norm or rotation; the attention's
    # output; the input of the feed-forward's activation, and with a gate what it multiplies.
    branches = 4 * config.embed_dim + 2 * (queries + 2 * keys) + queries
    activated = config.ffn_size * (2 if config.gated else 1)
    per_layer = branches * width + 4 * (config.num_heads + 2) + (activated * width if recompute == "none" else 0)
    per_token = config.num_layers * per_layer + 3 * config.embed_dim * width + 8 * len(config.ngram_tables)
    if recompute == "blocks":  # both streams between the blocks, and one block as a whole
        per_token = (2 * config.num_layers + 3) * config.embed_dim * width + per_layer + activated * width
    feed_forward = tokens * config.ffn_size * width * (3 if config.gated else 2)  # hidden values and gradients of one layer at a time
    logits, logit_rows = _logit_bytes(config, tokens, width, device)
    state = _optimizer_bytes(config, optimizer) + (4 * parameters if average else 0)
    activations = tokens * per_token + feed_forward
    evaluated = tokens * (branches + activated + 3 * config.embed_dim) * width + min(LOGIT_ROWS, tokens) * config.vocab_size * width
    recorded = 4 * parameters + activations + logits + evaluated
    return MemoryPrediction(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=state,
        activations=activations,
        logits=logits,
        program=recorded if device.type == "cpu" and recorded <= MOST_PROGRAM_BYTES else 0,
        checkpoint=4 * parameters + state if background_checkpoint and device.type == "cpu" else 0,
        logit_rows=logit_rows,
        update=_update_bytes(config) if optimizer == "muon" and device.type == "cpu" else 0,
    )


def _update_bytes(config: ModelConfig) -> int:
    """Of Muon's work space for the matrices inside the blocks, as `cllm/model/layers.py` shapes them."""
    from cllm.kernels.muon import work_bytes

    embed, ffn = config.embed_dim, config.ffn_size
    queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
    if config.norm == "layer":
        block = [(embed, 3 * embed), (embed, embed), (embed, ffn), (ffn, embed)]
    else:
        block = [(queries, embed), (keys, embed), (keys, embed), (embed, queries), *[(ffn, embed)] * (2 if config.gated else 1), (embed, ffn)]
    return work_bytes(block * config.num_layers)


def _logit_bytes(config: ModelConfig, tokens: int, width: int, device: torch.device) -> tuple[int, int]:
    """Bytes of the logits of one chunk with what else the loss makes of the output matrix, and the rows of the chunk."""
    matrix = config.vocab_size * config.embed_dim
    if device.type != "cuda":
        rows = min(LOGIT_ROWS, tokens)
        return rows * config.vocab_size * 4 + 4 * matrix, rows
    from cllm.kernels.triton.linear_cross_entropy import row_chunks

    dtype = torch.float32 if width == 4 else torch.bfloat16
    chunks = row_chunks(tokens, config.vocab_size, dtype, gpu_of(device))
    rows = chunks[0].stop if chunks else 0
    # Its gradient, the same times the gradient of the loss, and with several chunks the part of one; in a small dtype the rounded matrix as well.
    return rows * config.vocab_size * width + (4 * (2 + (len(chunks) > 1)) + (width if width < 4 else 0)) * matrix, rows


def _optimizer_bytes(config: ModelConfig, optimizer: str) -> int:
    """Two float32 numbers for each parameter; Lion has one, and so has Muon for what is no table."""
    parameters = config.num_parameters()
    if optimizer == "muon":
        tables = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
        tables += config.max_seq_len * config.embed_dim if config.position == "learned" else 0
        tables += config.ngram_parameters
        return 4 * (parameters + tables)
    return (4 if optimizer == "lion" else 8) * parameters


RESERVE = 0.9  # of the free memory that a plan may take: the allocator keeps some, and so do kernels


def choose_recompute(
    asked: str, config: ModelConfig, batch_size: int, seq_len: int, precision: str, device: torch.device, **run: Any
) -> tuple[str, str]:
    """What the backward computes again, for "auto" the least that lets the run fit, and why. run: what else `predict` takes of the run."""
    if asked != "auto":
        return asked, "asked for"
    room = RESERVE * free_memory(device)
    for choice in RECOMPUTE:
        needed = predict(config, batch_size, seq_len, precision, choice, device=device, **run).total
        if needed <= room:
            return choice, f"{needed / 1e9:.1f} GB predicted, {room / 1e9:.1f} GB to be had"
    return RECOMPUTE[-1], f"{needed / 1e9:.1f} GB predicted is more than the {room / 1e9:.1f} GB to be had"


def check_weights_fit(config: ModelConfig) -> None:
    """UserError for a model whose weights alone are more than the memory to be had, before they are made: that could take the machine with it."""
    needed, room = 4 * config.num_parameters(), free_memory(torch.device("cpu"))
    if needed > room:
        raise UserError(
            f"the weights of this model ({config.num_parameters():,} parameters) need {needed / 1e9:,.1f} GB, and {room / 1e9:,.1f} GB of memory "
            "are free. Choose a smaller --preset, or a smaller --embed-dim, --ffn-dim or --vocab-size or fewer --num-layers."
        )


def check_training_fits(memory: MemoryPrediction, batch_size: int, seq_len: int, recompute: str, device: torch.device) -> None:
    """UserError for a training that cannot fit on `device`, before anything of it is made.

    Weights, gradients and optimizer are known to the byte. Activations are a prediction, and what other programs hold may be given back, so that
    the whole counts as too much only where it is twice what is free.
    """
    free = free_memory(device)
    if memory.weights + memory.gradients + memory.optimizer > free or memory.total > 2 * free:
        raise UserError(out_of_memory(memory, batch_size, seq_len, recompute))


@contextmanager
def explained_out_of_memory(config: ModelConfig, batch_size: int, seq_len: int, precision: str, recompute: str, **run: Any) -> Iterator[None]:
    """Turns the allocator's error into one that names the largest consumers and the options that would help. run: what else `predict` takes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory(predict(config, batch_size, seq_len, precision, recompute, **run), batch_size, seq_len, recompute)) from error


def out_of_memory(memory: MemoryPrediction, batch_size: int, seq_len: int, recompute: str) -> str:
    largest = ", ".join(f"{name} {count / 1e9:.2f} GB" for name, count, _ in memory.rows()[:3])
    helps = []
    if batch_size > 1:
        helps.append(f"--batch-size {batch_size // 2} with twice the --grad-accum (the same result)")
    if recompute != RECOMPUTE[-1]:
        helps.append("--set train.recompute=blocks (the same bits, a third more work)")
    helps.append(f"--seq-len {seq_len // 2}" if seq_len > 64 else "a smaller --preset")
    return f"out of memory. A step needs about {memory.total / 1e9:.2f} GB, most of it for {largest}. What helps: {'; '.join(helps)}."
