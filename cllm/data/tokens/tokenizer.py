"""Text to token ids and back: byte-level BPE, WordPiece or Unigram trained on your own text, or one id per character.

All kinds are kept as a Hugging Face `tokenizer.json`, so that transformers reads the same file. The BPE uses the pre-tokenizer pattern
of GPT-2 (or of Llama 3) unchanged, because llama.cpp accepts only the patterns that it knows. A tokenizer.json made elsewhere can be used as well,
and so can tiktoken's files of ranks (tiktoken.py).

`bpe`   ids 0..15 are special (0 is <|endoftext|>, the end of every document), then 256 bytes, then merges; any text can be encoded and
        comes back unchanged. The vocabulary is a multiple of 64: what training leaves free is filled with reserved tokens at the end.
`wordpiece`, `unigram`   the same, with other rules for what stands behind the bytes (wordpiece.py, unigram.py).
`char`  ids are the characters of the data in code point order, as in nanoGPT; special tokens, if asked for, come after them, so that one
        file of text gives exactly as many ids as it has characters. Other characters cannot be encoded: that is an error that names them.

Text is never read as a special token: a document that contains the words "<|endoftext|>" stays what it was (see `allow_special`).
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm.data.documents.corpus import Corpus, TextSample, measure, pieces, stream_texts
from cllm.data.documents.scan import Reading
from cllm.data.documents.sides import TRAIN, VAL, SplitPlan, plan_split
from cllm.data.tokens.exactness import losses
from cllm.data.tokens.vocabulary import (
    BPE_SPECIALS,
    CHARACTER_PATTERN,
    END_OF_TEXT,
    FIM_NAMES,
    FIM_SETTINGS,
    FimTokens,
    byte_level_bytes,
    default_vocab_size,
    inner_bytes,
    learn_bpe,
    learn_characters,
    sentence_piece_bytes,
    splits_into_words,
    word_piece_bytes,
)
from cllm.files import DATA, foreign, read_named, reason, write_file
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.progress import ByteProgress

if TYPE_CHECKING:
    from cllm.data.tokens.words import Words

KINDS = ("bpe", "wordpiece", "unigram", "char")
SAMPLE_BYTES = 1_000_000_000  # the trainer of the tokenizers library counts pairs in 32 bits; more text than this can overflow them
_MUCH_TEXT = 1_500_000  # characters in one call, from which the words in it are remembered
UNIGRAM_SAMPLE_BYTES = 100_000_000  # more changes little, and each round of learning passes over all words many times
SETTINGS = "tokenizer_config.json"

# Names of the end of a document in tokenizers trained elsewhere, most specific first.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")


class Tokenizer:
    """Encodes and decodes; made by `train`, `load` or `from_json`, and never changed after that."""

    def __init__(self, content: dict[str, Any], settings: dict[str, Any] | None = None):
        model = content.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise DataError("This is not a tokenizer: a Hugging Face tokenizer.json with a model and its vocabulary was expected.")
        self._content = content
        self.kind: str = "char" if _is_char(content) else str(model.get("type") or "BPE").lower()
        added = content.get("added_tokens") or []
        self.special_tokens: dict[str, int] = {t["content"]: int(t["id"]) for t in added if t.get("special")}
        if isinstance(model["vocab"], dict):
            ids = {str(token): int(i) for token, i in model["vocab"].items()}
        else:  # unigram models list [token, score] pairs
            ids = {str(entry[0]): i for i, entry in enumerate(model["vocab"])}
        ids.update({t["content"]: int(t["id"]) for t in added})
        self._ids = ids
        self.vocab_size: int = max(ids.values()) + 1 if ids else 0
        # What Hugging Face keeps in tokenizer_config.json, beside the tokenizer: no part of its hash, because no token changes.
        template, end = _chat_template(settings or {}), _name((settings or {}).get("eos_token"))
        self.chat_template: str | None = template
        self.eot_token: str | None = end if end in ids else next((name for name in _END_NAMES if name in ids), None)
        self.eot_id: int | None = None if self.eot_token is None else ids[self.eot_token]
        self._fim_names = next((names for names in FIM_NAMES if all(name in ids for name in names)), None)
        self.fim_tokens: FimTokens | None = None if self._fim_names is None else FimTokens(*(ids[name] for name in self._fim_names))
        self._fim_is_taught = _names_fim(settings or {})

    # -- making one -------------------------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: "str | os.PathLike[str] | Iterable[str | os.PathLike[str]]",
        vocab_size: int = 4096,
        kind: str = "bpe",
        *,
        pre_tokenizer: str = "gpt-2",
        specials: Sequence[str] | None = None,
    ) -> "Tokenizer":
        """Learn a tokenizer from a folder or file (one str or Path: all that `cllm train` takes), or from a stream of texts (str) and files (Path).

        vocab_size: for "bpe", rounded up to a multiple of 64; ignored by "char", which has what the text has.
        specials: "char" only; the special tokens to put after the characters, none by default.
        Raises UserError on an unknown kind, a vocabulary too small for the bytes, or text without a single character.
        """
        if kind not in KINDS:
            raise UserError(f'Tokenizer kind must be one of {", ".join(KINDS)}, got "{kind}".')
        if isinstance(texts, (str, os.PathLike)) and specials is None:  # with its bounded sample, and an end token where there are documents to end
            return train_tokenizer(_place(texts), vocab_size, kind, pre_tokenizer=pre_tokenizer)
        stream = _texts(texts)
        if kind == "char":
            return cls(learn_characters(stream, tuple(specials or ())))
        if specials is not None:
            raise UserError(f'The special tokens of a "{kind}" tokenizer have fixed ids; `specials` is for kind="char".')
        return cls(_learner(kind)(stream, vocab_size, pre_tokenizer))

    def with_end(self, name: str) -> "Tokenizer":
        """The same tokenizer with this token as the end of a text."""
        return Tokenizer(self._content, self.settings | {"eos_token": name})

    def with_fim(self) -> "Tokenizer":
        """The same tokenizer (the same hash) for a model that has learnt to fill in the middle (`cllm.data.tokens.fim`)."""
        assert self._fim_names is not None
        return Tokenizer(self._content, self.settings | {"extra_special_tokens": dict(zip(FIM_SETTINGS, self._fim_names))})

    @property
    def fim(self) -> FimTokens | None:
        """The tokens around a middle that the model of this tokenizer has learnt to fill in; None where it has not.

        Subword tokenizers that are trained here have these tokens from the start, so that their settings have to say whether a model knows them.
        Any other tokenizer with such tokens comes with a model that does.
        """
        return self.fim_tokens if self._fim_is_taught or BPE_SPECIALS[-1] not in self._ids else None

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer", settings: dict[str, Any] | None = None) -> "Tokenizer":
        """The tokenizer in the text of a tokenizer.json, with `settings` of its tokenizer_config.json; DataError when it is not one."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is not a tokenizer.json: {error}.") from None
        if not isinstance(content, dict):
            raise DataError(f"{name} is not a tokenizer.json: an object was expected at its top.")
        try:
            tokenizer = cls(content, settings)
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # well-formed JSON of another shape
            raise DataError(f"{name} is not a tokenizer.json: {type(error).__name__}: {error}.") from None
        if tokenizer.kind != "char":
            tokenizer._check_backend(name)
        return tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer in a tokenizer.json, in a folder that holds one, or in a file of tiktoken's ranks (`from_tiktoken`); DataError when there is
        none."""
        file = Path(path)
        if file.suffix == ".tiktoken" and file.is_file():
            from cllm.data.tokens.tiktoken import from_tiktoken

            return cls(from_tiktoken(file))
        if file.is_dir():
            file = file / "tokenizer.json"
        if what := foreign(file):
            raise DataError(f"{file} {what}")
        try:
            text = read_named(file).decode("utf-8")
        except FileNotFoundError:
            raise DataError(f"There is no tokenizer at {file}. Train one with `cllm tokenizer train`.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as a tokenizer: {reason(error)}.") from None
        return cls.from_json(text, str(file), _read_settings(file.with_name(SETTINGS)) if file.name == "tokenizer.json" else None)

    @property
    def settings(self) -> dict[str, Any]:
        """What of tokenizer_config.json cannot be known from the tokenizer alone: the chat template, an end of text of another name, and whether the
        model has learnt to fill in the middle."""
        values: dict[str, Any] = {} if self.chat_template is None else {"chat_template": self.chat_template}
        if self._fim_is_taught and self._fim_names is not None:
            values["extra_special_tokens"] = dict(zip(FIM_SETTINGS, self._fim_names))
        usual = next((name for name in _END_NAMES if name in self._ids), None)
        return values if self.eot_token == usual else values | {"eos_token": self.eot_token}

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer (the same hash) with a chat template in Jinja, as Hugging Face's."""
        return Tokenizer(self._content, self.settings | {"chat_template": template})

    def to_json(self) -> str:
        """The canonical text of the tokenizer.json: the same tokenizer always gives the same bytes."""
        return json.dumps(self._content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json (into the folder, when `path` is one), whole or not at all; beside it, where there is something to put there
        (a chat template), tokenizer_config.json."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if self.settings and file.name == "tokenizer.json":
            write_file(file.with_name(SETTINGS), json.dumps(self.settings, indent=1, ensure_ascii=False).encode("utf-8"), DATA)
        write_file(file, self.to_json().encode("utf-8"), DATA)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical text; token shards and checkpoints carry it, and a mismatch is refused."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, hash={self.hash[:12]})"

    # -- encoding ---------------------------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text. With allow_special the names of special tokens in it become their ids (chat templates need that)."""
        if allow_special and self.special_tokens:
            names = "|".join(re.escape(name) for name in sorted(self.special_tokens, key=len, reverse=True))
            parts = re.split(f"({names})", text)
            return [i for part in parts if part for i in ([self.special_tokens[part]] if part in self.special_tokens else self.encode(part))]
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, in parallel."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts as int64 arrays; what packing uses."""
        try:
            if self.kind == "char":
                return [self._encode_characters(text) for text in texts]
            words = self._words if sum(map(len, texts)) >= _MUCH_TEXT else None
            if words is not None:
                return words.encode(texts)
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # the library says TypeError
            if any(0xD800 <= ord(c) < 0xE000 for text in texts for c in text):
                raise UserError("The text holds half of a surrogate pair, which is no character. Decode it properly first.") from None
            raise
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    @cached_property
    def _words(self) -> "Words | None":
        """The faster way to encode much text, where words are encoded one by one whatever stands around them: there the ids are the same."""
        added = self._content.get("added_tokens") or []
        if self._content.get("normalizer") or not splits_into_words(self._content) or not all(token.get("special") for token in added):
            return None
        from cllm.data.tokens.words import Words

        words = Words(lambda each: [encoding.ids for encoding in self._backend.encode_batch_fast(each, add_special_tokens=False)])
        return words if words.agrees() else None

    def known(self, text: str) -> str:
        """The text without characters that cannot be encoded; all of it, except for a character tokenizer."""
        return "".join(c for c in text if c in self._characters) if self.kind == "char" else text

    def _encode_characters(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        table = self._character_ids
        ids = table[np.minimum(points, len(table) - 1)] if len(table) else np.full(len(points), -1)
        if len(ids) and int(ids.min()) < 0:
            unknown = sorted({text[i] for i in np.flatnonzero(ids < 0)[:1000]})
            shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise UserError(
                f"This character tokenizer knows {len(self._characters)} characters, and {shown} is not among them. "
                "Leave such characters out, or use a byte-level tokenizer (cllm train --tokenizer bpe), which can encode anything."
            )
        return ids

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no valid UTF-8 become U+FFFD. Special tokens are left out unless skip_special=False."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The exact bytes of ids."""
        special = self._special_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(i) for i in map(int, ids) if i not in special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token (of a special token: its name); UserError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"Token id {token_id} is outside the vocabulary of {self.vocab_size} tokens.")
        return self._bytes[token_id]

    def stream_decoder(self, *, skip_special: bool = True) -> "StreamDecoder":
        """Decodes ids one by one for live output, holding back a character until all of its bytes are there."""
        return StreamDecoder(self, skip_special)

    # -- facts ------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text that each token stands for, 0 for special tokens; for bits per byte."""
        lengths = np.array([len(token) for token in self._bytes], dtype=np.int64)
        lengths[list(self._special_ids)] = 0
        return lengths

    def stats(self, texts: "str | os.PathLike[str] | Iterable[str | os.PathLike[str]]") -> dict[str, Any]:
        """How well this tokenizer fits the text of a folder or file, or a stream of texts (str) and files (Path).

        bytes_per_token, chars_per_token: higher is better; vocabulary_used: share of the ids that occur;
        coverage: share of the characters that can be encoded (always 1 for a byte-level tokenizer).
        """
        tokens = chars = num_bytes = unknown = 0
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for piece in _texts(texts):
            chars += len(piece)
            num_bytes += len(piece.encode("utf-8"))
            known = self.known(piece)
            unknown += len(piece) - len(known)
            piece = known
            ids = self.encode_arrays([piece])[0]
            tokens += len(ids)
            counts += np.bincount(ids, minlength=self.vocab_size)
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "hash": self.hash,
            "num_tokens": tokens,
            "num_chars": chars,
            "num_bytes": num_bytes,
            "bytes_per_token": num_bytes / tokens if tokens else 0.0,
            "chars_per_token": chars / tokens if tokens else 0.0,
            "vocabulary_used": float(np.count_nonzero(counts)) / self.vocab_size if self.vocab_size else 0.0,
            "coverage": 1.0 - unknown / chars if chars else 1.0,
        }

    @cached_property
    def losses(self) -> list[str]:
        """Why a text may not come back from its tokens as it was, in words; nothing where it always does, as from every tokenizer trained here."""
        return losses(self._content)

    # -- tables, made on first use ----------------------------------------------------------------------------------------------------

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @cached_property
    def _characters(self) -> frozenset[str]:
        return frozenset(token for token in self._ids if len(token) == 1 and token not in self.special_tokens)

    @cached_property
    def _character_ids(self) -> np.ndarray:
        """(largest code point + 2,) int64, -1 where there is no id; the last entry stands for everything above."""
        table = np.full(max(map(ord, self._characters), default=-1) + 2, -1, dtype=np.int64)
        for character in self._characters:
            table[ord(character)] = self._ids[character]
        return table

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = {t["content"] for t in self._content.get("added_tokens") or []}
        byte_level = _uses_byte_level(self._content)
        read = str.encode if self.kind == "char" else byte_level_bytes if byte_level else sentence_piece_bytes
        if self.kind == "wordpiece":
            read = inner_bytes if byte_level else word_piece_bytes
        table = [b""] * self.vocab_size
        for token, i in self._ids.items():
            table[i] = token.encode("utf-8") if token in added else read(token)
        return table

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(json.dumps(self._content, ensure_ascii=False))
        backend.encode_special_tokens = True  # the names of special tokens in a text are text
        backend.no_padding()
        backend.no_truncation()
        return backend

    def _check_backend(self, name: str) -> None:
        try:
            _ = self._backend
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name} is not a tokenizer.json that the tokenizers library reads: {error}.") from None


class StreamDecoder:
    """Ids in, text out, one at a time; only whole characters are given."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id], skip_special=self._skip_special))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never got all of its bytes, otherwise nothing."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(
    path: str | os.PathLike[str],
    vocab_size: int | None = None,
    kind: str = "bpe",
    *,
    pre_tokenizer: str = "gpt-2",
    sample_bytes: int = SAMPLE_BYTES,
    reading: Reading = Reading(),
    log: Callable[[str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tokenizer:
    """A tokenizer trained on all text at a path (whatever `cllm train` takes), without anything being written.

    vocab_size: of a BPE tokenizer; None chooses by the amount of text. sample_bytes: how much of the text it learns from at most.
    reading: how texts are taken out of the files.
    log gets a sentence about what was found; progress(step, bytes done, bytes in all) replaces the progress line.
    Raises DataError when there is no text, UserError for a vocabulary that is too small or an unknown pre-tokenizer.
    """
    with ByteProgress(progress) as bar:
        corpus = measure(path, bar, log, reading)
        return train_on(corpus, plan_split(corpus.rows, 0.0), kind, vocab_size, pre_tokenizer, sample_bytes, bar)[0]


def train_on(
    corpus: Corpus, plan: SplitPlan, kind: str, vocab_size: int | None, pre_tokenizer: str, sample_bytes: int, bar: ByteProgress, fim: bool = False
) -> tuple[Tokenizer, TextSample]:
    """A tokenizer, and what of the text it learned from: the training documents, or a sample of their pieces where they are more than `sample_bytes`
    (of Unigram, more than 100 MB). A character tokenizer takes the characters of all text, validation included, because it could not encode
    others. fim: it gets the tokens for filling in the middle, which all others have."""
    sides = (TRAIN, VAL) if kind == "char" else (TRAIN,)
    if kind == "unigram":
        sample_bytes = min(sample_bytes, UNIGRAM_SAMPLE_BYTES)
    of_bytes = corpus.num_bytes if kind == "char" else plan.train_bytes(corpus.rows)
    sample = TextSample(0, of_bytes, 0, 1.0 if kind == "char" else min(1.0, sample_bytes / max(of_bytes, 1)))

    def texts() -> Iterator[str]:
        yield from sample.take(corpus, plan, sides, bar.step("Reading text for the tokenizer", corpus.num_bytes))
        bar.heartbeat("Learning the vocabulary")  # the library has all text and now counts pairs, without a word

    specials: tuple[str, ...] | None = (END_OF_TEXT,) if kind == "char" and (fim or len(corpus.rows) > 1) else None
    if specials is not None and fim:
        specials += FIM_NAMES[0]
    size = default_vocab_size(sample.of_bytes) if vocab_size is None else vocab_size
    tokenizer = Tokenizer.train(texts(), size, kind, pre_tokenizer=pre_tokenizer, specials=specials)
    bar.end()
    return tokenizer, sample


def _texts(texts: Any) -> Iterator[str]:
    """Pieces of the text at one place, or of a stream of texts (str) and places (Path)."""
    for item in [_place(texts)] if isinstance(texts, (str, os.PathLike)) else texts:
        if isinstance(item, str):
            yield from pieces([item])
        else:
            yield from stream_texts(item)


def _place(path: str | os.PathLike[str]) -> Path:
    if isinstance(path, str) and ("\n" in path or len(path) > 4096):
        raise UserError("A single str names a file or folder. Give text itself as a list: [text].")
    return Path(path)


def _read_settings(path: Path) -> dict[str, Any]:
    """A tokenizer_config.json (and a chat_template.jinja beside it, where transformers 5 puts the template); none is no fault."""
    try:
        values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        template = path.with_name("chat_template.jinja")
        if isinstance(values, dict) and template.is_file():
            values["chat_template"] = template.read_text("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as the settings of a tokenizer: {error}.") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(values).__name__}.")
    return values


def _chat_template(settings: dict[str, Any]) -> str | None:
    """One template, or the one named default of several."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _name(token: Any) -> str | None:
    """A token given as text or, by older versions, as an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _names_fim(settings: dict[str, Any]) -> bool:
    """Whether the settings name tokens for filling in the middle: among the extra ones as they are written here, or by themselves."""
    extra = settings.get("extra_special_tokens")
    return any(FIM_SETTINGS[0] in place for place in (settings, extra) if isinstance(place, dict))


def _learner(kind: str) -> Callable[[Iterator[str], int, str], dict[str, Any]]:
    """What learns the vocabulary of a kind."""
    if kind == "wordpiece":
        from cllm.data.tokens.wordpiece import learn_wordpiece

        return learn_wordpiece
    if kind == "unigram":
        from cllm.data.tokens.unigram import learn_unigram  # numba is imported only where one is trained

        return learn_unigram
    return learn_bpe


def _is_char(content: dict[str, Any]) -> bool:
    split = content.get("pre_tokenizer") or {}
    return content["model"].get("type") == "WordLevel" and split.get("pattern") == {"Regex": CHARACTER_PATTERN}


def _uses_byte_level(content: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
