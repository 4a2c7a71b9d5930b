"""Packing: the text of a corpus to the tokens of its two splits. What an earlier packing holds of files that have not changed is copied.

    FOLDER/segments.json   the files, their digests, how texts were taken out of them, and how many segments each has
           segments.bin    a row for each segment, in order: its side, its characters, its bytes and its tokens

A segment is a document, or the part of it on one side. Tokens depend on a segment's text and the tokenizer alone, so that copied ones are those that
packing again would give, and every file of the whole is the same byte for byte. Before anything is copied, the checksums of the
earlier packing are compared.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from cllm.data.documents.corpus import SCAN_VERSION, Corpus, Report, Segment, pieces
from cllm.data.documents.scan import FileInfo
from cllm.data.documents.sides import SplitPlan
from cllm.data.tokens.dataset import Dataset
from cllm.data.tokens.shards import PackedTokens, ShardWriter
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.files import DATA, write_file
from cllm.runtime.errors import DataError

VERSION = 1
SEGMENT = np.dtype([("side", "<i8"), ("chars", "<i8"), ("bytes", "<i8"), ("tokens", "<i8")])
_BATCH_CHARS = 1 << 21  # characters of text that are tokenized together, and
_BATCH_PIECES = 1 << 15  # pieces at most


def pack(corpus: Corpus, plan: SplitPlan, tokenizer: Tokenizer, folder: Path, earlier: "Earlier | None", report: Report) -> int:
    """Writes FOLDER/train, FOLDER/val and the record of the segments; returns how many files were copied from `earlier`."""
    writers = []
    for name in ("train", "val"):
        (folder / name).mkdir()
        writers.append(ShardWriter(folder / name, tokenizer.vocab_size, tokenizer.hash, tokenizer.eot_id))
    copied, first = 0, 0
    files = []
    try:
        with open(folder / "segments.bin", "wb") as record:
            packer = _Packer(tokenizer, writers, record)
            for file, info in corpus.files:
                before = packer.num_segments
                known = None if earlier is None else earlier.take(file.name, _identity(info))
                if known is not None:
                    packer.copy(known, None if plan.sides is None else plan.sides[first : first + len(info.rows)])
                    report(int(info.rows["bytes"].sum()))
                    copied += 1
                else:
                    for segment in corpus.segments_of(file, info, first, plan, report):
                        packer.add(segment)
                first += len(info.rows)
                files.append([file.name, *_identity(info), packer.num_segments - before])
            packer.flush()
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise
    values = {"version": VERSION, "tokenizer": tokenizer.hash, "cut": _cut(plan), "blake2b": _checksum(packer.digest, files), "files": files}
    write_file(folder / "segments.json", json.dumps(values).encode("utf-8"), DATA)
    return copied


def _identity(info: FileInfo) -> list[Any]:
    """What tells the segments of a file: its content, and how documents are taken out of it."""
    return [info.digest, _described(*info.how())]


@functools.lru_cache(1024)
def _described(*how: Any) -> str:
    """The same few for many files."""
    return json.dumps([SCAN_VERSION, *how])


def _checksum(rows: Any, files: list[list[Any]]) -> str:
    """Of the whole record; `rows` has taken in segments.bin."""
    rows.update(json.dumps(files).encode("utf-8"))
    return rows.hexdigest()


def _cut(plan: SplitPlan) -> float | None:
    """Where documents are cut in two: the share of each for validation; None where they stay whole, on whichever side."""
    return plan.val_fraction if plan.sides is None else None


class _Packer:
    """Segments in, tokens out, in the same order, and a row of the record for each. Each segment that has tokens ends with the end-of-text token,
    where the tokenizer has one."""

    def __init__(self, tokenizer: Tokenizer, writers: list[ShardWriter], record: IO[bytes]):
        self._tokenizer, self._writers, self._record = tokenizer, writers, record
        self._end = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype=np.int64)
        self._waiting: list[tuple[Segment, str | None, bool]] = []  # a piece of a segment (None: it has none), and whether it is its last
        self._num_waiting = 0  # characters in it
        self._sizes = [0, 0, 0]  # characters, bytes and tokens of the segment so far
        self.num_segments = 0
        self.digest = hashlib.blake2b(digest_size=16)

    def add(self, segment: Segment) -> None:
        self.num_segments += 1
        previous = None  # a piece is put when it is known whether another follows
        for piece in pieces(segment.chunks):
            if previous is not None:
                self._put(segment, previous, False)
            previous = piece
        self._put(segment, previous, True)

    def copy(self, known: "Iterator[tuple[str, np.void, np.ndarray]]", sides: np.ndarray | None) -> None:
        """Segments whose tokens are known. sides: where each belongs now; None where it stays on its side."""
        self.flush()
        for number, (name, row, ids) in enumerate(known):
            side = int(row["side"] if sides is None else sides[number])
            self._writers[side].append(ids)
            self._close(side, name, int(row["chars"]), int(row["bytes"]), len(ids))
            self.num_segments += 1

    def flush(self) -> None:
        encoded = self._tokenizer.encode_arrays([piece or "" for _, piece, _ in self._waiting])
        sizes = self._sizes
        for (segment, piece, last), ids in zip(self._waiting, encoded):
            writer = self._writers[segment.side]
            if piece is not None:
                writer.append(ids)
                sizes[0] += len(piece)
                sizes[1] += len(piece) if piece.isascii() else len(piece.encode("utf-8"))
                sizes[2] += len(ids)
            if last:
                if piece is not None:
                    writer.append(self._end)
                    sizes[2] += len(self._end)
                self._close(segment.side, segment.name, *sizes)
                sizes[:] = 0, 0, 0
        self._waiting.clear()
        self._num_waiting = 0

    def _put(self, segment: Segment, piece: str | None, last: bool) -> None:
        self._waiting.append((segment, piece, last))
        self._num_waiting += len(piece or "")
        if self._num_waiting >= _BATCH_CHARS or len(self._waiting) >= _BATCH_PIECES:
            self.flush()

    def _close(self, side: int, name: str, chars: int, num_bytes: int, tokens: int) -> None:
        self._writers[side].end_document(name, chars, num_bytes)
        row = b"".join(value.to_bytes(8, "little") for value in (side, chars, num_bytes, tokens))
        self._record.write(row)
        self.digest.update(row)


class Earlier:
    """An earlier packing with the same tokenizer. Files are taken out of it in the order in which both have them: that of their names."""

    def __init__(self, dataset: Dataset, files: list[list[Any]], rows: np.ndarray):
        self._splits: list[PackedTokens] = [dataset.train, dataset.val]
        self._files, self._rows = files, rows
        self._names = [iter(split.iter_names()) for split in self._splits]
        self._tokens = [0, 0]  # of each split that lie before the next file
        self._file = self._row = 0

    @classmethod
    def find(cls, out: Path, corpus: Corpus, plan: SplitPlan, tokenizer: Tokenizer) -> "Earlier | None":
        """The packing in `out` that has the most in common with what is to be packed; None where none has anything, or it is damaged."""
        wanted = {(file.name, *_identity(info)) for file, info in corpus.files}
        best: tuple[int, Path, dict[str, Any]] | None = None
        for path in sorted(out.glob("tokens*/segments.json")):
            try:
                record = json.loads(path.read_text("utf-8"))
                if record["version"] != VERSION or record["tokenizer"] != tokenizer.hash or record["cut"] != _cut(plan):
                    continue
                alike = sum((name, digest, how) in wanted for name, digest, how, _ in record["files"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if alike and (best is None or alike > best[0]):
                best = alike, path.parent, record
        return None if best is None else cls._open(best[1], best[2], tokenizer)

    @classmethod
    def _open(cls, folder: Path, record: dict[str, Any], tokenizer: Tokenizer) -> "Earlier | None":
        try:
            dataset = Dataset.open(folder, tokenizer.hash)
            dataset.verify()
            rows = np.fromfile(folder / "segments.bin", dtype=SEGMENT)
            if _checksum(hashlib.blake2b(rows.tobytes(), digest_size=16), record["files"]) != record["blake2b"]:
                return None
        except (DataError, OSError, KeyError):
            return None
        found = [rows["tokens"][rows["side"] == side] for side in (0, 1)]
        fits = all((int(each.sum()), int((each > 0).sum())) == (split.num_tokens, split.num_documents)
                   for each, split in zip(found, (dataset.train, dataset.val)))  # fmt: skip
        return cls(dataset, record["files"], rows) if fits and sum(count for *_, count in record["files"]) == len(rows) else None

    def take(self, name: str, identity: list[Any]) -> Iterator[tuple[str, np.void, np.ndarray]] | None:
        """(name, row, tokens) of the segments of a file that is the same as then, to be taken at once; None where it is not."""
        while self._file < len(self._files) and self._files[self._file][0] < name:
            for _ in self._segments(False):
                pass
        if self._file == len(self._files) or self._files[self._file][:3] != [name, *identity]:
            return None
        return self._segments(True)

    def _segments(self, read: bool) -> Iterator[tuple[str, np.void, np.ndarray]]:
        count = int(self._files[self._file][3])
        self._file += 1
        for row in self._rows[self._row : self._row + count]:
            side, tokens = int(row["side"]), int(row["tokens"])
            name = next(self._names[side]) if tokens else ""
            ids = self._splits[side].read(self._tokens[side], tokens) if read else np.empty(0, dtype=np.int64)
            self._tokens[side] += tokens
            yield name, row, ids
        self._row += count
