"""What a model is: its shape and the choices that fix its family, parameter count and arithmetic.

Two families, named after the Hugging Face architectures whose tensor names and layouts they share:

  cllm   RMSNorm, rotary positions, gated feed-forward, no biases: a Llama, a Qwen3 (`qk_norm=True`) or a Qwen2 (`attention_bias=True`)
  gpt2   LayerNorm, learned positions, plain feed-forward, biases: a GPT-2

A mixture that neither can hold is refused, because no other program could run what would be trained. What the cllm family may have besides is told by
`only_here`: such a model runs in CLLM alone.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

from cllm.runtime.errors import UserError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
ROPE_SCALINGS = ("linear", "llama3", "yarn")
MAX_HEAD_DIM = 256  # what the attention kernels serve
MAX_LAYERS = 10_000  # ten times the deepest Transformer in the literature (Wang et al. 2022, arXiv 2203.00555); more take minutes to be built


@dataclass(frozen=True)
class ModelConfig:
    """Shape and architecture of a `Model`. A field that is None takes the default that its help names; after
    construction none of these is None."""

    vocab_size: int
    """Number of token ids; rows of the embedding. May exceed the tokenizer's (padding rows are never sampled)."""
    embed_dim: int = 384
    """Width of the residual stream."""
    num_layers: int = 6
    """Number of blocks (attention + feed-forward)."""
    num_heads: int = 6
    """Number of query heads per block."""
    num_kv_heads: int | None = None
    """Number of key and value heads; fewer than num_heads is grouped-query attention. Default: num_heads."""
    head_dim: int | None = None
    """Width of one head. Default: embed_dim / num_heads."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward. Default: gated 8/3 * embed_dim rounded up to a multiple of 32, plain 4 *
    embed_dim."""
    max_seq_len: int = 256
    """Longest context in tokens."""
    norm: str = "rms"
    """"rms" (RMSNorm) or "layer" (LayerNorm)."""
    position: str | None = None
    """"rotary" or "learned". Default: rotary with rms, learned with layer."""
    activation: str | None = None
    """"silu", "gelu" (exact), "gelu_tanh" or "relu2". Default: silu with rms, gelu_tanh with layer (GPT-2's own)."""
    gated: bool | None = None
    """Feed-forward with a gate, down(activation(gate(x)) * up(x)). Default: with rms yes, with layer no."""
    bias: bool | None = None
    """Biases on linear layers and norms. Default: with rms no, with layer yes."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation (Qwen3)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections of a model without other biases (Qwen2)."""
    tie_embeddings: bool = True
    """The output projection is the token embedding."""
    norm_eps: float | None = None
    """Added to the variance. Default: 1e-6 with rms, 1e-5 with layer."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: str | None = None
    """"linear", "llama3" or "yarn": rotary frequencies stretched to a longer context (see `cllm.model.rope`). None: as they are."""
    rope_factor: float | None = None
    """How many times longer the context becomes; needed with rope_scaling."""
    rope_original_len: int | None = None
    """Context before the stretch, in tokens (llama3, yarn). Default: max_seq_len / rope_factor."""
    rope_slow: float | None = None
    """Pairs that turn fewer times within rope_original_len are stretched (llama3, yarn). Default: 1."""
    rope_fast: float | None = None
    """Pairs that turn more often within rope_original_len stay. Default: llama3 4, yarn 32."""
    rope_attention_factor: float | None = None
    """Factor on queries and keys (yarn). Default: 0.1 * ln(rope_factor) + 1."""
    sliding_window: int | None = None
    """A token sees only the last so many tokens, itself included. None: all."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap). None: unchanged."""
    bigram_rows: int = 0
    """Rows of a table of embeddings that is looked up by a hash of a token and the one before it: memory instead of arithmetic. 0: none."""
    trigram_rows: int = 0
    """The same by a hash of a token and the two before it. 0: none."""

    def __post_init__(self) -> None:
        if self.norm not in ("rms", "layer"):
            raise UserError(f'norm must be "rms" or "layer", got {self.norm!r}.')
        self._check_numbers("vocab_size", "embed_dim", "num_layers", "num_heads", "max_seq_len")
        if self.num_layers > MAX_LAYERS:
            raise UserError(f"num_layers must be at most {MAX_LAYERS:,}, got {self.num_layers:,}. Use a larger embed_dim for a larger model.")
        rms = self.norm == "rms"
        self._derive("num_kv_heads", self.num_heads)
        self._derive("position", "rotary" if rms else "learned")
        self._derive("activation", "silu" if rms else "gelu_tanh")
        self._derive("gated", rms)
        self._derive("bias", not rms)
        self._derive("norm_eps", 1e-6 if rms else 1e-5)
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                raise UserError(
                    f"embed_dim must be a multiple of num_heads when head_dim is not given, got embed_dim "
                    f"{self.embed_dim} and num_heads {self.num_heads}. Change one of them or give head_dim."
                )
            self._derive("head_dim", self.embed_dim // self.num_heads)
        self._derive("ffn_dim", _round_up(8 * self.embed_dim / 3, 32) if self.gated else 4 * self.embed_dim)
        self._check_numbers("num_kv_heads", "head_dim", "ffn_dim")
        self._check_numbers("sliding_window", optional=True)
        self._check_numbers("bigram_rows", "trigram_rows", least=0)
        self._check_positive("norm_eps", "rope_theta")
        if self.softcap is not None:
            self._check_positive("softcap")
        for name in ("gated", "bias", "qk_norm", "attention_bias", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"num_heads must be a multiple of num_kv_heads (each key head serves a group of query heads), got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_size > MAX_HEAD_DIM:
            raise UserError(f"head_dim must be at most {MAX_HEAD_DIM}, got {self.head_dim}. Use more heads.")
        self._check_family()
        self._check_rope()

    def _derive(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_numbers(self, *names: str, optional: bool = False, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}.")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise UserError(f"{name} must be a finite number > 0, got {value!r}.")
            object.__setattr__(self, name, float(value))

    def _check_family(self) -> None:
        if self.norm == "rms":
            needs = {"position": "rotary", "gated": True, "bias": False}
            if self.qk_norm:  # a Qwen3 has no biases
                needs["attention_bias"] = False
            family = 'cllm (norm="rms": a Llama, Qwen2 or Qwen3)'
        else:
            needs = {"position": "learned", "gated": False, "bias": True, "qk_norm": False, "sliding_window": None}
            needs |= {"attention_bias": False}  # the biases of `bias` are the queries', keys' and values' as well
            needs |= {"bigram_rows": 0, "trigram_rows": 0}
            needs |= {"num_kv_heads": self.num_heads, "head_dim": self.embed_dim // self.num_heads}
            family = 'gpt2 (norm="layer": a GPT-2)'
        wrong = [f"{name}={getattr(self, name)!r} (needs {value!r})" for name, value in needs.items() if getattr(self, name) != value]
        if wrong or (self.norm == "layer" and self.embed_dim % self.num_heads):
            wrong = wrong or [f"embed_dim={self.embed_dim} (needs a multiple of num_heads {self.num_heads})"]
            raise UserError(
                f"this mixture is neither of the two model families; for family {family} change: {', '.join(wrong)}. "
                "Only these run unchanged in other programs."
            )
        if self.position == "rotary" and self.head_size % 2:
            raise UserError(f"head_dim must be even for rotary positions, got {self.head_dim}.")

    def _check_rope(self) -> None:
        if self.rope_scaling not in (None, *ROPE_SCALINGS):
            raise UserError(f"rope_scaling must be one of {', '.join(ROPE_SCALINGS)} or left open, got {self.rope_scaling!r}.")
        ramped = self.rope_scaling in ("llama3", "yarn")
        uses = {"rope_factor": self.rope_scaling is not None, "rope_original_len": ramped, "rope_slow": ramped, "rope_fast": ramped}
        for name, used in (uses | {"rope_attention_factor": self.rope_scaling == "yarn"}).items():
            if not used and getattr(self, name) is not None:
                raise UserError(f"{name}={getattr(self, name)!r} has no meaning with rope_scaling={self.rope_scaling!r}. Leave it out.")
        if self.rope_scaling is None:
            return
        if self.position != "rotary":
            raise UserError(f"rope_scaling={self.rope_scaling!r} needs rotary positions, got position={self.position!r}.")
        if self.rope_factor is None:
            raise UserError(f"rope_scaling={self.rope_scaling!r} needs rope_factor, how many times longer the context becomes.")
        self._check_positive("rope_factor")
        if not ramped:
            return
        self._derive("rope_original_len", max(1, int(self.max_seq_len / self.rope_factor)))
        self._derive("rope_slow", 1.0)
        self._derive("rope_fast", 4.0 if self.rope_scaling == "llama3" else 32.0)
        self._check_numbers("rope_original_len")
        self._check_positive("rope_slow", "rope_fast")
        assert self.rope_slow is not None and self.rope_fast is not None
        if self.rope_fast <= self.rope_slow:
            raise UserError(f"rope_fast must be above rope_slow, got {self.rope_fast:g} and {self.rope_slow:g}.")
        if self.rope_scaling == "yarn":
            self._derive("rope_attention_factor", 0.1 * math.log(self.rope_factor) + 1.0 if self.rope_factor > 1 else 1.0)
            self._check_positive("rope_attention_factor")

    @property
    def family(self) -> str:
        """ "cllm" (Llama or Qwen3 layout) or "gpt2"."""
        return "cllm" if self.norm == "rms" else "gpt2"

    @property
    def ngram_tables(self) -> tuple[tuple[int, int], ...]:
        """(tokens of an n-gram, rows of its table) of each hashed embedding."""
        return tuple((length, rows) for length, rows in ((2, self.bigram_rows), (3, self.trigram_rows)) if rows)

    @property
    def only_here(self) -> dict[str, Any]:
        """The settings, with their values, that no other program knows: a model that has one can be exported to none."""
        return {name: getattr(self, name) for name in ("bigram_rows", "trigram_rows") if getattr(self, name)}

    # The derived fields with the type that they have once constructed.
    @property
    def kv_heads(self) -> int:
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def head_size(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @property
    def ffn_size(self) -> int:
        assert self.ffn_dim is not None
        return self.ffn_dim

    @property
    def activation_name(self) -> str:
        assert self.activation is not None
        return self.activation

    @property
    def eps(self) -> float:
        assert self.norm_eps is not None
        return self.norm_eps

    @property
    def window_or_none(self) -> int | None:
        """The sliding window where it can hide anything, else None."""
        return self.sliding_window if self.sliding_window and self.sliding_window < self.max_seq_len else None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ModelConfig":
        """A named configuration (see `cllm.config.presets`); `overrides` replace its values, e.g. vocab_size=65."""
        from cllm.config.presets import PRESETS

        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}{_nearest(name, PRESETS)}. Known presets: {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """From plain values, as in a configuration file; an unknown key is refused with the nearest name."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"unknown model setting {key!r}{_nearest(key, known)}. Known: {', '.join(sorted(known))}.")
        if "vocab_size" not in values:
            raise UserError("vocab_size is missing from the model settings; give the tokenizer's vocabulary size.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain value; `from_dict` gives the same configuration back."""
        return dataclasses.asdict(self)

    def _matmul_parameters(self) -> int:
        """Weights that multiply every token, output projection included."""
        attention = self.embed_dim * self.head_size * (2 * self.num_heads + 2 * self.kv_heads)
        feed_forward = self.embed_dim * self.ffn_size * (3 if self.gated else 2)
        return self.num_layers * (attention + feed_forward) + self.vocab_size * self.embed_dim

    def _vector_parameters(self) -> int:
        """Norm weights and biases."""
        norms = (2 * self.num_layers + 1) * self.embed_dim * (2 if self.bias else 1)
        if self.qk_norm:
            norms += 2 * self.num_layers * self.head_size
        if self.attention_bias:
            norms += self.num_layers * self.head_size * (self.num_heads + 2 * self.kv_heads)
        if not self.bias:
            return norms
        attention = self.head_size * (self.num_heads + 2 * self.kv_heads) + self.embed_dim
        return norms + self.num_layers * (attention + self.ffn_size + self.embed_dim)

    def num_parameters(self, embeddings: bool = True, ngrams: bool = True) -> int:
        """Number of trainable values. `embeddings=False` leaves out the tables that are only looked up (learned
        positions, hashed n-grams, and the token embedding unless it is also the output projection): what remains works
        on every token. `ngrams=False` leaves out those of n-grams alone, of which a token uses few rows of many."""
        count = self._matmul_parameters() + self._vector_parameters()
        if embeddings:
            count += 0 if self.tie_embeddings else self.vocab_size * self.embed_dim
            count += self.max_seq_len * self.embed_dim if self.position == "learned" else 0
            count += self.ngram_parameters if ngrams else 0
        return count

    @property
    def ngram_parameters(self) -> int:
        """Values of the hashed tables."""
        return sum(rows for _, rows in self.ngram_tables) * self.embed_dim

    def flops_per_token(self, seq_len: int | None = None, *, backward: bool = True, causal: bool = True) -> float:
        """Floating-point operations per token in sequences of `seq_len` tokens, by count: each multiply-add of a matrix
        product is two.

        Counted: linear layers, output projection, the two products of attention. Not counted: norms, activations,
        softmax, lookups (below 1 %) and recomputation. `causal` counts only the keys that a query sees ((seq_len + 1) /
        2 on average, fewer with a sliding window); False counts all seq_len. The backward pass is twice the forward.
        """
        length = self._sequence_length(seq_len)
        keys = float(length)
        if causal:
            window = min(self.sliding_window or length, length)
            keys = (window * (window + 1) / 2 + (length - window) * window) / length
        attention = 4 * self.num_layers * self.num_heads * self.head_size * keys
        forward = 2 * self._matmul_parameters() + attention
        return forward * 3 if backward else forward

    def flops_per_token_palm(self, seq_len: int | None = None) -> float:
        """The convention of PaLM (Chowdhery et al. 2022, appendix B), used by nanoGPT: 6 N + 12 L H D T, forward and
        backward, attention not halved; N leaves out the tables that are only looked up."""
        length = self._sequence_length(seq_len)
        return 6 * self.num_parameters(embeddings=False) + 12 * self.num_layers * self.num_heads * self.head_size * length

    def _sequence_length(self, seq_len: int | None) -> int:
        length = self.max_seq_len if seq_len is None else seq_len
        if length < 1:
            raise UserError(f"seq_len must be at least 1, got {length}.")
        return length


def _round_up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple


def _nearest(name: str, known: Any) -> str:
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
