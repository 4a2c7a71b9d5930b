"""Duplicates: which documents say what an earlier one has said.

    exact   rows (digest, key) of all pieces, sorted: all but the first of equal digests are copies
    near    rows (hash of a band, key), sorted: documents that share a band become edges to the first of them
    forest  edges of all partitions merged into components, in one canonical form: (root, key), the root being the smallest key
    verify  in each component, in the order of keys: a document whose similarity to one that was kept reaches the threshold is a near duplicate of it

That two documents share a band, or a component, makes them candidates and nothing more: only the exact Jaccard similarity of their sets of word
5-grams drops one. Winners are always the smallest keys, merges give one sorted form, and everything is whole numbers, so neither the order in which
tasks end nor their number can show in the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cllm.data.clean.components import edges
from cllm.data.clean.components import forest as forest_of
from cllm.data.clean.near import shingles, signature
from cllm.data.clean.near import verify as near_duplicates
from cllm.data.clean.words import split
from cllm.data.preparation.rows import file_facts, texts_at
from cllm.files import DATA, new_file
from cllm.runtime.mapped_file import mapped

EXACT_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("key", "<u8")])
BAND_ROW = np.dtype([("hash", "<u8"), ("key", "<u8")])
PAIR = np.dtype([("key", "<u8"), ("winner", "<u8"), ("similarity", "<u2")])
"""A duplicate, what it repeats, and their similarity in thousandths; EXACT for equal texts."""
EXACT = 65535
OWN = np.uint64(1 << 63)
"""Set in the keys of documents of this folder: those of earlier data sets are smaller, so they win."""


def key_of(number: str) -> int:
    """The key of a document by its id."""
    return int(number, 16)


def save(place: Path, array: np.ndarray) -> list[Any]:
    # Not by `tofile`, which does not say why a disk takes no more.
    with new_file(place, DATA, array.nbytes) as beside, open(beside, "wb") as file:
        file.write(np.ascontiguousarray(array).data)
    return file_facts(place)


def slice_of(place: str, kind: np.dtype, column: str, part: int, parts: int) -> np.ndarray:
    """The rows of a file sorted by `column` whose values lie in part number `part` of `parts` equal ranges of 64 bits."""
    rows = mapped(place, kind)
    bounds = [min((number << 64) // parts, 2**64 - 1) for number in (part, part + 1)]
    first, last = np.searchsorted(rows[column], np.array(bounds, np.uint64))
    return np.array(rows[first:] if part + 1 == parts else rows[first:last])


def exact(place: str, part: int, parts: int, inputs: list[str]) -> dict[str, Any]:
    """Writes PLACE.pairs: the copies among the rows of this part, by key."""
    rows = np.concatenate([slice_of(each, EXACT_ROW, "high", part, parts) for each in inputs])
    rows = rows[np.lexsort((rows["key"], rows["low"], rows["high"]))]
    first, copies = _stars(rows["key"], (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1]))
    found = np.zeros(len(copies), PAIR)
    found["key"], found["winner"], found["similarity"] = copies, first, EXACT
    return {"files": {".pairs": save(Path(place + ".pairs"), found[np.argsort(found["key"])])}, "pairs": len(found)}


def near(place: str, part: int, parts: int, inputs: list[str]) -> dict[str, Any]:
    """Writes PLACE.forest: the components of the documents that share a band whose hash lies in this part."""
    rows = np.concatenate([slice_of(each, BAND_ROW, "hash", part, parts) for each in inputs])
    pairs = edges(np.ascontiguousarray(rows["hash"]), np.ascontiguousarray(rows["key"]))
    return {"files": {".forest": save(Path(place + ".forest"), forest_of(pairs))}, "edges": len(pairs)}


def _stars(keys: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first of its group, key) of each row that equals the row before it, as `same` says of all rows but the first."""
    starts = np.concatenate([[0], np.where(same, 0, np.arange(1, len(same) + 1))])
    others = np.flatnonzero(same) + 1
    return keys[np.maximum.accumulate(starts)[others]], keys[others]


def merge_forests(place: str, inputs: list[str]) -> dict[str, Any]:
    """Writes PLACE.forest: one forest of the edges of several."""
    edges = np.concatenate([mapped(each, np.dtype("<u8")).reshape(-1, 2) for each in inputs])
    return {"files": {".forest": save(Path(place + ".forest"), forest_of(edges))}, "edges": len(edges)}


def ranges(forest: np.ndarray, size: int) -> list[tuple[int, int]]:
    """The rows of a forest, sorted by root, cut between components: about `size` rows each."""
    cuts = np.concatenate([[0], np.flatnonzero(forest[1:, 0] != forest[:-1, 0]) + 1, [len(forest)]]) if len(forest) else np.zeros(1, np.int64)
    found, begin = [], 0
    for end in cuts[1:].tolist():
        if end - begin >= size or end == len(forest):
            found.append((begin, end))
            begin = end
    return found


def verify(place: str, forest: str, first: int, last: int, copies: list[str], texts: str, threshold: float) -> dict[str, Any]:
    """Writes PLACE.pairs: the near duplicates in rows `first` to `last` of a forest, which are whole components.

    copies: files of exact duplicates, which are no candidates any more. texts: a file that says where the documents of each piece are: its parts with
    their first rows. threshold: the
    similarity from which on a document repeats another. Of each document the hashes of its words are held, 8 bytes a word.
    """
    members = np.array(mapped(forest, np.dtype("<u8")).reshape(-1, 2)[first:last])
    gone = np.concatenate([np.empty(0, np.uint64), *(mapped(each, PAIR)["key"] for each in copies)])
    keys = np.unique(members)
    keys = keys[~np.isin(keys, gone)]
    hashes: dict[int, np.ndarray] = {}
    bands: dict[int, np.ndarray] = {}
    for key, text in _texts_of(keys, json.loads(Path(texts).read_text("utf-8"))):
        words = split(text)
        hashes[key], bands[key] = shingles(words), signature(words)
    found: list[tuple[int, int, int]] = []
    for begin, end in ranges(members, 1):
        group = np.unique(members[begin:end])
        group = group[np.isin(group, keys)]
        if len(group) > 1:
            dropped = near_duplicates(group, np.stack([bands[key] for key in group.tolist()]), hashes.__getitem__, threshold, int(OWN))
            found += [(key, winner, round(1000 * similarity)) for key, (winner, similarity) in dropped.items()]
    pairs = np.array(found, PAIR)
    return {"files": {".pairs": save(Path(place + ".pairs"), pairs[np.argsort(pairs["key"])])}, "pairs": len(pairs)}


def _texts_of(keys: np.ndarray, texts: dict[str, list[tuple[int, str]]]) -> Iterator[tuple[int, str]]:
    """(key, text) in the order of keys, which is that of pieces; of each file only the row groups that hold some of them are read."""
    pieces = keys >> np.uint64(32)
    for piece in np.unique(pieces).tolist():
        rows = (keys[pieces == piece] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        parts = texts[str(piece)]
        for (first, place), last in zip(parts, [*(begin for begin, _ in parts[1:]), 1 << 32]):
            own = rows[(rows >= first) & (rows < last)]
            for row, text in texts_at(Path(place), own - first):
                yield piece << 32 | first + row, text


def merged(inputs: Sequence[str]) -> np.ndarray:
    """All pairs of these files, by key. A key stands in one of them at most."""
    pairs = np.concatenate([np.empty(0, PAIR), *(mapped(each, PAIR) for each in inputs)])
    return pairs[np.argsort(pairs["key"])]
