"""The language model, one class for training and inference.

    model = Model(ModelConfig.preset("cllm-15m"), seed=0)
    loss = model.loss(tokens, targets)            # training: never holds all logits
    logits = model(tokens)                        # (B, T, V)
    cache = model.make_cache(batch=1, max_len=256)
    logits = model(tokens, cache=cache)           # appends to the cache; prefill and decoding are the same call

Parameters normally stay float32; `model.compute_dtype = torch.bfloat16` makes the activations bfloat16 while the
kernels round the weights as they read them. Names, shapes and layouts of the parameters are Hugging Face's (see
`cllm.model.layers`).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cllm import kernels, runtime
from cllm.config.model import ModelConfig
from cllm.kernels.decoding import make_decoder, make_paged_decoder
from cllm.kernels.quantization import quantize, quantize4
from cllm.kernels.quantized import packing_pays, quantized_matmul
from cllm.kernels.stack import Decoder, Linear, Packed, PagedDecoder, Stack
from cllm.kernels.strips import pack
from cllm.model.cache import DeviceCache, KVCache
from cllm.model.device_steps import DeviceSteps
from cllm.model.layers import Context, GPT2Backbone, LlamaBackbone, Weights, moved_by
from cllm.model.pages import DeviceTokens, PageBatch, PagePool, Part
from cllm.model.rope import rotary_tables
from cllm.runtime.errors import UserError
from cllm.runtime.huge_pages import HugePages

if TYPE_CHECKING:
    from cllm.config.lora import LoraConfig

INIT_STD = 0.02
MOST_DECODED = 64  # tokens of one step that are taken through the layers in one call, where a backend takes so many
# The last matrix of each branch: what it writes is added to the residual stream, 2 * num_layers times.
NGRAMS = ("embed_bigrams.weight", "embed_trigrams.weight")  # added to the token embedding: they begin with nothing
RESIDUAL_PROJECTIONS = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "attn.c_proj.weight", "mlp.c_proj.weight")


class Model(nn.Module):
    """A decoder-only transformer of either family. `seed` fixes the initial weights, whatever the thread count and the
    global RNG; on `torch.device("meta")` nothing is allocated or drawn.

    `recompute` says what the backward computes again instead of keeping it: "none", "feed_forward" (the activation's
    inputs) or "blocks" (everything inside a block, a third more work; Chen et al. 2016, arXiv 1604.06174). The bits are
    the same."""

    lora: "LoraConfig | None" = None  # of the adapters that alone train (`lora.py`)

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        if config.family == "cllm":
            self.model = LlamaBackbone(config)
        else:
            self.transformer = GPT2Backbone(config)
        self.lm_head = None if config.tie_embeddings else Weights(config.vocab_size, config.embed_dim)
        self._compute_dtype: torch.dtype | None = None
        self._kv_cache: str | None = None
        self.recompute = "none"
        self._packed_output: Packed | None = None
        self._packed_as = ""
        self._rotary_tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.initialise(seed)

    @property
    def backbone(self) -> LlamaBackbone | GPT2Backbone:
        return self.model if self.config.family == "cllm" else self.transformer

    @property
    def embedding_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.config.family == "cllm" else self.transformer.wte.weight

    @property
    def output_weight(self) -> Tensor:
        """The matrix (V, E) that turns the last hidden state into logits; the token embedding itself when they are
        tied."""
        if self._packed_output is not None:
            return self._packed_output.dense(self.compute_dtype)
        return self.embedding_weight if self.lm_head is None else self.lm_head.weight

    @property
    def is_packed(self) -> bool:
        """Whether `quantize_` or `pack_` has taken the matrices."""
        return self._packed_output is not None

    def quantize_(self, bits: int = 8) -> "Model":
        """Every matrix but the look-up tables becomes int8 or, with 4 bits, int4 (`cllm.kernels.quantization`); for generation and evaluation only,
        from then on."""
        if bits not in (4, 8):
            raise UserError(f"quantize_ takes 8 or 4 bits, got {bits}.")
        return self._pack_(quantize if bits == 8 else quantize4, f"int{bits}")

    def pack_(self) -> "Model":
        """Where it pays, on a CPU, every matrix but the look-up tables is laid out anew in the order in which decoding reads it
        (`cllm.kernels.strips`), rounded to the compute dtype, which is fixed from then on as the products round anyway. The bits of all results
        are the same; for generation and evaluation only."""
        dtype = self.compute_dtype
        if dtype not in (torch.float32, torch.bfloat16) or not packing_pays(dtype, self.embedding_weight.device.type):
            return self
        return self._pack_(partial(pack, dtype=dtype), f"packed for {dtype}".replace("torch.", ""))

    @torch.no_grad()
    def _pack_(self, each: Callable[[Tensor], Packed], name: str) -> "Model":
        if not self.is_packed:
            self._compute_dtype, self._packed_as = self.compute_dtype, name
            pages = HugePages()

            def packed(weight: Tensor) -> Packed:
                made = each(weight)
                return made.moved(pages.copy) if weight.device.type == "cpu" else made

            for block in self.backbone.blocks:
                for module in block.modules():
                    if isinstance(module, Weights) and module.weight.dim() == 2:
                        module.pack_(packed)
            self._packed_output = packed(self.output_weight)
            self.lm_head = None
            self.requires_grad_(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Model":
        super()._apply(fn, recurse)
        self._packed_output = moved_by(fn, self._packed_output)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_packed:
            again = f"without weights={self._packed_as!r}" if self._packed_as.startswith("int") else "and leave out pack_()"
            raise UserError(f"the weights are {self._packed_as}, for generation only, and cannot be saved or exported. Load the model again {again}.")
        return super().state_dict(*args, **kwargs)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations: what was set, else the parameters' own (so that `model.double()` computes in
        float64)."""
        return self.embedding_weight.dtype if self._compute_dtype is None else self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"compute_dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}.")
        if self.is_packed and not self._packed_as.startswith("int") and dtype != self.compute_dtype:
            raise UserError(f"the weights are {self._packed_as}; set compute_dtype before pack_().")
        self._compute_dtype = dtype

    @property
    def kv_cache(self) -> str | None:
        """None for keys and values in the compute dtype, or "int8": for each token and head int8 and one float32 scale (`quantize_rows` of
        `cllm.kernels.quantization`). It holds for pools of pages that are made afterwards, and all that is computed without a cache attends to what
        such a pool would give back, so that it predicts as with the pool, bit for bit on a CPU. For generation and evaluation."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kind: str | None) -> None:
        if kind not in (None, "int8"):
            raise UserError(f"kv_cache must be None or 'int8', got {kind!r}.")
        self._kv_cache = kind

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the keys and values in `make_pool`."""
        return torch.int8 if self._kv_cache == "int8" else self.compute_dtype

    def torch_aside(self) -> AbstractContextManager[None]:
        """A scope with torch on the calling thread only, while our workers do this model's work: torch's own threads would wait for their next loop
        on the cores that the workers need. Where torch's kernels serve (float64, other devices) it keeps its threads."""
        return runtime.threads.torch_alone() if self.is_ours() else nullcontext()

    def is_ours(self) -> bool:
        """Whether our kernels do this model's work, on a CPU."""
        on_cpu = self.embedding_weight.device.type == "cpu"
        return on_cpu and runtime.plan("matmul", ((1, 1), (1, 1)), self.compute_dtype).backend != "torch"

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """GPT-2's initialisation (Radford et al. 2019, section 2.3, and its released code): matrices and embeddings
        N(0, 0.02), those that write to the residual stream divided by sqrt(2 * num_layers), biases 0, norms 1, embeddings
        of n-grams 0. Each tensor has its own generator, keyed by seed and name."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            if name.endswith(NGRAMS):
                parameter.zero_()
                continue
            std = INIT_STD / math.sqrt(2 * self.config.num_layers) if name.endswith(RESIDUAL_PROJECTIONS) else INIT_STD
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.copy_(drawn.normal_(0.0, std, generator=generator))

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None, cu_seqlens: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 -> the normalised last hidden state (B, T, E) in the compute dtype.

        With `cu_seqlens` (int32, documents packed over the B * T flattened tokens) each document sees only itself and
        its positions start at 0, as if it stood alone; without, the rows of a batch are independent anyway. `positions`
        (B * T,) are those of `document_positions` where the caller has them already, and the bounds are then not checked.
        A cache and cu_seqlens exclude each other.
        """
        return self._hidden(tokens, cache, cu_seqlens, positions)[0]

    def _hidden(
        self, tokens: Tensor, cache: KVCache | None, cu_seqlens: Tensor | None, positions: Tensor | None, tied: bool = False,
        dropout: kernels.Dropout | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What `hidden` returns, and with `tied` the output matrix that `tied_embedding` hands on."""
        if tokens.dim() != 2 or not tokens.numel():
            raise UserError(f"tokens must be (batch, tokens) and not empty, got the shape {tuple(tokens.shape)}.")
        batch, length = tokens.shape
        if cu_seqlens is not None:
            if cache is not None:
                raise UserError("a cache cannot hold packed documents; leave out cache or cu_seqlens.")
            if positions is None:
                positions = self.document_positions(cu_seqlens, tokens.numel()).to(tokens.device)
            tokens = tokens.reshape(1, -1)
        else:
            start = 0 if cache is None else cache.length
            if start + length > self.config.max_seq_len:
                raise UserError(
                    f"{start + length} tokens are longer than the model's context of {self.config.max_seq_len} "
                    "(max_seq_len). Shorten the input or train with a longer context."
                )
            if cache is not None:
                cache.check_room(batch, length)
            if start:
                positions = torch.arange(start, start + length, device=tokens.device)
        tables = self.rotary_tables(tokens.device) if self.config.position == "rotary" else None
        context = Context(positions, tables, cu_seqlens, cache, self.config.window_or_none, self.recompute, tied, dropout, length, self._kv_cache)
        with _gradients_unless(cache):
            x = self.backbone(tokens, context, self.compute_dtype)
        if cache is not None:
            cache.advance(length)
        return x.view(batch, length, -1), context.output_weight

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None, cu_seqlens: Tensor | None = None, last_only: bool = False) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) in the compute dtype, (B, 1, V) with `last_only`. A cache is appended
        to."""
        with _gradients_unless(cache):
            decoder = None if cache is None or cu_seqlens is not None else self._decoder(tokens, cache)
            if decoder is not None and cache is not None:
                context = Context(torch.tensor([cache.length]), None, None, cache, None)
                x = self.backbone.embed(tokens, context, self.compute_dtype)[:, 0]
                logits = decoder(x, cache.length)[:, None]
                cache.advance(1)
            else:
                x = self.hidden(tokens, cache=cache, cu_seqlens=cu_seqlens)
                logits = self._logits(x[:, -1:] if last_only else x)
            return self._capped(logits)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: DeviceCache) -> Tensor:
        """The newest token of each row, tokens (B,), into the cache -> logits (B, V) of the next. The host waits for nothing and decides nothing, so
        that a CUDA graph can hold the whole of it."""
        tables = self.rotary_tables(tokens.device) if self.config.position == "rotary" else None
        context = Context(cache.positions(), tables, None, cache, self.config.window_or_none)
        x = self.backbone(tokens.unsqueeze(1), context, self.compute_dtype)
        cache.advance()
        return self._capped(self._logits(x))[:, 0]

    @torch.no_grad()
    def step(self, pool: PagePool, parts: Sequence[Part]) -> Tensor:
        """The newest tokens of some sequences into their pages -> logits (W, V) of the wanted ones, part after part.

        Each row has the bits that it has alone, in one part or in several, on any number of workers (on a CPU). Raises UserError for a position
        outside the model's context.
        """
        longest = max(part.start + len(part.tokens) for part in parts)
        if longest > self.config.max_seq_len:
            raise UserError(f"{longest} tokens are longer than the model's context of {self.config.max_seq_len} (max_seq_len).")
        with pool.current():
            return self._step(pool, PageBatch(pool, parts))

    def _step(self, pool: PagePool, batch: PageBatch) -> Tensor:
        decoder = self._paged_decoder(pool)
        if decoder is not None and batch.num_tokens <= decoder.most_tokens:
            logits = decoder(batch) if isinstance(decoder, DeviceSteps) else self._capped(decoder(*batch.lists()))
            return logits if batch.wants_all else logits[batch.wanted]
        return self._over_pages(batch.tokens.unsqueeze(0), batch.positions, batch, batch.wanted)

    def _over_pages(self, tokens: Tensor, positions: Tensor, pages: PageBatch | DeviceTokens, wanted: Tensor | None = None) -> Tensor:
        """tokens (1, N) and positions (N,) -> logits (N, V), or (W, V) of those that are wanted."""
        tables = self.rotary_tables(tokens.device) if self.config.position == "rotary" else None
        context = Context(positions, tables, None, pages, self.config.window_or_none)
        x = self.backbone(tokens, context, self.compute_dtype)[0]
        return self._capped(self._logits(x if wanted is None else x[wanted]))

    def make_pool(self, num_pages: int) -> PagePool:
        """Pages for the keys and values of many sequences (`step`), as `kv_cache` says."""
        return PagePool(self.config, num_pages, self.cache_dtype, self.embedding_weight.device)

    def _logits(self, x: Tensor) -> Tensor:
        """The last hidden state (B, T, E) -> (B, T, V), not capped."""
        if self._packed_output is None:
            return kernels.matmul(x, self.output_weight.T)
        return quantized_matmul(x, self._packed_output)

    def _capped(self, logits: Tensor) -> Tensor:
        softcap = self.config.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _decoder(self, tokens: Tensor, cache: KVCache) -> Decoder | None:
        """What takes one token for each sequence through the layers in one call; None where the layers have to do it."""
        room = cache.length < min(cache.max_len, self.config.max_seq_len)
        if tokens.shape != (cache.batch, 1) or not room or torch.compiler.is_compiling():
            return None
        key = (self.embedding_weight.data_ptr(), self.is_packed, self.compute_dtype, runtime.settings())
        if cache.decoder is None or cache.decoder[0] != key:
            cache.decoder = key, make_decoder(self._stack(), cache.keys, cache.values, self.compute_dtype)
        return cache.decoder[1]

    def _paged_decoder(self, pool: PagePool) -> PagedDecoder | DeviceSteps | None:
        """What takes a few tokens of any sequences through the layers in one call; None where the layers have to do it."""
        key = (self.embedding_weight.data_ptr(), self.is_packed, self.compute_dtype, runtime.settings())
        if pool.decoder is None or pool.decoder[0] != key:
            pool.decoder = None  # its memory is free before the next is made
            if _is_on_a_gpu(pool):
                logits = torch.empty((MOST_DECODED, self.config.vocab_size), dtype=self.compute_dtype, device=pool.device)
                pool.decoder = key, DeviceSteps(self._over_pages, pool.layers, logits)
            else:
                pool.decoder = key, make_paged_decoder(self._stack(), pool.keys, pool.values, self.compute_dtype, MOST_DECODED, pool.scales)
        return pool.decoder[1]

    def _stack(self) -> Stack:
        config = self.config
        output = Linear(self.output_weight if self._packed_output is None else self._packed_output)
        return Stack(
            [block.decoding() for block in self.backbone.blocks], self.backbone.decoding_norm(), output, config.head_size,
            config.activation_name, config.eps, self.rotary_tables(self.embedding_weight.device) if config.position == "rotary" else None,
            config.window_or_none or 0, *self.backbone.decoding_embeddings(),
        )  # fmt: skip

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        divisor: float | None = None,
        cu_seqlens: Tensor | None = None,
        return_stats: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        positions: Tensor | None = None,
        dropout: kernels.Dropout | None = None,
    ) -> Any:
        """Mean cross entropy in nats over targets (B, T) that are not -100, or their sum / `divisor`. `return_stats`
        adds a `LossStats` (per-token losses, correct, log-sum-exp). Logits exist only in chunks. With `dropout`, for
        training alone, of the embedding, of the probabilities of attention, and of the output of each branch, before
        it is added to the residual stream: where GPT-2 has it (Radford et al. 2019)."""
        if targets.shape != tokens.shape:
            raise UserError(f"targets must have the shape of tokens {tuple(tokens.shape)}, got {tuple(targets.shape)}.")
        tied = self.lm_head is None and not self.is_packed
        x, output_weight = self._hidden(tokens, None, cu_seqlens, positions, tied, dropout)
        return kernels.linear_cross_entropy(
            x,
            self.output_weight if output_weight is None else output_weight,
            targets,
            softcap=self.config.softcap,
            divisor=divisor,
            return_stats=return_stats,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )

    def make_cache(self, batch: int, max_len: int | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens (default: the model's context), in the compute dtype."""
        if self._kv_cache is not None:
            raise UserError(f"a cache of {self._kv_cache} lies in pages: use make_pool and step, or an Engine. make_cache needs kv_cache None.")
        max_len = self.config.max_seq_len if max_len is None else max_len
        if batch < 1 or not 1 <= max_len <= self.config.max_seq_len:
            raise UserError(f"a cache needs batch >= 1 and max_len from 1 to {self.config.max_seq_len}, got {batch} and {max_len}.")
        return KVCache(self.config, batch, max_len, self.compute_dtype, self.embedding_weight.device)

    def rotary_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, (max_seq_len, D/2) float32: not parameters, not in the state dict, float32 in every compute
        dtype."""
        if device not in self._rotary_tables:
            self._rotary_tables[device] = rotary_tables(self.config, device)
        return self._rotary_tables[device]

    def forget_positions(self) -> None:
        """After a change of the config: the tables of positions are made anew."""
        self._rotary_tables.clear()

    def document_positions(self, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
        """cu_seqlens (n + 1,) -> the place of each token in its own document, (num_tokens,) int64."""
        bounds = cu_seqlens.to("cpu", torch.int64)
        lengths = bounds.diff()
        if bounds.numel() < 2 or bounds[0] != 0 or bounds[-1] != num_tokens or bool((lengths < 0).any()):
            raise UserError(f"cu_seqlens must rise from 0 to the number of tokens {num_tokens}, got {_short(bounds)}.")
        if int(lengths.max()) > self.config.max_seq_len:
            raise UserError(
                f"cu_seqlens holds a document of {int(lengths.max())} tokens, longer than the model's context of "
                f"{self.config.max_seq_len}. Split it at the rows of the batch."
            )
        return torch.arange(num_tokens) - torch.repeat_interleave(bounds[:-1], lengths)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def summary(self) -> str:
        """A table of the parameters, equal layers on one line."""
        rows = [f"{'parameter':<50} {'shape':>16} {'count':>14}"]
        for name, shape, layers in self._parameter_groups():
            count = math.prod(shape) * layers
            rows.append(f"{name:<50} {' x '.join(map(str, shape)):>16} {count:>14,}")
        rows.append(f"{'total':<50} {'':>16} {self.num_parameters():>14,}")
        return "\n".join(rows)

    def _parameter_groups(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(name, shape, number of layers that have it); blocks are shown once, as `layers.*`."""
        for name, parameter in self.named_parameters():
            prefix, found, rest = name.partition(".layers.0." if self.config.family == "cllm" else ".h.0.")
            if found:
                yield f"{prefix}{found.replace('0', '*')}{rest}", tuple(parameter.shape), self.config.num_layers
            elif ".layers." not in name and ".h." not in name:
                yield name, tuple(parameter.shape), 1

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Model({config.family}, {self.num_parameters():,} parameters in {self.embedding_weight.dtype}, "
            f"computing in {self.compute_dtype}: {config.num_layers} layers x {config.embed_dim}, "
            f"{config.num_heads} heads of {config.head_dim} ({config.num_kv_heads} for keys), "
            f"ffn {config.ffn_dim}, vocabulary {config.vocab_size}, context {config.max_seq_len})\n{self.summary()}"
        ).replace("torch.", "")


def _is_on_a_gpu(pool: PagePool) -> bool:
    return pool.device.type == "cuda"


def _gradients_unless(cache: KVCache | None) -> torch.set_grad_enabled:
    """A cache is written in place and holds no graph: with one, the model is for inference only."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and cache is None)


def _short(values: Tensor) -> str:
    shown = values.tolist()
    return str(shown) if len(shown) <= 8 else f"[{shown[0]}, {shown[1]}, ..., {shown[-1]}] ({len(shown)} values)"
