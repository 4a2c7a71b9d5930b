"""Versions of a page: of those that a crawl has stored under one address, only the newest stays.

    Fetched    a piece, while it is extracted: what was fetched from which address, and when; PLACE.fetched, sorted by address
    outdated   a range of addresses of all pieces: the documents that a later fetch has replaced, and which pages repeat another one now
    replaced   all ranges together: the documents that are dropped before anything is counted, judged or compared

A fetch that brought the bytes of another page stores no text (a record of the kind "revisit"). It replaces what its own address had before, and as
long as it is the newest fetch there, the version of the other page that it points to stays. A fetch that found nothing changed is none.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cllm.data.preparation.duplicates import save, slice_of
from cllm.runtime.mapped_file import mapped

FETCH = np.dtype([("high", "<u8"), ("low", "<u8"), ("time", "<i8"), ("member", "<u8"), ("key", "<u8"), ("same_high", "<u8"), ("same_low", "<u8")])
"""128 bits of the address; microseconds since 1970; the key of the first document that the fetch gave, and of this one. `same_high`, `same_low`: the
address whose bytes it repeats, 0 where it has a text of its own."""
_OUTDATED = np.dtype([("high", "<u8"), ("low", "<u8"), ("time", "<i8"), ("until", "<i8"), ("newest", "<i8"), ("key", "<u8"), ("winner", "<u8")])
_COPY = np.dtype([("high", "<u8"), ("low", "<u8"), ("time", "<i8")])
REPLACED = np.dtype([("key", "<u8"), ("winner", "<u8"), ("newest", "<i8")])
"""A document, the first one of the newest version of its page (NO_TEXT where that repeats another page), and when that was fetched."""
NO_TEXT = 2**64 - 1


class Fetched:
    """What a piece holds of pages that were fetched."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, url: str, date: str, member: int, key: int, same_as: str = "") -> None:
        """date: as in a WARC file; a fetch without a time that can be read takes part in nothing."""
        time = _microseconds(date)
        if url and time is not None:
            self._rows.append((*_address(url), time, member, key, *(_address(same_as) if same_as else (0, 0))))

    def save(self, place: Path) -> list[Any]:
        return save(place, np.sort(np.array(self._rows, FETCH), order=["high", "low", "time", "member", "key"]))


def _address(url: str) -> tuple[int, int]:
    digest = hashlib.blake2b(url.encode("utf-8", "replace"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _microseconds(date: str) -> int | None:
    try:
        found = datetime.fromisoformat(date)
    except ValueError:
        return None
    since = (found if found.tzinfo else found.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def outdated(place: str, part: int, parts: int, inputs: list[str]) -> dict[str, Any]:
    """Writes PLACE.outdated, the documents of this part of the addresses that a later fetch has replaced, and PLACE.copies, what addresses point to
    whose newest fetch repeats another page."""
    rows = np.concatenate([slice_of(each, FETCH, "high", part, parts) for each in inputs])
    rows = rows[np.lexsort((rows["key"], rows["member"], rows["time"], rows["low"], rows["high"]))]
    pages = _first_of_next(rows[["high", "low"]])
    fetches = _first_of_next(rows[["high", "low", "time", "member"]])
    is_copy = (rows["same_high"] != 0) | (rows["same_low"] != 0)
    last = rows[pages - 1] if len(rows) else rows
    is_old = (fetches < pages) & ~is_copy
    found = np.zeros(int(is_old.sum()), _OUTDATED)
    for name in ("high", "low", "time", "key"):
        found[name] = rows[name][is_old]
    found["until"] = rows["time"][fetches[is_old]]
    found["newest"], found["winner"] = last["time"][is_old], np.where(is_copy[pages - 1], NO_TEXT, last["member"])[is_old]
    live = rows[is_copy & (fetches == pages)]
    copies = np.zeros(len(live), _COPY)
    copies["high"], copies["low"], copies["time"] = live["same_high"], live["same_low"], live["time"]
    return {"files": {".outdated": save(Path(place + ".outdated"), found), ".copies": save(Path(place + ".copies"), copies)}}


def _first_of_next(rows: np.ndarray) -> np.ndarray:
    """Of each row of an array in which equal ones stand together, the place behind its last equal."""
    ends = np.append(np.flatnonzero(rows[1:] != rows[:-1]) + 1, len(rows)) if len(rows) else np.empty(0, np.int64)
    return np.repeat(ends, np.diff(ends, prepend=0))


def replaced(outdated: Sequence[str], copies: Sequence[str]) -> np.ndarray:
    """(R,) REPLACED, by key: all outdated documents but those that a page repeats now, which stay as the text of that one."""
    rows = np.concatenate([np.empty(0, _OUTDATED), *(mapped(each, _OUTDATED) for each in outdated)])
    times = defaultdict(list)
    for high, low, time in np.concatenate([np.empty(0, _COPY), *(mapped(each, _COPY) for each in copies)]).tolist():
        times[high, low].append(time)
    gone = np.ones(len(rows), dtype=bool)
    for place in np.flatnonzero(np.isin(rows["high"], np.array([high for high, _ in times], np.uint64))):
        high, low, first, until = rows[["high", "low", "time", "until"]][place].item()
        gone[place] = not any(first <= time < until for time in times.get((high, low), ()))
    found = np.zeros(int(gone.sum()), REPLACED)
    for name in REPLACED.names or ():
        found[name] = rows[name][gone]
    return found[np.argsort(found["key"])]


def of_piece(rows: np.ndarray, piece: int) -> np.ndarray:
    """Those of the replaced documents that are in a piece."""
    first, last = np.searchsorted(rows["key"], np.array([piece << 32, (piece + 1) << 32], np.uint64))
    return rows[first:last]


def reasons(place: str, piece: int) -> dict[int, str]:
    """Number of a document in its piece -> why it is dropped. place: the file of all replaced documents; empty where there is none."""
    return {key & 0xFFFFFFFF: _reason(winner, newest) for key, winner, newest in of_piece(mapped(place, REPLACED), piece).tolist()} if place else {}


def _reason(winner: int, newest: int) -> str:
    when = datetime.fromtimestamp(newest // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    what = "it has the bytes of another page" if winner == NO_TEXT else f"it is {winner:016x}"
    return f"older version of a page: the newest was fetched at {when}, and {what}"
