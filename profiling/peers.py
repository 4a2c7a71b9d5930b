"""The rivals: for whole steps a plain PyTorch GPT, as a careful PyTorch user writes it, also a readable reference of what is computed; for
generation a plain PyTorch Llama and llama.cpp.

Scaled-dot-product attention, fused AdamW, clip_grad_norm_, bf16 by autocast. B batch, T tokens, E width, H heads, V vocabulary.
"""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def make_batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Random tokens and targets (B, T), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len), generator=generator) for _ in range(2))
    return tokens, targets


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
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainStep:
    """One training step: forward, backward, clip, AdamW. Calling it returns the loss before the update."""

    def __init__(self, shape: Shape, precision: str, compile: bool = False, learning_rate: float = 1e-3, device: str = "cpu") -> None:
        self.model = PlainGPT(shape).to(device)
        self.device = device
        self.loss = torch.compile(self.model) if compile else self.model
        self.precision = precision
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)

    def __call__(self, tokens: Tensor, targets: Tensor) -> float:
        autocast = torch.autocast(self.device, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
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


# ---- generation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaShape:
    """A Llama to generate with: the same numbers build every contestant."""

    name: str
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int = 32000
    seq_len: int = 1024

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def num_weights(self) -> int:
        """Those that a decoded token reads: all matrices but the embedding."""
        attention = 2 * self.embed_dim * self.embed_dim + 2 * self.embed_dim * self.num_kv_heads * self.head_dim
        return self.num_layers * (attention + 3 * self.embed_dim * self.ffn_dim) + self.vocab_size * self.embed_dim


LLAMA_SHAPES = {
    shape.name: shape
    for shape in (
        LlamaShape("llama-tiny", 2, 64, 4, 2, 128, vocab_size=320, seq_len=64),  # to try the script
        LlamaShape("llama-125m", 12, 768, 12, 4, 2048),
        LlamaShape("llama-1b", 22, 2048, 32, 8, 5632),
    )
}


class PlainLlamaBlock(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        width, kv = shape.embed_dim, shape.num_kv_heads * shape.head_dim
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, size, bias=False) for size in (width, kv, kv))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, shape.ffn_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.ffn_dim, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        y = self.norm_1(x)  # (1, T, E)
        q, k, v = (each(y).unflatten(2, (-1, self.shape.head_dim)).transpose(1, 2) for each in (self.q, self.k, self.v))

        def rotated(t: Tensor) -> Tensor:
            low, high = t.chunk(2, dim=-1)
            return t * cos + torch.cat((-high, low), dim=-1) * sin

        end = start + x.shape[1]
        keys[:, :, start:end], values[:, :, start:end] = rotated(k), v
        causal = x.shape[1] > 1
        y = F.scaled_dot_product_attention(rotated(q), keys[:, :, :end], values[:, :, :end], is_causal=causal, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainLlama(nn.Module):
    """Prefill and greedy decoding with a preallocated cache, in plain PyTorch."""

    def __init__(self, shape: LlamaShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab_size, shape.embed_dim)
        self.blocks = nn.ModuleList(PlainLlamaBlock(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.embed_dim)
        self.output = nn.Linear(shape.embed_dim, shape.vocab_size, bias=False)
        self.to(dtype).requires_grad_(False)
        angles = torch.arange(shape.seq_len)[:, None] * 10000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.cos, self.sin = (f(angles).repeat(1, 2).to(dtype) for f in (torch.cos, torch.sin))  # (T, D)
        size = (shape.num_layers, 1, shape.num_kv_heads, shape.seq_len, shape.head_dim)
        self.keys, self.values = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
        self.length = 0

    def step(self, tokens: Tensor, start: int) -> int:
        """tokens (1, T) at positions from `start` on -> the likeliest next token."""
        x = self.tokens(tokens)
        end = start + tokens.shape[1]
        for block, keys, values in zip(self.blocks, self.keys, self.values):
            x = block(x, self.cos[start:end], self.sin[start:end], keys, values, start)
        return int(self.output(self.norm(x[:, -1])).argmax())

    @torch.no_grad()
    def alone(self, prompt: list[int], count: int) -> tuple[float, float]:
        """`count` greedy tokens after a prompt -> (seconds to the first token, seconds of all others)."""
        begun = time.perf_counter()
        token = self.step(torch.tensor([prompt]), 0)
        first = time.perf_counter()
        for i in range(count - 1):
            token = self.step(torch.tensor([[token]]), len(prompt) + i)
        return first - begun, time.perf_counter() - first


# What `make peers` installs: llama.cpp as a prebuilt library.
LLAMA_CPP = Path(sys.prefix) / "peers" / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"


class LlamaCpp:
    """The same through llama.cpp (llama_cpp_worker.py), with random weights of bf16, q8_0 (int8) or q4_0 (int4), in a process of its own.

    folder: where libllama lies, with whatever it loads. Raises RuntimeError where llama.cpp ends before it answers.
    """

    def __init__(self, folder: Path, shape: LlamaShape, weights: str, scratch: Path, threads: int, sequences: int = 1) -> None:
        from llama_cpp_model import write_model

        path = scratch / f"{shape.name}-{weights}.gguf"
        if not path.exists():
            write_model(path, asdict(shape), weights)
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        command = [sys.executable, str(worker), str(folder), str(path), str(shape.seq_len), str(threads), str(sequences)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()
        self.alone([1] * min(20, shape.seq_len // 2), 1)

    @staticmethod
    def is_present(folder: Path) -> bool:
        """Whether llama.cpp can take part."""
        return any(folder.glob("libllama*.so*")) and importlib.util.find_spec("gguf") is not None

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError("llama.cpp's process ended before it answered; its message stands above")
        return line

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def alone(self, prompt: list[int], count: int) -> tuple[float, float]:
        """`count` greedy tokens after a prompt -> (seconds to the first token, seconds of all others)."""
        answer = self._ask(alone=prompt, count=count)
        return answer["first"], answer["rest"]

    def together(self, prompts: list[list[int]], count: int, late: list[int] | None = None) -> dict[str, float]:
        """`count` tokens for each prompt at once; with `late` one more, asked for when all others have their first token -> seconds, late_first."""
        answer: dict[str, float] = self._ask(together=prompts, count=count, late=late)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
