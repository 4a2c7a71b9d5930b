"""Output that keeps to a form: JSON by a schema, any JSON object, a regular expression, or a grammar. The package llguidance does the parsing.

    new = compile_constraint(tokenizer, "json_schema", '{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}')
    Sampler(..., constraint=new())

Schemas come from whoever asks, and a short one can take minutes to compile (a number that must be a multiple of a large prime). So each is compiled
in a child process first, which ends with it when its time is over; what passed there is then compiled for the tokenizer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock, Timer
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer

KINDS = ("json_schema", "json_object", "regex", "grammar")
MOST_BYTES = 128 * 1024  # of the text of a schema, an expression or a grammar
MOST_DEPTH = 64  # of objects and lists inside each other in a schema
MOST_SECONDS = 3.0  # to compile one
MOST_WRITTEN_OUT = 50_000  # characters of a regular expression whose {100} are written out
_EXPRESSION = re.compile(r"/((?:\\.|[^/\\\n])+)/")  # in a grammar
_PIECE = re.compile(r"(\\.|\[\^?\]?(?:\\.|[^\]\\])*(?:\]|$)|\{([0-9]+)(?:,([0-9]*))?\}|.)", re.DOTALL)  # of a regular expression
_WORDS = {"json_schema": "the JSON schema", "json_object": "JSON", "regex": "the regular expression", "grammar": "the grammar"}
# At most one blank between the parts of JSON: more would let a model write them until its tokens are used up.
_JSON: Any = {"whitespace_pattern": r"[ \n]"}


class Constraint(Protocol):
    """What a continuation may say, token by token."""

    finished: bool
    """Whether nothing but an end token can follow."""

    def mask(self) -> np.ndarray:
        """(vocab_size,) bool: the tokens that may come next. At least one may, an end token where the text is complete."""

    def advance(self, token: int) -> None:
        """Takes the token that was chosen, one that `mask` allows."""


def compile_constraint(tokenizer: Tokenizer, kind: str, text: str | dict[str, Any] = "") -> Callable[[], GrammarConstraint]:
    """What makes a new constraint for each continuation that is to keep to the same form.

    kind: one of KINDS. text: the JSON schema (as text, or read from JSON already), the regular expression in the syntax of Rust's regex crate, or
    the grammar in llguidance's variant of Lark; nothing for "json_object". The end of the text is the tokenizer's end-of-text token.

    Raises UserError where llguidance is not installed, for a text that is wrong, uses what llguidance does not know, or is too large, too deep or
    too slow to compile (MOST_BYTES, MOST_DEPTH, MOST_SECONDS).
    """
    if kind not in KINDS:
        raise UserError(f"a constraint must be one of {', '.join(KINDS)}, got {kind!r}.")
    check_installed()
    matcher = _compiled(tokenizer, tokenizer.eot_id, kind, _checked_text(kind, text))
    return lambda: GrammarConstraint(matcher.deep_copy(), tokenizer.vocab_size, tokenizer.eot_id)


def check_installed() -> None:
    """UserError that says what to install, where llguidance is missing."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise UserError(
            "constrained output needs the package llguidance, which is not installed. Install it with: pip install 'cllm[serve]'"
        ) from error


@dataclass
class GrammarConstraint:
    """A continuation of a compiled form."""

    _matcher: Any
    _vocab_size: int
    _end: int | None
    finished: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.finished = self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """(vocab_size,) bool: the tokens that may come next; only the end-of-text token, if there is one, where the text is finished.

        Raises UserError where the form turns out to need more work at this place than a step may take.
        """
        if self.finished:
            allowed = np.zeros(self._vocab_size, dtype=bool)
            if self._end is not None:
                allowed[self._end] = True
            return allowed
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(packed, bitorder="little", count=self._vocab_size).view(bool)

    def advance(self, token: int) -> None:
        """Takes a token that `mask` allows."""
        if self.finished and token == self._end:
            return
        self._matcher.consume_token(token)
        self._check()
        self.finished = self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(
                f"the form that the text must keep to cannot be followed further: {_first_line(self._matcher.get_error())}. Make it simpler."
            )


def _checked_text(kind: str, text: str | dict[str, Any]) -> str:
    """The text that is compiled. UserError for one that is too large or deep, or no JSON where that is expected."""
    if kind == "json_object":
        return '{"type":"object"}'
    if kind != "json_schema":
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{_WORDS[kind]} is empty. Give the text of it.")
        text = _checked_size(kind, text)
        for expression in [text] if kind == "regex" else _EXPRESSION.findall(text):
            if _written_out(expression) > MOST_WRITTEN_OUT:
                words = f"its repetitions come to more than {MOST_WRITTEN_OUT:,} characters"
                raise UserError(f"{_WORDS[kind]} is too large: {words}. Make it simpler.")
        return text
    text = _checked_size(kind, text) if isinstance(text, str) else text
    try:
        schema = json.loads(text) if isinstance(text, str) else text
    except RecursionError:
        raise UserError(_too_deep()) from None
    except ValueError as error:
        raise UserError(f"the JSON schema is no JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise UserError('the JSON schema must be a JSON object, like {"type": "object"}.')
    _check_depth(schema)
    return _checked_size(kind, json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


def _written_out(expression: str) -> int:
    """How many characters a regular expression comes to when its counted repetitions are written out; no more than is too much is counted."""
    totals, last = [0], 0  # of each group that is open; of the part that a repetition would be of
    for piece, least, most in _PIECE.findall(expression):
        if piece == "(":
            totals.append(0)
            last = 0
        elif piece == ")" and len(totals) > 1:
            last = totals.pop()
            totals[-1] += last
        elif least:
            count = min(max(int(least[:9]), int(most[:9] or 0)), MOST_WRITTEN_OUT + 1)
            totals[-1] += last * (count - 1)
            last *= count
        elif piece not in "?*+|":
            last = 1
            totals[-1] += 1
        if totals[-1] > MOST_WRITTEN_OUT:
            break
    return max(totals)


def _checked_size(kind: str, text: str) -> str:
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise UserError(f"{_WORDS[kind]} holds half of a surrogate pair, which is no character.")
    if len(text) > MOST_BYTES or len(text.encode()) > MOST_BYTES:
        raise UserError(f"{_WORDS[kind]} is too large: at most {MOST_BYTES // 1024} KB are compiled. Make it shorter.")
    return text


def _check_depth(schema: Any) -> None:
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise UserError(_too_deep())
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [value for values in inner if not isinstance(values, bool) for value in values if isinstance(value, (dict, list))]


def _too_deep() -> str:
    return f"the JSON schema is too deep: at most {MOST_DEPTH} objects and lists may lie inside each other. Use $ref for what repeats."


_lock = Lock()
_recent: dict[tuple[Any, ...], Any] = {}  # matchers by tokenizer and text, the oldest first
_MOST_RECENT = 64
_idle: list[_Trial] = []  # children that wait for the next text


def _compiled(tokenizer: Tokenizer, end: int | None, kind: str, text: str) -> Any:
    """The matcher at its beginning, of which each continuation takes a copy; those asked for last are kept."""
    key = tokenizer.hash, end, kind, text
    with _lock:
        if key in _recent:
            _recent[key] = _recent.pop(key)
            return _recent[key]
    import llguidance

    make = llguidance.LLMatcher
    if kind == "regex":
        grammar = make.grammar_from_regex(text)
    elif kind == "grammar":
        grammar = make.grammar_from_lark(text)
    else:
        try:
            grammar = make.grammar_from_json_schema(text, _JSON)
        except ValueError as error:
            raise UserError(f"{_WORDS[kind]} cannot be used: {_first_line(str(error))}.") from None
    _try(kind, grammar)
    limits = llguidance.LLParserLimits(precompute_large_lexemes=False, verbose_errors=False)
    matcher = make(_adapted(tokenizer, end), grammar, log_level=0, limits=limits)
    beginning = matcher.deep_copy()
    if not matcher.is_error() and not beginning.is_stopped():
        beginning.compute_bitmask()
    for each in (matcher, beginning):
        if each.is_error():
            raise UserError(f"{_WORDS[kind]} cannot be used: {_first_line(each.get_error())}.")
    with _lock:
        _recent[key] = matcher
        while len(_recent) > _MOST_RECENT:
            del _recent[next(iter(_recent))]
    return matcher


def _try(kind: str, grammar: str) -> None:
    """Compiles in a child process, which is ended when it takes too long. Raises UserError for that and for what is wrong with the text."""
    with _lock:
        trial = _idle.pop() if _idle else None
    trial = trial or _Trial()
    error = trial.error(grammar)
    if error is None:
        raise UserError(f"{_WORDS[kind]} is too large or too difficult: it cannot be compiled in {MOST_SECONDS:g} seconds. Make it simpler.")
    with _lock:
        _idle.append(trial)  # as many as were ever needed at once
    if error:
        raise UserError(f"{_WORDS[kind]} cannot be used: {_first_line(error)}.")


class _Trial:
    """A child process that compiles (trial_compiler.py). It ends when its input does, with this process at the latest."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("trial_compiler.py")
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", str(program), str(MOST_SECONDS)]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # ready: the time counts from here

    def error(self, grammar: str) -> str | None:
        """What is wrong with a grammar, "" for nothing; None where the child was ended, by us or by its limits."""
        assert self._process.stdin is not None and self._process.stdout is not None
        data = grammar.encode()
        timer = Timer(MOST_SECONDS, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(len(data).to_bytes(8, "little") + data)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            return str(json.loads(line))
        self._process.kill()
        self._process.communicate()
        return None


def _first_line(error: str) -> str:
    """What llguidance says, without the lines that show its own form of the text."""
    lines = [line.strip() for line in error.splitlines() if line.strip() and not line.startswith("<")]
    if not lines or lines[0].startswith("NoExtension"):
        return "it allows no text"
    reason = next((line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")), "")
    return f"{lines[0]} {reason}".strip().rstrip(".:")[:300]


@lru_cache(maxsize=8)
def _adapted(tokenizer: Tokenizer, end: int | None) -> Any:
    """The tokenizer as llguidance sees it: the bytes of each token. One without an end gets an id behind its vocabulary, which no mask shows.

    `end` is a part of the key because tokenizers that differ in their end alone are equal.
    """
    import llguidance

    size = tokenizer.vocab_size
    last = size if end is None else end
    content = [tokenizer.token_bytes(token) for token in range(size)] + [b"<|end|>"] * (end is None)
    special = sorted({*tokenizer.special_tokens.values(), last, *(token for token in range(size) if not content[token])})

    class Bytes:
        eos_token_id, bos_token_id, tokens, special_token_ids = last, None, content, special

        def __call__(self, text: bytes | str) -> list[int]:
            """Of text that has to follow: as the tokenizer splits it, or, where that would not give the same bytes, by the longest tokens."""
            data = text.encode() if isinstance(text, str) else bytes(text)
            try:
                ids = tokenizer.encode(data.decode())
            except (UserError, UnicodeDecodeError):
                ids = []
            return ids if tokenizer.decode_bytes(ids) == data else _longest(by_bytes, data)

    by_bytes = {each: token for token, each in reversed(list(enumerate(content))) if each and token not in special}
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


def _longest(by_bytes: dict[bytes, int], data: bytes) -> list[int]:
    """Tokens of the beginning of some bytes, each the longest that fits, up to where none does."""
    longest, found, begin = max(map(len, by_bytes), default=0), [], 0
    while begin < len(data):
        fitting = (data[begin:end] for end in range(min(len(data), begin + longest), begin, -1))
        piece = next((each for each in fitting if each in by_bytes), None)
        if piece is None:
            break
        found.append(by_bytes[piece])
        begin += len(piece)
    return found
