"""The rival for whole steps: a plain PyTorch GPT, as a careful PyTorch user writes it. Also a readable reference of what is computed.

Scaled-dot-product attention, fused AdamW, clip_grad_norm_, bf16 by autocast. B batch, T tokens, E width, H heads, V vocabulary.
"""

import contextlib
import importlib.util
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """One training problem: the same numbers build the rival and our model."""

    name: str
    num_layers: int
    num_heads: int
    embed_dim: int
    vocab_size: int
    seq_len: int
    batch_size: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 2, 2, 64, 97, 32, 4),  # to try the scripts
        Shape("shakespeare-cpu", 4, 4, 128, 65, 64, 12),  # nanoGPT's recipe for a laptop
        Shape("shakespeare", 6, 6, 384, 65, 256, 16),  # nanoGPT's character model
        Shape("gpt2-short", 12, 12, 768, 50304, 64, 4),  # llm.c's CPU recipe
        Shape("gpt2", 12, 12, 768, 50304, 1024, 1),
    )
}


class PlainBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.embed_dim
        self.num_heads = shape.num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, E)
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, self.num_heads, -1).transpose(1, 2) for y in self.qkv(self.norm_1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2's architecture; the output projection is the token embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.embed_dim)
        self.positions = nn.Embedding(shape.seq_len, shape.embed_dim)
        self.blocks = nn.Sequential(*(PlainBlock(shape) for _ in range(shape.num_layers)))
        self.norm = nn.LayerNorm(shape.embed_dim)
        for name, value in self.named_parameters():
            if value.dim() > 1:
                scale = (2 * shape.num_layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(value, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(value)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainStep:
    """One training step: forward, backward, clip, AdamW. Calling it returns the loss before the update."""

    def __init__(self, shape: Shape, precision: str, compile: bool = False, learning_rate: float = 1e-3) -> None:
        self.model = PlainGPT(shape)
        self.loss = torch.compile(self.model) if compile else self.model
        self.precision = precision
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)

    def __call__(self, tokens: Tensor, targets: Tensor) -> float:
        autocast = torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        with autocast:
            loss = self.loss(tokens, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


class NanoGPTStep:
    """A training step of nanoGPT's own model, from the user's copy of its model.py (github.com/karpathy/nanoGPT, MIT licence)."""

    def __init__(self, path: Path, shape: Shape, precision: str, learning_rate: float = 1e-3) -> None:
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise SystemExit(f"{path} is not nanoGPT's model.py. Give the path of that file.")
        nanogpt = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = nanogpt
        spec.loader.exec_module(nanogpt)
        config = nanogpt.GPTConfig(
            block_size=shape.seq_len, vocab_size=shape.vocab_size, n_layer=shape.num_layers, n_head=shape.num_heads, n_embd=shape.embed_dim,
            dropout=0.0, bias=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = nanogpt.GPT(config)
            self.optimizer = self.model.configure_optimizers(0.1, learning_rate, (0.9, 0.99), "cpu")
        self.precision = precision

    def __call__(self, tokens: Tensor, targets: Tensor) -> float:
        autocast = torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        with autocast:
            _, loss = self.model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()
