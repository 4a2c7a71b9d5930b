"""What is given beside the documents: text for evaluation, which must not be among them, and examples of good text, by which they are scored.

Both are read as documents are, whatever kind of file they stand in. What cannot be read is told, because it could not be heeded.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cllm.data.clean import decontaminate, quality
from cllm.data.documents.corpus import pieces
from cllm.data.extract.options import Options
from cllm.data.preparation.duplicates import save
from cllm.data.preparation.extraction import path_of, rows_of, sandbox_of
from cllm.data.preparation.rows import Row, read_rows
from cllm.runtime.errors import DataError

MOST_TEXTS, MOST_CHARS = 5000, 20_000
"""Of examples, and of each of them, that a score learns from."""
NAMED = 200
"""Files that could not be read which are named."""


class _Texts:
    """The texts of files. What was found is counted while they are read: `count` texts, and `unread`, [file, reason] of what gave none."""

    def __init__(self, inputs: Sequence[Sequence[str]], options: Mapping[str, Any]) -> None:
        """inputs: [root, name of a file below it]. options: as of `extract`."""
        self._inputs, self._options = inputs, Options.from_dict(dict(options))
        self.count = 0
        self.unread: list[list[str]] = []

    def __iter__(self) -> Iterator[str]:
        sandbox = sandbox_of(self._options)
        for root, name in self._inputs:
            for _, row in rows_of(path_of(root, name), name, self._options, sandbox):
                if row["dropped_because"]:
                    self.unread.append([row["path"], row["dropped_because"]])
                elif row["text"]:
                    self.count += 1
                    yield row["text"]

    def facts(self) -> dict[str, Any]:
        return {"texts": self.count, "unread": self.unread[:NAMED], "num_unread": len(self.unread)}


def evaluation(place: str, inputs: list[list[str]], options: dict[str, Any]) -> dict[str, Any]:
    """Writes PLACE.grams and PLACE.sizes: the runs of words of the texts in these files (see decontaminate.py). inputs: [root, name]."""
    texts = _Texts(inputs, {**options, "every_text": True})
    grams = decontaminate.grams_of(texts)
    if not len(grams.hashes):
        raise DataError(f"the text for evaluation has no {decontaminate.SHORTEST} words in a row{_but(texts.unread)}. Give another --exclude.")
    files = {".grams": save(Path(place + ".grams"), grams.hashes), ".sizes": save(Path(place + ".sizes"), grams.sizes)}
    return {"files": files, "runs": len(grams.hashes), **texts.facts()}


def _but(unread: list[list[str]]) -> str:
    """The first file that could not be read, for the end of a sentence."""
    return f" ({unread[0][0]}: {unread[0][1]})" if unread else ""


@functools.lru_cache(1)
def grams_at(place: str, digest: str) -> decontaminate.Grams:
    """What `evaluation` has written. digest: of its files, so that others under the same name are read anew."""
    return decontaminate.arranged(np.fromfile(place + ".grams", np.uint64), np.fromfile(place + ".sizes", np.int64))


def score(place: str, inputs: list[list[str]], like: list[list[str]], options: dict[str, Any]) -> dict[str, Any]:
    """Writes PLACE.weights: what tells the texts in the files `like`, [root, name], from a sample of the documents of extracted pieces, each of some
    files. There are two scores, and each half of the documents is judged by the one that has not learnt from it."""
    texts = _Texts(like, options)
    examples = [piece[:MOST_CHARS] for piece in itertools.islice((piece for text in texts for piece in pieces([text])), MOST_TEXTS)]
    sample = list(_sample(inputs))
    try:
        learned = [quality.train(examples, [text for other, text in sample if other != half]) for half in (0, 1)]
    except DataError as error:
        raise DataError(f"{error}{_but(texts.unread)}") from None
    return {"files": {".weights": save(Path(place + ".weights"), np.stack([each.weights for each in learned]))}, **texts.facts()}


@functools.lru_cache(1)
def score_at(place: str, digest: str) -> tuple[quality.Quality, ...]:
    """What `score` has written: for each half of the documents its score."""
    return tuple(map(quality.loaded, np.fromfile(place + ".weights", np.float32).reshape(2, -1)))


def _sample(inputs: list[list[str]]) -> Iterator[tuple[int, str]]:
    """Of each piece, which may be in several files, the same number of documents, drawn by their ids: (half, text)."""
    each = max(1, MOST_TEXTS // max(len(inputs), 1))
    for places in inputs:
        ids = [number for number, row in _numbered(places, ("id", "dropped_because")) if not row["dropped_because"]]
        drawn = set(sorted(ids, key=lambda number: hashlib.blake2b(number.encode(), digest_size=8).digest())[:each])
        for number, row in _numbered(places, ("id", "text")):
            if number in drawn:
                yield quality.half_of(number), row["text"][:MOST_CHARS]


def _numbered(places: list[str], columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """(id, row) of the documents of a piece."""
    rows = (row for place in places for row in read_rows(Path(place), columns))
    return ((f"{row['id'][:8]}{number:08x}", row) for number, row in enumerate(rows))
