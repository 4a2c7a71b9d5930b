"""The transformer blocks of both families. Module and parameter names are Hugging Face's, so that a state dict is a
checkpoint.

Legend: B batch, T tokens, S keys (cached + new), H query heads, H_kv key heads, D head dim, E embed, F ffn.

Blocks are pre-norm and pass (x, h) along: h the residual stream before the last branch, x that branch's output, still
to be added. The next norm adds and normalises in one pass over memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cllm import kernels, runtime
from cllm.config.model import ModelConfig
from cllm.kernels.embedding import tied_embedding
from cllm.kernels.quantization import dequantize_rows, quantize_rows
from cllm.kernels.quantized import quantized_feed_forward, quantized_matmul
from cllm.kernels.stack import NGRAM_SHARE, Layer, Linear, Norm, Packed
from cllm.model.cache import DeviceCache, KVCache
from cllm.model.ngrams import row_of, tokens_before
from cllm.model.pages import DeviceTokens, PageBatch
from cllm.runtime.errors import UserError

# The places at which dropout draws: norm n, which takes in what the branch before it has computed (norm 0 the embedding), is place n, and head h of
# layer l is place FIRST_HEAD + l * num_heads + h. None of them depends on how many layers there are.
FIRST_HEAD = 1 << 20


class Context:
    """What a forward pass shares between its layers."""

    def __init__(
        self,
        positions: Tensor | None,
        rotary_tables: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None,
        cache: KVCache | DeviceCache | PageBatch | DeviceTokens | None,
        window: int | None,
        recompute: str = "none",
        tied: bool = False,
        dropout: kernels.Dropout | None = None,
        row_len: int = 0,
        kv_cache: str | None = None,
    ) -> None:
        self.recompute = recompute
        self.dropout = dropout
        self.row_len = row_len  # the tokens of a row of the batch, which may have been laid end to end
        self.tied = tied  # the loss goes on with `output_weight`, which is the token embedding
        self.output_weight: Tensor | None = None
        self.positions = positions
        self.rotary_tables = rotary_tables
        self.cu_seqlens = cu_seqlens
        self.cache = cache
        self.window = window
        self.kv_cache = kv_cache  # what a cache would make of keys and values, where there is none

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, D), k and v (B, T, H_kv, D) of the new tokens -> (B, T, H, D), seeing the cached ones too."""
        if self.cache is not None:
            return self.cache.attend(layer, q, k, v, self.window)
        if self.kv_cache == "int8":
            k, v = _as_int8(k), _as_int8(v)
        if self.dropout is not None:
            place = FIRST_HEAD + layer * q.shape[2]
            return kernels.attention_dropout(
                q, k, v, self.dropout, place, causal=True, window=self.window, cu_seqlens=self.cu_seqlens, period=self.row_len
            )
        return kernels.attention(q, k, v, causal=True, window=self.window, cu_seqlens=self.cu_seqlens)

    def look_up(self, tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens (B, T) in the token embedding (V, E) -> (B, T, E)."""
        if not self.tied:
            return kernels.embedding(tokens, weight, dtype)
        x, self.output_weight = tied_embedding(tokens, weight, dtype)
        return x

    def ngram_rows(self, tokens: Tensor, length: int, rows: int) -> Tensor:
        """tokens (B, T) -> the rows (B, T) of the n-grams that end with them, in a table of so many rows."""
        earlier = [
            tokens_before(tokens, self.positions, distance) if self.cache is None else self.cache.before(tokens, distance)
            for distance in range(1, length)
        ]
        return row_of([tokens.long(), *(each.long() for each in earlier)], rows)

    def through(self, blocks: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x through all blocks, keeping inside them what `recompute` says."""
        h: Tensor | None = None
        for block in blocks:
            if self.recompute == "blocks" and torch.is_grad_enabled():
                again = block if torch.compiler.is_compiling() else runtime.carried(block)  # the backward computes it in another thread
                x, h = checkpoint(again, x, h, self, use_reentrant=False, preserve_rng_state=False)
            else:
                x, h = block(x, h, self)
        return x, h


def _as_int8(x: Tensor) -> Tensor:
    """What a pool of int8 gives back of keys or values (B, T, H_kv, D)."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise UserError("keys and values in int8 have no gradients. Compute under torch.no_grad(), or set model.kv_cache = None to train.")
    return dequantize_rows(*quantize_rows(x), x.dtype)


def moved_by(fn: Callable[[Tensor], Tensor], packed: Packed | None) -> Packed | None:
    """Packed weights where `fn`, by which a module moves its parameters, puts them; their numbers stay as they are packed."""
    if packed is None:
        return None
    place = fn(packed.values.new_empty(0)).device
    return packed if place == packed.values.device else packed.moved(lambda each: each.to(place))


class Weights(nn.Module):
    """A weight and perhaps a bias under the names of nn.Linear, nn.Embedding, nn.LayerNorm or Hugging Face's Conv1D."""

    def __init__(self, *shape: int, bias: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.bias = nn.Parameter(torch.empty(bias)) if bias is not None else None
        self.packed: Packed | None = None  # takes the place of the weight, for generation

    def outputs_first(self) -> Tensor:
        """The weight as (out, in)."""
        return self.weight

    def inputs_first(self) -> Tensor:
        """The weight as (in, out)."""
        return self.weight.T

    def pack_(self, pack: Callable[[Tensor], Packed]) -> None:
        """The weight gives way to what `pack` makes of it; it cannot be trained or saved any more."""
        self.packed = pack(self.outputs_first())
        self.register_parameter("weight", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Weights":
        super()._apply(fn, recurse)
        self.packed = moved_by(fn, self.packed)
        return self

    def decoding(self) -> Linear:
        return Linear(self.outputs_first() if self.packed is None else self.packed, self.bias)

    def extra_repr(self) -> str:
        shape = self.weight.shape if self.packed is None else self.packed.shape
        return f"{tuple(shape)}, bias={self.bias is not None}"


class Conv1D(Weights):
    """GPT-2's layout: the weight is (in, out)."""

    def outputs_first(self) -> Tensor:
        return self.weight.T

    def inputs_first(self) -> Tensor:
        return self.weight


def linear(x: Tensor, weights: Weights) -> Tensor:
    """x (..., in) -> (..., out)."""
    if weights.packed is not None:
        return quantized_matmul(x, weights.packed, weights.bias)
    return kernels.matmul(x, weights.inputs_first(), weights.bias)


class LlamaAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        embed_dim, head_dim = config.embed_dim, config.head_size
        self.layer, self.head_dim, self.eps = layer, head_dim, config.eps
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        q_size, kv_size = config.num_heads * head_dim, config.kv_heads * head_dim
        self.q_proj = Weights(q_size, embed_dim, bias=q_size if config.attention_bias else None)
        self.k_proj = Weights(kv_size, embed_dim, bias=kv_size if config.attention_bias else None)
        self.v_proj = Weights(kv_size, embed_dim, bias=kv_size if config.attention_bias else None)
        self.o_proj = Weights(embed_dim, config.num_heads * head_dim)
        self.q_norm = Weights(head_dim) if config.qk_norm else None
        self.k_norm = Weights(head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self._project(x, context)
        return linear(context.attend(self.layer, q, k, v).flatten(-2), self.o_proj)

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, E) -> rotated queries (B, T, H, D) and keys (B, T, H_kv, D), and values (B, T, H_kv, D)."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        assert context.rotary_tables is not None
        cos, sin = context.rotary_tables
        q_norm = None if self.q_norm is None else self.q_norm.weight.expand(self.num_heads, -1)
        k_norm = None if self.k_norm is None else self.k_norm.weight.expand(self.num_kv_heads, -1)
        if torch.is_grad_enabled() and self.q_proj.packed is None:
            # One product and one rotation instead of five calls: the weights are copied side by side, which pays where there are many rows to
            # multiply. Each element of the result has the same bits either way.
            weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
            biases: list[Tensor] = [each.bias for each in (self.q_proj, self.k_proj, self.v_proj) if each.bias is not None]
            product = kernels.matmul(x, weight.T, torch.cat(biases) if biases else None).view(heads)
            qk, v = product.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=-2)
            norms = None if q_norm is None or k_norm is None else torch.cat((q_norm, k_norm))
            q, k = kernels.rotary(qk, cos, sin, context.positions, norms, self.eps).split((self.num_heads, self.num_kv_heads), dim=-2)
            return q, k, v
        q, k, v = (linear(x, weights).view(heads) for weights in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (kernels.rotary(each, cos, sin, context.positions, norm, self.eps) for each, norm in ((q, q_norm), (k, k_norm)))
        return q, k, v


class LlamaMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation_name
        self.gate_proj = Weights(config.ffn_size, config.embed_dim)
        self.up_proj = Weights(config.ffn_size, config.embed_dim)
        self.down_proj = Weights(config.embed_dim, config.ffn_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if gate.packed is not None and up.packed is not None and down.packed is not None:
            return quantized_feed_forward(x, gate.packed, up.packed, down.packed, activation=self.activation)
        return kernels.feed_forward(x, gate.weight, up.weight, down.weight, activation=self.activation, recompute=context.recompute == "feed_forward")


class LlamaBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = Weights(config.embed_dim)
        self.post_attention_layernorm = Weights(config.embed_dim)

    def forward(self, x: Tensor, h: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        first = 2 * self.self_attn.layer
        y, h = _rms_norm(x, h, self.input_layernorm, self.eps, context, first)
        y, h = _rms_norm(self.self_attn(y, context), h, self.post_attention_layernorm, self.eps, context, first + 1)
        return self.mlp(y, context), h

    def decoding(self) -> Layer:
        attention, mlp = self.self_attn, self.mlp
        q_norm, k_norm = (None if each is None else Norm(each.weight) for each in (attention.q_norm, attention.k_norm))
        return Layer(
            Norm(self.input_layernorm.weight), attention.q_proj.decoding(), attention.k_proj.decoding(), attention.v_proj.decoding(),
            attention.o_proj.decoding(), Norm(self.post_attention_layernorm.weight), mlp.gate_proj.decoding(), mlp.up_proj.decoding(),
            mlp.down_proj.decoding(), q_norm, k_norm,
        )  # fmt: skip


class LlamaBackbone(nn.Module):
    """Embedding, blocks and final norm of the cllm family (the `model.` of a Llama or Qwen3 checkpoint)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.embed_tokens = Weights(config.vocab_size, config.embed_dim)
        self.embed_bigrams = Weights(config.bigram_rows, config.embed_dim) if config.bigram_rows else None
        self.embed_trigrams = Weights(config.trigram_rows, config.embed_dim) if config.trigram_rows else None
        self.layers = nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.num_layers))
        self.norm = Weights(config.embed_dim)

    @property
    def blocks(self) -> Any:
        return self.layers

    def decoding_norm(self) -> Norm:
        return Norm(self.norm.weight)

    def decoding_embeddings(self) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        return self.embed_tokens.weight, None, [weight for _, weight in self._ngram_tables()]

    def _ngram_tables(self) -> list[tuple[int, Tensor]]:
        """(tokens of an n-gram, its table)."""
        return [(length, each.weight) for length, each in ((2, self.embed_bigrams), (3, self.embed_trigrams)) if each is not None]

    def embed(self, tokens: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
        """tokens (B, T) -> (B, T, E). Each look-up is rounded to `dtype` before it is added."""
        x = context.look_up(tokens, self.embed_tokens.weight, dtype)
        for length, weight in self._ngram_tables():
            x = torch.add(x, kernels.embedding(context.ngram_rows(tokens, length, len(weight)), weight, dtype), alpha=NGRAM_SHARE)
        return x

    def forward(self, tokens: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
        x, h = context.through(self.layers, self.embed(tokens, context, dtype))
        return _rms_norm(x, h, self.norm, self.eps, context, 2 * len(self.layers))[0]


class GPT2Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        embed_dim = config.embed_dim
        self.layer, self.head_dim = layer, config.head_size
        self.c_attn = Conv1D(embed_dim, 3 * embed_dim, bias=3 * embed_dim)
        self.c_proj = Conv1D(embed_dim, embed_dim, bias=embed_dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv = linear(x, self.c_attn).view(*x.shape[:-1], 3, -1, self.head_dim)  # (B, T, 3, H, D)
        q, k, v = qkv.unbind(-3)
        return linear(context.attend(self.layer, q, k, v).flatten(-2), self.c_proj)


class GPT2MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation_name
        self.c_fc = Conv1D(config.embed_dim, config.ffn_size, bias=config.ffn_size)
        self.c_proj = Conv1D(config.ffn_size, config.embed_dim, bias=config.embed_dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        up, down = self.c_fc, self.c_proj
        if up.packed is not None and down.packed is not None:
            return quantized_feed_forward(x, None, up.packed, down.packed, activation=self.activation, b_up=up.bias, b_down=down.bias)
        return kernels.feed_forward(
            x, None, up.outputs_first(), down.outputs_first(), activation=self.activation, b_up=up.bias, b_down=down.bias,
            recompute=context.recompute == "feed_forward",
        )  # fmt: skip


class GPT2Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.ln_1 = Weights(config.embed_dim, bias=config.embed_dim)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = Weights(config.embed_dim, bias=config.embed_dim)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, h: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        first = 2 * self.attn.layer
        y, h = _layer_norm(x, h, self.ln_1, self.eps, context, first)
        y, h = _layer_norm(self.attn(y, context), h, self.ln_2, self.eps, context, first + 1)
        return self.mlp(y, context), h

    def decoding(self) -> Layer:
        qkv, attention, mlp = self.attn.c_attn.decoding(), self.attn, self.mlp
        q, k, v = qkv.split(3)
        return Layer(
            Norm(self.ln_1.weight, self.ln_1.bias), q, k, v, attention.c_proj.decoding(), Norm(self.ln_2.weight, self.ln_2.bias),
            None, mlp.c_fc.decoding(), mlp.c_proj.decoding(),
        )  # fmt: skip


class GPT2Backbone(nn.Module):
    """Embeddings, blocks and final norm of the gpt2 family (the `transformer.` of a GPT-2 checkpoint)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.wte = Weights(config.vocab_size, config.embed_dim)
        self.wpe = Weights(config.max_seq_len, config.embed_dim)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = Weights(config.embed_dim, bias=config.embed_dim)

    @property
    def blocks(self) -> Any:
        return self.h

    def decoding_norm(self) -> Norm:
        return Norm(self.ln_f.weight, self.ln_f.bias)

    def decoding_embeddings(self) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        return self.wte.weight, self.wpe.weight, []

    def embed(self, tokens: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
        """tokens (B, T) -> (B, T, E)."""
        positions = context.positions
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        # Expanded before the lookup: its backward then sums over the batch in the kernel's fixed order.
        of_positions = kernels.embedding(positions.expand(tokens.shape), self.wpe.weight, dtype)
        return context.look_up(tokens, self.wte.weight, dtype) + of_positions

    def forward(self, tokens: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
        x, h = context.through(self.h, self.embed(tokens, context, dtype))
        return _layer_norm(x, h, self.ln_f, self.eps, context, 2 * len(self.h))[0]


def _rms_norm(x: Tensor, h: Tensor | None, weights: Weights, eps: float, context: Context, number: int) -> tuple[Tensor, Tensor]:
    """Norm of h + x, and h + x; at the first norm there is no h yet. Dropout is of x."""
    if context.dropout is not None:
        return kernels.rms_norm_dropout(x, weights.weight, context.dropout, number, eps, residual=h)
    if h is None:
        return kernels.rms_norm(x, weights.weight, eps), x
    return kernels.rms_norm(x, weights.weight, eps, residual=h)


def _layer_norm(x: Tensor, h: Tensor | None, weights: Weights, eps: float, context: Context, number: int) -> tuple[Tensor, Tensor]:
    if context.dropout is not None:
        return kernels.layer_norm_dropout(x, weights.weight, weights.bias, context.dropout, number, eps, residual=h)
    if h is None:
        return kernels.layer_norm(x, weights.weight, weights.bias, eps), x
    return kernels.layer_norm(x, weights.weight, weights.bias, eps, residual=h)
