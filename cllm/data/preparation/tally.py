"""What a report tells of documents, counted where they are written and added up: sums of whole numbers, and samples that are drawn by their ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from cllm.data.preparation.rows import Row

SAMPLES, EXCERPT = 3, 600
NAMED = 200
"""Unreadable files that are named."""
_CLASS = re.compile(r"[:(;]| of (?:[0-9a-f]{16}|row )|\b\d")


def reason_class(reason: str) -> str:
    """The kind of a reason, without its figures and names: "near duplicate" for "near duplicate of 0001 (...)"."""
    found = _CLASS.search(reason)
    return (reason[: found.start()] if found else reason).strip(" ,") or reason


class Tally:
    """Counts by source, language and length, and samples."""

    def __init__(self) -> None:
        self.sources: dict[str, dict[str, Any]] = {}
        self.languages: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self.samples: dict[str, list[list[str]]] = {}
        self.unreadable: list[list[str]] = []
        self.without_text = 0

    def add(self, row: Row, times: int = 1) -> None:
        """A document that was written `times` times."""
        reason, chars = row["dropped_because"], len(row["text"])
        source = self.sources.setdefault(row["source"], {"documents": 0, "kept": 0, "kept_chars": 0, "written_chars": 0, "dropped": {}})
        source["documents"] += 1
        kind = reason_class(reason) if reason else ""
        if reason:
            source["dropped"][kind] = source["dropped"].get(kind, 0) + 1
        else:
            source["kept"] += 1
            source["kept_chars"] += chars
            source["written_chars"] += chars * times
            language = row["code"] or row["language"] or "unknown"
            self.languages[language] = self.languages.get(language, 0) + 1
            bin = str(chars.bit_length())  # 2^(n-1) <= chars < 2^n
            self.lengths[bin] = self.lengths.get(bin, 0) + 1
        if reason and not chars:
            self.without_text += 1
            self.unreadable.append([row["source"], row["path"], reason])
            self.unreadable = sorted(self.unreadable)[:NAMED] if len(self.unreadable) > 2 * NAMED else self.unreadable
        else:
            drawn = hashlib.blake2b(row["id"].encode(), digest_size=8).hexdigest()
            self._sample(kind, [drawn, row["id"], row["source"], row["url"] or row["path"], reason, row["text"][:EXCERPT]])

    def _sample(self, kind: str, sample: list[str]) -> None:
        drawn = self.samples.setdefault(kind, [])
        if len(drawn) < SAMPLES or sample[0] < drawn[-1][0]:
            self.samples[kind] = sorted([*drawn, sample])[:SAMPLES]

    def to_dict(self) -> dict[str, Any]:
        return {
            "sources": {name: {**counts, "dropped": dict(sorted(counts["dropped"].items()))} for name, counts in sorted(self.sources.items())},
            "languages": dict(sorted(self.languages.items())),
            "lengths": dict(sorted(self.lengths.items(), key=lambda item: int(item[0]))),
            "samples": dict(sorted(self.samples.items())),
            "unreadable": sorted(self.unreadable)[:NAMED],
            "without_text": self.without_text,
        }


def total(tallies: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of what `Tally.to_dict` gave."""
    whole = Tally()
    for tally in tallies:
        for name, counts in tally["sources"].items():
            own = whole.sources.setdefault(name, {"documents": 0, "kept": 0, "kept_chars": 0, "written_chars": 0, "dropped": {}})
            for key in ("documents", "kept", "kept_chars", "written_chars"):
                own[key] += counts[key]
            for kind, count in counts["dropped"].items():
                own["dropped"][kind] = own["dropped"].get(kind, 0) + count
        for mine, theirs in ((whole.languages, tally["languages"]), (whole.lengths, tally["lengths"])):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        for kind, samples in tally["samples"].items():
            for sample in samples:
                whole._sample(kind, sample)
        whole.unreadable += tally["unreadable"]
        whole.without_text += tally["without_text"]
    return whole.to_dict()
