"""The lines of files by how much they surprise a model, with what it would have written instead.

    lines = review_text(model, tokenizer, text, name="a.py")
    first = ranked(lines)[:20]
    suggest(model, tokenizer, first)

A line is worth a look where the model was sure of something else. What is hard to foresee anyway, such as the words of a comment or the first name of
an import, is surprising in bits and still says nothing; so a line counts by its most surprising token less what the model expected there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cllm.evaluate.continuations import continue_all
from cllm.evaluate.remarks import remarks_in
from cllm.evaluate.surprise import surprise_of, window_of
from cllm.runtime.errors import DataError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

SUGGESTED_TOKENS = 48  # a suggestion is cut there where its line has not ended


@dataclass(frozen=True)
class Line:
    """A line of a file that holds more than blanks, and in Python code more than a comment or a part of a docstring.

    number, column: from 1, in lines and characters; the column is that of the most surprising token, with its blanks. bits: of all tokens of the
    line. peak_bits: of that token. score: peak_bits less the bits that were expected there; what lines are ranked by.
    """

    name: str
    number: int
    column: int
    text: str
    num_tokens: int
    bits: float
    peak_bits: float
    score: float
    context: np.ndarray
    """The tokens before the most surprising one, as many as the model is shown."""

    @property
    def beginning(self) -> str:
        """The line up to its most surprising token."""
        return self.text[: self.column - 1]


@dataclass(frozen=True)
class TokenLines:
    """Of each token of a text: line (n,) int64 from 0; column (n,) int64 in characters from 0, of its first byte that belongs to the line; and
    is_ranked (n,) bool: comments and docstrings of Python code are not."""

    line: np.ndarray
    column: np.ndarray
    is_ranked: np.ndarray


def place_tokens(tokenizer: Tokenizer, tokens: np.ndarray, text: str, is_python: bool = False) -> TokenLines:
    """Where each token of `text` stands. A token belongs to the line of its first byte that is no blank; one of blanks alone, such as a line break
    with the indentation behind it, to the line that it begins in. Raises DataError where the bytes of the tokens are not those of the text."""
    content = text.encode("utf-8")
    pieces = [tokenizer.token_bytes(int(token)) for token in tokens]
    if b"".join(pieces) != content:
        raise DataError("the tokens of this text are not its bytes, so its lines cannot be told: the tokenizer changes text. Use another model.")
    starts = np.cumsum([0, *map(len, pieces[:-1])], dtype=np.int64)
    stripped = np.array([len(piece) - len(piece.lstrip(b" \t\r\n")) if piece.strip(b" \t\r\n") else 0 for piece in pieces], dtype=np.int64)
    # The blanks before the text of a token belong to its line as long as there is no line break among them.
    breaks = np.array([piece[:blanks].rfind(b"\n") + 1 for piece, blanks in zip(pieces, stripped)], dtype=np.int64)
    raw = np.frombuffer(content, dtype=np.uint8)
    line_starts = np.concatenate([[0], np.flatnonzero(raw == 10) + 1])
    line = np.searchsorted(line_starts, starts + stripped, side="right") - 1
    characters = np.concatenate([[0], np.cumsum((raw & 0xC0) != 0x80)])  # before each byte
    is_ranked = np.ones(len(tokens), dtype=bool)
    if is_python and len(tokens):
        is_ranked = ~remarks_in(text)[starts + np.array([len(piece) for piece in pieces]) - 1]
        is_code = is_ranked & np.array([bool(piece.strip(b" \t\r\n")) for piece in pieces])
        is_ranked &= np.isin(line, line[is_code])  # the blanks around a comment are no code either
    return TokenLines(line, characters[starts + breaks] - characters[line_starts[line]], is_ranked)


def review_text(
    model: Model, tokenizer: Tokenizer, text: str, name: str = "", progress: Callable[[int], None] | None = None
) -> list[Line]:  # fmt: skip
    """The lines of a text that can be ranked (see `Line`), in order. `progress(count)` is called with the number of tokens that were just scored.

    Lines end with a line feed alone. Raises DataError where the tokenizer cannot hold the text as it is.
    """
    known = tokenizer.known(text)
    if known.count("\n") != text.count("\n"):
        raise DataError(f"{name or 'the text'} holds line breaks and the tokenizer has none, so its lines cannot be told.")
    tokens = np.array(tokenizer.encode(known), dtype=np.int64)
    surprise = surprise_of(model, tokens, progress)
    return lines_of(tokenizer, tokens, known, surprise.bits, surprise.expected, window_of(model) - SUGGESTED_TOKENS, name)


def lines_of(
    tokenizer: Tokenizer, tokens: np.ndarray, text: str, bits: np.ndarray, expected: np.ndarray, context: int, name: str = ""
) -> list[Line]:  # fmt: skip
    """The same from the surprise of each token, bits and expected (n,). context: tokens that a suggestion is made from, at most."""
    places = place_tokens(tokenizer, tokens, text, is_python(name))
    bounds = np.searchsorted(places.line, np.arange(text.count("\n") + 2))
    excess = bits - expected
    found = []
    for number, line in enumerate(text.split("\n")):
        low, high = int(bounds[number]), int(bounds[number + 1])
        low = max(low, 1)  # the first token of a text is not scored
        ranked_here = low + np.flatnonzero(places.is_ranked[low:high])
        if not line.strip() or not len(ranked_here):
            continue
        peak = int(ranked_here[np.argmax(excess[ranked_here])])
        found.append(
            Line(
                name, number + 1, int(places.column[peak]) + 1, line, high - low, float(bits[low:high].sum()), float(bits[peak]), float(excess[peak]),
                tokens[max(0, peak - max(1, context)) : peak],
            )
        )  # fmt: skip
    return found


def is_python(name: str) -> bool:
    """Whether a file of this name holds Python code."""
    return name.endswith((".py", ".pyi"))


def ranked(lines: Sequence[Line]) -> list[Line]:
    """The most surprising first; of equal ones the one that comes first."""
    return sorted(lines, key=lambda line: -line.score)


def suggest(model: Model, tokenizer: Tokenizer, lines: Sequence[Line], progress: Callable[[int], None] | None = None) -> list[str]:
    """What the model would have written instead of each line: the line up to its most surprising token, and from there the likeliest token each time,
    to the end of the line. `progress(done)` is called with the number of lines that are done."""
    ends = [b"\n" in tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    written = continue_all(
        model, tokenizer, [line.context.tolist() for line in lines], SUGGESTED_TOKENS, ends=lambda tokens: ends[tokens[-1]], progress=progress
    )
    return [line.beginning + tokenizer.decode(tokens).split("\n")[0] for line, tokens in zip(lines, written)]
