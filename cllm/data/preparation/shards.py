"""Stage 4: which documents go into which file of the result, and writing it.

    OUT/kept/000000.parquet       what is trained on, in the order of keys
    OUT/dropped/000000.parquet    all other documents, with the reason, so that nothing is lost and each choice can be looked at

A shard is some ranges of rows of cleaned pieces, together of about the size that the recipe says. Where it begins follows from the lengths of the
texts alone, and none holds documents of two generations, so documents that come later never move those before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cllm.data.preparation.duplicates import EXACT, OWN, PAIR
from cllm.data.preparation.rows import Row, RowWriter, file_facts, read_rows
from cllm.data.preparation.tally import Tally
from cllm.files import DATA, new_file
from cllm.runtime.mapped_file import mapped

KEPT, DROPPED = "kept", "dropped"
_BITS = 53  # of what is drawn


@dataclass(frozen=True)
class Segment:
    """Rows `first` to `last` of a piece, all in one cleaned part of it."""

    part: int
    """Which of all parts."""
    first: int
    last: int


def keys_of(piece: int, first: int, last: int) -> np.ndarray:
    """The keys of some rows of a piece."""
    return OWN | np.uint64(piece << 32) | np.arange(first, last, dtype=np.uint64)


def pairs_in(pairs: np.ndarray, piece: int, first: int, last: int) -> np.ndarray:
    """Those of the pairs, which are sorted by key, whose duplicate lies in these rows."""
    bounds = np.array([piece << 32 | first, piece << 32 | last], np.uint64) | OWN
    begin, end = np.searchsorted(pairs["key"], bounds)
    return pairs[begin:end]


def take_of(keys: np.ndarray, epochs: float) -> np.ndarray:
    """How often each document is taken: the whole part of `epochs`, and once more for a share of the documents that their keys draw."""
    whole = int(epochs)
    return whole + (_drawn(keys) < np.uint64(round((epochs - whole) * 2**_BITS))).astype(np.int64)


def _drawn(keys: np.ndarray) -> np.ndarray:
    """A number below 2^53 for each key (splitmix64)."""
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(64 - _BITS)


def epochs_within(cap: int, parts: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]) -> float:
    """How often the documents of a source can be taken when `take_of` may take so many bytes at most.

    parts: gives (keys, bytes) of some documents each, twice the same. Beside them 8 MB are held, and the keys of a millionth of the documents.
    """
    shift = np.uint64(_BITS - 20)
    by_draw = np.zeros(1 << 20, np.int64)
    for keys, sizes in parts():
        np.add.at(by_draw, (_drawn(keys) >> shift).astype(np.int64), sizes)
    total = int(by_draw.sum())
    if not total:
        return 1.0
    whole, room = divmod(cap, total)
    sums = np.cumsum(by_draw)
    full = int(np.searchsorted(sums, room, side="right"))  # the first draws of which not all fit
    found: list[tuple[int, int]] = []
    for keys, sizes in parts():
        drawn = _drawn(keys)
        here = drawn >> shift == full
        found += zip(drawn[here].tolist(), sizes[here].tolist())
    room -= int(sums[full - 1]) if full else 0
    for draw, size in sorted(found):
        room -= size
        if room < 0:
            return whole + (draw & ~1023) / 2**_BITS  # as many bits as a number of up to 1000 has behind the point
    raise AssertionError("more fits than there is")


def plan(part: int, first: int, sizes: np.ndarray, times: np.ndarray, size: int) -> tuple[list[tuple[Segment, int]], list[tuple[Segment, int]]]:
    """The segments of a part, for the kept and for the dropped shards, each with the bytes that it adds there.

    first: its first row. sizes: of each document, in bytes. times: how often each is taken; 0 where it is dropped. size: of a segment, about.
    """

    def cut(amounts: np.ndarray, wanted: np.ndarray) -> list[tuple[Segment, int]]:
        sums = np.cumsum(amounts)
        if not len(sums):
            return []
        steps = np.flatnonzero(np.diff(sums // size)) + 1
        ends = [*steps.tolist(), len(sums)]
        bounds = zip([0, *ends], ends)
        return [(Segment(part, first + a, first + b), int(sums[b - 1] - (sums[a - 1] if a else 0))) for a, b in bounds if wanted[a:b].any()]

    return cut(sizes * times, times > 0), cut(sizes * (times == 0), times == 0)


def groups(segments: Sequence[tuple[Segment, int]], shard_bytes: int) -> Iterator[list[Segment]]:
    """Segments together until they have the text of a shard."""
    group: list[Segment] = []
    room = 0
    for segment, size in segments:
        group.append(segment)
        room += size
        if room >= shard_bytes:
            yield group
            group, room = [], 0
    if group:
        yield group


def write(
    place: str, out: str, segments: list[list[Any]], pairs: str, epochs: dict[str, float], reasons: dict[str, str], earlier: list[str], kept: bool
) -> dict[str, Any]:
    """Writes one shard, the file `out`.

    segments: [file of the cleaned part, its piece, its first row in that, first row, last row]. pairs: all duplicates. epochs: name of a source ->
    how often its documents are taken. reasons: name of a source -> why those of it that are not drawn are dropped. earlier: the shards of earlier
    data sets.
    """
    duplicates = mapped(pairs, PAIR)
    tally = Tally()
    with new_file(out, DATA) as beside:
        rows = RowWriter(beside)
        for file, piece, begin, first, last in segments:
            own = pairs_in(duplicates, piece, first, last)
            because = {int(pair["key"] & np.uint64(0xFFFFFFFF)): _repeats(pair, earlier) for pair in own}
            times: dict[str, list[int]] = {}
            for number, row in enumerate(read_rows(Path(file), first=first - begin, last=last - begin), first):
                source = row["source"]
                if source not in times:
                    times[source] = take_of(keys_of(piece, first, last), epochs.get(source, 1.0)).tolist()
                row["dropped_because"] = (
                    row["dropped_because"] or because.get(number, "") or ("" if times[source][number - first] else reasons[source])
                )
                if bool(row["dropped_because"]) == kept:
                    continue
                tally.add(row, times[source][number - first] if kept else 1)
                for _ in range(times[source][number - first] if kept else 1):
                    rows.add(row)
        content = rows.close()
    size, digest = file_facts(Path(out))
    return {"files": {}, "out": [size, digest], "rows": rows.num_rows, "content": content, "tally": tally.to_dict()}


def _repeats(pair: Any, earlier: list[str]) -> str:
    winner, similarity = int(pair["winner"]), int(pair["similarity"])
    own = winner & int(OWN)
    what = f"{winner & ~int(OWN):016x}" if own else f"row {winner & 0xFFFFFFFF} of {earlier[winner >> 32]}"
    return f"exact duplicate of {what}" if similarity == EXACT else f"near duplicate of {what} (Jaccard similarity {similarity / 1000:.2f})"


def described(row: Row) -> str:
    """Where a document is from, in a few words."""
    return row["url"] or row["path"]
