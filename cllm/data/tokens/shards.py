"""Packed tokens on disk: one long sequence of tokens, written once and then memory-mapped.

    FOLDER/shard-00000.bin ...   the tokens, little-endian uint16 (vocabularies up to 65,536) or uint32
           offsets.bin           int64 (num_documents + 1): the position of the first token of each document, and the number of tokens
           documents.jsonl       the name of each document, a JSON string on a line
           counts.bin            int64 (vocab_size): how often each token occurs
           index.json            the numbers of tokens and documents, the hash of the tokenizer, and the size and BLAKE2b checksum of every
                                 file above; written last

A folder appears whole or not at all (`cllm.files.new_folder`). The sizes are checked whenever it is opened, the checksums by `verify`.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from cllm.files import DATA, write_file
from cllm.runtime.errors import DataError
from cllm.runtime.mapped_file import mapped

FORMAT = "cllm-tokens"
VERSION = 1
SHARD_TOKENS = 1 << 27
_TOGETHER = 1 << 18  # tokens that are counted and written together, at least
_AGAIN = "Pack the data again (`cllm pack`)."


class _HashedFile:
    """A file that is written front to back; `close` returns its size and checksum."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by `close`

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.size += len(content)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"file": self.path.name, "size": self.size, "blake2b": self._hash.hexdigest()}

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()


class ShardWriter:
    """Writes packed tokens into an existing folder: `append` tokens, `end_document` after each document, `close` at the end.

    vocab_size: every token is below it. eot_id: the token that ends a document, None where there is none. shard_tokens: the tokens of a file.
    """

    def __init__(self, folder: Path, vocab_size: int, tokenizer_hash: str, eot_id: int | None, shard_tokens: int = SHARD_TOKENS):
        self.folder = folder
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._facts = {"tokenizer": tokenizer_hash, "vocab_size": vocab_size, "eot_id": eot_id}
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._shard: _HashedFile | None = None
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._names = _HashedFile(folder / "documents.jsonl")
        self._offsets = _HashedFile(folder / "offsets.bin")
        self._offsets.write(np.zeros(1, dtype="<i8").tobytes())
        self._waiting: list[np.ndarray] = []  # tokens that are not written yet
        self._num_waiting = 0
        self._last_end = 0
        self.num_tokens = self.num_documents = self.num_bytes = self.num_chars = 0

    def append(self, ids: np.ndarray) -> None:
        """Adds tokens (n,) to the document that is being written."""
        if not len(ids):
            return
        self._waiting.append(ids)
        self._num_waiting += len(ids)
        self.num_tokens += len(ids)
        if self._num_waiting >= _TOGETHER:
            self._write()

    def _write(self) -> None:
        """Counts and writes what waits: many small documents together, because to count has a price for each token of the vocabulary."""
        if not self._waiting:
            return
        ids = np.concatenate(self._waiting)
        self._waiting.clear()
        self._num_waiting = 0
        self._counts += np.bincount(ids, minlength=len(self._counts))  # fails for a token outside the vocabulary
        written = 0
        while written < len(ids):
            if self._shard is None:
                self._shard = _HashedFile(self.folder / f"shard-{len(self._shards):05d}.bin")
            room = self._shard_tokens - self._shard.size // self._dtype.itemsize
            part = ids[written : written + room]
            self._shard.write(np.ascontiguousarray(part, dtype=self._dtype).tobytes())
            written += len(part)
            if len(part) == room:
                self._close_shard()

    def end_document(self, name: str, num_chars: int, num_bytes: int) -> None:
        """Makes what was appended since the last document a document of its own. `num_chars` and `num_bytes` (in UTF-8) are the sizes of its text
        without the end token. A document without a token is left out."""
        if self.num_tokens == self._last_end:
            return
        self._last_end = self.num_tokens
        self._names.write((json.dumps(name) + "\n").encode("ascii"))
        self._offsets.write(self.num_tokens.to_bytes(8, "little"))
        self.num_documents += 1
        self.num_chars += num_chars
        self.num_bytes += num_bytes

    def close(self) -> None:
        """Completes all files. index.json is written last and makes the folder valid."""
        self._write()
        if self._shard is not None:
            self._close_shard()
        counts = _HashedFile(self.folder / "counts.bin")
        counts.write(self._counts.astype("<i8").tobytes())
        index = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": "uint16" if self._dtype.itemsize == 2 else "uint32",
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_chars": self.num_chars,
            "num_bytes": self.num_bytes,
            **self._facts,
            "shards": self._shards,
            "offsets": self._offsets.close(),
            "documents": self._names.close(),
            "counts": counts.close(),
        }
        write_file(self.folder / "index.json", json.dumps(index, indent=1).encode("utf-8"), DATA)

    def abandon(self) -> None:
        """Closes the files without completing them."""
        for file in (self._shard, self._names, self._offsets):
            if file is not None:
                file.abandon()

    def _close_shard(self) -> None:
        assert self._shard is not None
        tokens = self._shard.size // self._dtype.itemsize
        self._shards.append({**self._shard.close(), "num_tokens": tokens})
        self._shard = None


@dataclass(frozen=True)
class _File:
    """What index.json says about one file."""

    name: str
    size: int
    blake2b: str

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "_File":
        name = str(values["file"])
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"a file name may not lead elsewhere: {name!r}")
        return cls(name, int(values["size"]), str(values["blake2b"]))


class PackedTokens:
    """Packed tokens, memory-mapped: `read(start, count)` returns tokens, `document_starts` tells where documents begin.

    Raises DataError when the folder is missing, foreign, of a newer format, incomplete, or packed with another tokenizer than
    `tokenizer_hash` (when given).
    """

    def __init__(self, folder: str | os.PathLike[str], tokenizer_hash: str | None = None):
        self.folder = Path(folder)
        index = self._load_index()
        try:
            if index.get("format") != FORMAT:
                raise ValueError(f'format is {index.get("format")!r}, expected "{FORMAT}"')
            if int(index["version"]) > VERSION:
                raise ValueError(f"version {index['version']} is newer than {VERSION}, the newest that this program reads")
            self.num_tokens = int(index["num_tokens"])
            self.num_documents = int(index["num_documents"])
            self.num_chars = int(index["num_chars"])
            self.num_bytes = int(index["num_bytes"])
            self.vocab_size = int(index["vocab_size"])
            self.eot_id: int | None = None if index["eot_id"] is None else int(index["eot_id"])
            self.tokenizer_hash = str(index["tokenizer"])
            self.dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[index["dtype"]])
            self._shard_files = [_File.parse(shard) for shard in index["shards"]]
            self._offsets_file, self._names_file, self._counts_file = (_File.parse(index[key]) for key in ("offsets", "documents", "counts"))
            sizes = [shard.size // self.dtype.itemsize for shard in self._shard_files]
            if sum(sizes) != self.num_tokens or any(shard.size % self.dtype.itemsize for shard in self._shard_files):
                raise ValueError(f"the shards hold {sum(sizes):,} tokens, and num_tokens is {self.num_tokens:,}")
            if self._offsets_file.size != 8 * (self.num_documents + 1) or self._counts_file.size != 8 * self.vocab_size:
                raise ValueError("the sizes of offsets.bin and counts.bin do not fit the counts")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{self.folder / 'index.json'} is not a valid index of packed tokens: {what}. {_AGAIN}") from None
        if tokenizer_hash is not None and tokenizer_hash != self.tokenizer_hash:
            raise DataError(
                f"{self.folder} was packed with another tokenizer (hash {self.tokenizer_hash[:12]}, expected {tokenizer_hash[:12]}): "
                "its numbers mean other text. Pack the data again with this tokenizer, or use the model that belongs to these tokens."
            )
        self._check_sizes()
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._shards = [self._map(shard, self.dtype) for shard in self._shard_files]
        self._offsets = self._map(self._offsets_file, np.dtype("<i8"))
        if int(self._offsets[0]) != 0 or int(self._offsets[-1]) != self.num_tokens:
            raise DataError(f"{self.folder / 'offsets.bin'} does not fit {self.num_tokens:,} tokens. {_AGAIN}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, num_tokens={self.num_tokens:,}, num_documents={self.num_documents:,})"

    @property
    def document_starts(self) -> np.ndarray:
        """(num_documents,) int64: position of the first token of each document."""
        return self._offsets[:-1]

    @property
    def document_lengths(self) -> np.ndarray:
        """(num_documents,) int64: number of tokens of each document."""
        return np.diff(self._offsets)

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the tokens from position `start`, across shards."""
        assert start >= 0 and count >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < count:
            begin = start + filled - (int(self._ends[shard - 1]) if shard else 0)
            part = self._shards[shard][begin : begin + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return out

    def document_at(self, position: int) -> int:
        """The number of the document that holds the token at this position."""
        return int(np.searchsorted(self._offsets, position, side="right")) - 1

    def document_name(self, document: int) -> str:
        """The name of a document: its file, or file:line where a file holds several. Reads the list of names up to it."""
        with open(self.folder / self._names_file.name, "rb") as file:
            for number, line in enumerate(file):
                if number == document:
                    return str(json.loads(line))
        raise DataError(f"{self.folder} has {self.num_documents:,} documents; there is no number {document:,}.")

    def document_names(self) -> list[str]:
        """The names of all documents, in order."""
        return list(self.iter_names())

    def iter_names(self) -> Iterator[str]:
        """The names of all documents, one after the other as they are read from the file."""
        with open(self.folder / self._names_file.name, "rb") as file:
            for line in file:
                yield str(json.loads(line))

    def token_counts(self) -> np.ndarray:
        """(vocab_size,) int64: how often each token occurs."""
        return np.array(self._map(self._counts_file, np.dtype("<i8")))

    def unigram_nats(self, reference: "PackedTokens | None" = None) -> float:
        """The loss, in nats per token, of a model that knows only how frequent each token is: what a language model must improve on.

        The frequencies are those of these tokens themselves, which gives their entropy, or those of `reference`, the training split for example.
        There each token counts once more than it occurs, so that one that does not occur is unlikely rather than impossible.
        """
        counts = self.token_counts().astype(np.float64)
        total = counts.sum()
        if not total:
            return 0.0
        if reference is None or reference is self:
            seen = counts[counts > 0]
            return float(-(seen * np.log(seen / total)).sum() / total)
        model = reference.token_counts().astype(np.float64) + 1.0
        return float(-(counts * np.log(model / model.sum())).sum() / total)

    def unigram_nats_per_byte(self, reference: "PackedTokens | None" = None) -> float:
        """`unigram_nats` per byte of text; divided by ln 2 it is bits per byte."""
        return self.unigram_nats(reference) * self.num_tokens / max(self.num_bytes, 1)

    def verify(self) -> None:
        """Compares every byte with the checksums; the DataError for damage names the file."""
        for file in self._files():
            digest = hashlib.blake2b(digest_size=16)
            with open(self.folder / file.name, "rb") as raw:
                while block := raw.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != file.blake2b:
                raise DataError(f"{self.folder / file.name} is damaged: its checksum is not the one in index.json. {_AGAIN}")

    def _files(self) -> list[_File]:
        return [*self._shard_files, self._offsets_file, self._names_file, self._counts_file]

    def _load_index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise DataError(f"{self.folder} holds no packed tokens (there is no index.json). Make some with `cllm pack`.") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as an index of packed tokens: {error}. {_AGAIN}") from None
        if not isinstance(index, dict):
            raise DataError(f"{path} is not an index of packed tokens: an object was expected. {_AGAIN}")
        return index

    def _check_sizes(self) -> None:
        for file in self._files():
            path = self.folder / file.name
            try:
                size = path.stat().st_size
            except OSError:
                raise DataError(f"{path} is missing. {_AGAIN}") from None
            if size != file.size:
                raise DataError(f"{path} has {size:,} bytes, and {file.size:,} were expected: it is damaged. {_AGAIN}")

    def _map(self, file: _File, dtype: np.dtype) -> np.ndarray:
        return mapped(self.folder / file.name, dtype)
