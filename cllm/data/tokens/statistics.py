"""How a tokenizer fits a text: what a token stands for, in each language, which tokens are never used, and whether the text comes back."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cllm.data.tokens.tokenizer import Tokenizer

_WORD = re.compile(r"\w+")
_SHOWN = 12  # tokens of a kind that are shown


@dataclass
class Amount:
    """Text in some language, and the tokens that it became."""

    documents: int = 0
    bytes: int = 0
    chars: int = 0
    words: int = 0
    tokens: int = 0

    def rates(self) -> dict[str, float]:
        """bytes_per_token: higher is better. tokens_per_word, which is called fertility: lower is better; of a script without blanks between words it
        says nothing."""
        return {
            "bytes_per_token": self.bytes / self.tokens if self.tokens else 0.0,
            "tokens_per_word": self.tokens / self.words if self.words else 0.0,
        }


@dataclass
class Fit:
    """What was measured so far; `add` takes documents, in any number of pieces each."""

    tokenizer: Tokenizer
    languages: dict[str, Amount] = field(default_factory=dict)
    unknown_chars: int = 0  # that a character tokenizer does not have
    changed_pieces: int = 0  # that do not come back as they were
    pieces: int = 0

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)

    def add(self, pieces: Iterable[str], language: str) -> None:
        """One document."""
        amount = self.languages.setdefault(language, Amount())
        amount.documents += 1
        for piece in pieces:
            amount.chars += len(piece)
            amount.bytes += len(piece.encode("utf-8"))
            amount.words += sum(1 for _ in _WORD.finditer(piece))
            known = self.tokenizer.known(piece)
            self.unknown_chars += len(piece) - len(known)
            ids = self.tokenizer.encode_arrays([known])[0]
            amount.tokens += len(ids)
            self.counts += np.bincount(ids, minlength=len(self.counts))
            self.pieces += 1
            self.changed_pieces += self.tokenizer.decode(ids.tolist(), skip_special=False) != known

    def result(self) -> dict[str, Any]:
        """All figures. coverage: share of the characters that can be encoded. unused_tokens: that occur nowhere, without special ones."""
        tokenizer, total = self.tokenizer, Amount()
        for amount in self.languages.values():
            for name in vars(total):
                setattr(total, name, getattr(total, name) + getattr(amount, name))
        special = set(tokenizer.special_tokens.values())
        unused = [i for i in np.flatnonzero(self.counts == 0).tolist() if i not in special and tokenizer.token_bytes(i)]
        frequent = [int(i) for i in np.argsort(-self.counts, kind="stable")[:_SHOWN] if self.counts[i]]
        return {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "hash": tokenizer.hash,
            "num_tokens": total.tokens,
            "num_chars": total.chars,
            "num_bytes": total.bytes,
            "num_words": total.words,
            "bytes_per_token": total.rates()["bytes_per_token"],
            "chars_per_token": total.chars / total.tokens if total.tokens else 0.0,
            "tokens_per_word": total.rates()["tokens_per_word"],
            "vocabulary_used": float(np.count_nonzero(self.counts)) / tokenizer.vocab_size if tokenizer.vocab_size else 0.0,
            "coverage": 1.0 - self.unknown_chars / total.chars if total.chars else 1.0,
            "comes_back": not self.changed_pieces,
            "losses": tokenizer.losses,
            "special_tokens": len(special),
            "unused_tokens": len(unused),
            "unused": [_shown(tokenizer, i) for i in unused[-_SHOWN:]],
            "frequent": [_shown(tokenizer, i) for i in frequent],
            "languages": {
                code: {**vars(amount), **amount.rates()}
                for code, amount in sorted(self.languages.items(), key=lambda item: (-item[1].bytes, item[0]))
            },
        }


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")
