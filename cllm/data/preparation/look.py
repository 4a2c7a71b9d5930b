"""Looking into prepared data: documents by number or by words, figures, and what two folders differ in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm.data.preparation.ledger import FOLDER
from cllm.data.preparation.manifest import Prepared
from cllm.data.preparation.rows import Row, read_rows
from cllm.data.preparation.tally import reason_class
from cllm.runtime.errors import DataError, UserError

_NUMBER = re.compile(r"[0-9a-f]{16}")


def find_document(prepared: Prepared, wanted: str) -> Row:
    """The document of an id, or the first one whose path, with or without its source before it, or address ends like `wanted`. DataError where there
    is none."""
    by_id = _NUMBER.fullmatch(wanted) is not None
    for place in prepared.paths():
        for row in read_rows(place, ("id", "source", "path", "url")):
            if row["id"] == wanted if by_id else f"{row['source']}/{row['path']}".endswith(wanted) or row["url"] == wanted:
                return next(each for each in read_rows(place) if each["id"] == row["id"])
    what = "no document has the id" if by_id else "no document's path or address ends with"
    raise DataError(f"{what} {wanted!r} in {prepared.folder}. `cllm data search` finds documents by words.")


def search(prepared: Prepared, words: str, *, regex: bool = False, dropped: bool | None = None) -> Iterator[tuple[Row, int]]:
    """Documents that have each of these words somewhere in their text, title, path, address or reason, and a place in the text: of all of them in a
    row, else of the first that is in it; -1 where none is. Words between double quotes stay in a row. Small letters find capitals.

    regex: `words` is one regular expression. dropped: only those, or only the kept ones. Raises UserError for a wrong regular expression.
    """
    try:
        patterns = [re.compile(each, 0 if any(letter.isupper() for letter in each) else re.IGNORECASE) for each in _wanted(words, regex=regex)]
    except re.error as error:
        raise UserError(f"{words!r} is no regular expression: {error}. Leave --regex out to search for the text itself.") from None
    if not patterns:
        raise UserError("There is no word to look for. Give one or more.")
    *each_word, in_a_row = patterns
    for place in prepared.paths(kept=None if dropped is None else not dropped):
        for row in read_rows(place):
            fields = [row[name] for name in ("text", "title", "path", "url", "dropped_because")]
            if all(any(pattern.search(field) for field in fields) for pattern in each_word or patterns):
                found = in_a_row.search(row["text"]) or next(filter(None, (pattern.search(row["text"]) for pattern in each_word)), None)
                yield row, found.start() if found else -1


def _wanted(words: str, *, regex: bool) -> list[str]:
    """Regular expressions of what is looked for: of each word, and, where there are several, of all of them in a row as the last."""
    if regex:
        return [words]
    pieces = [r"\s+".join(map(re.escape, (quoted or word).split())) for quoted, word in re.findall(r'"([^"]+)"|(\S+)', words)]
    return [*pieces, r"\s+".join(pieces)] if len(pieces) > 1 else pieces


def figures(prepared: Prepared) -> dict[str, Any]:
    """What the folder holds, counted when it was made."""
    summary, found = prepared.summary, prepared.summary["tally"]
    reasons: dict[str, int] = {}
    for counts in found["sources"].values():
        for reason, count in counts["dropped"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "documents": summary["documents"],
        "kept": summary["kept"],
        "characters": summary["kept_chars"],
        "shards": summary["shards"],
        "digest": prepared.digest,
        "sources": {
            name: {key: counts[key] for key in ("documents", "kept", "kept_chars")} | {"dropped": sum(counts["dropped"].values())}
            for name, counts in found["sources"].items()
        },
        "dropped_because": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        "languages": dict(sorted(found["languages"].items(), key=lambda item: (-item[1], item[0]))),
    }


PERSONAL = ("emails", "phones", "ip_addresses", "secrets", "private_keys")
"""What the rules about personal data and secrets count."""


def changes(folder: Path) -> dict[str, int]:
    """How often each rule of cleaning changed something in the documents, the most frequent first, as the tasks of the ledger counted it; empty where
    the ledger is gone. What is damaged counts for nothing."""
    found: dict[str, int] = {}
    for place in sorted((folder / FOLDER / "clean").glob("*.json")):
        try:
            counts = json.loads(place.read_text("utf-8"))["result"]["counts"]
            for name, count in counts.items():
                found[name] = found.get(name, 0) + int(count)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def difference(old: Prepared, new: Prepared) -> dict[str, list[list[str]]]:
    """What two folders differ in, by the places of their documents: "added", "removed", "changed" (other text), "decided otherwise".

    Each entry is [place, old reason, new reason]; an empty reason is a document that is kept.
    """
    before, after = _places(old), _places(new)
    found: dict[str, list[list[str]]] = {"added": [], "removed": [], "changed": [], "decided otherwise": []}
    for place in sorted(before.keys() | after.keys()):
        if place not in before:
            found["added"].append([place, "", after[place][1]])
        elif place not in after:
            found["removed"].append([place, before[place][1], ""])
        elif before[place][0] != after[place][0]:
            found["changed"].append([place, before[place][1], after[place][1]])
        elif reason_class(before[place][1]) != reason_class(after[place][1]):
            found["decided otherwise"].append([place, before[place][1], after[place][1]])
    return found


def _places(prepared: Prepared) -> dict[str, tuple[int, str]]:
    """Source and place of each document -> (digest of its text, why it was dropped). The first of several with one place stands for them."""
    import xxhash

    found: dict[str, tuple[int, str]] = {}
    for path in prepared.paths():
        for row in read_rows(path, ("text", "source", "path", "url", "dropped_because")):
            place = row["url"] or f"{row['source']}/{row['path']}"
            found.setdefault(place, (xxhash.xxh3_64_intdigest(row["text"].encode("utf-8", "replace")), row["dropped_because"]))
    return found
