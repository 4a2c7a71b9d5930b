"""What is given beside the documents: text for evaluation, which must not be among them, and examples of good text, by which they are scored."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cllm.data.clean import decontaminate, quality
from cllm.data.documents.corpus import stream_texts
from cllm.data.preparation.duplicates import save
from cllm.data.preparation.rows import read_rows
from cllm.runtime.errors import DataError

MOST_TEXTS, MOST_CHARS = 5000, 20_000
"""Of examples, and of each of them, that a score learns from."""


def evaluation(place: str, inputs: list[str]) -> dict[str, Any]:
    """Writes PLACE.grams and PLACE.sizes: the runs of words of the texts at these places (see decontaminate.py)."""
    grams = decontaminate.grams_of(text for each in inputs for text in stream_texts(each))
    if not len(grams.hashes):
        raise DataError(f"the text for evaluation in {', '.join(inputs)} has no {decontaminate.SHORTEST} words in a row. Give another --exclude.")
    return {"files": {".grams": save(Path(place + ".grams"), grams.hashes), ".sizes": save(Path(place + ".sizes"), grams.sizes)}}


@functools.lru_cache(1)
def grams_at(place: str, digest: str) -> decontaminate.Grams:
    """What `evaluation` has written. digest: of its files, so that others under the same name are read anew."""
    return decontaminate.arranged(np.fromfile(place + ".grams", np.uint64), np.fromfile(place + ".sizes", np.int64))


def score(place: str, like: str, inputs: list[str]) -> dict[str, Any]:
    """Writes PLACE.weights: what tells the texts at `like` from a sample of the documents of extracted pieces."""
    examples = [text[:MOST_CHARS] for text in itertools.islice(stream_texts(like), MOST_TEXTS)]
    learned = quality.train(examples, list(_sample(inputs)))
    return {"files": {".weights": save(Path(place + ".weights"), learned.weights)}}


@functools.lru_cache(1)
def score_at(place: str, digest: str) -> quality.Quality:
    """What `score` has written."""
    return quality.loaded(np.fromfile(place + ".weights", np.float32))


def _sample(inputs: list[str]) -> Iterator[str]:
    """Of each piece the same number of documents, drawn by their ids."""
    each = max(1, MOST_TEXTS // max(len(inputs), 1))
    for place in inputs:
        ids = [row["id"] for row in read_rows(Path(place), ("id", "dropped_because")) if not row["dropped_because"]]
        drawn = set(sorted(ids, key=lambda number: hashlib.blake2b(number.encode(), digest_size=8).digest())[:each])
        for row in read_rows(Path(place), ("id", "text")):
            if row["id"] in drawn:
                yield row["text"][:MOST_CHARS]
