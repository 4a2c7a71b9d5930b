"""Stage 2: what is done to each text on its own.

Boilerplate lines go, the text is normalised, its language is told, rules judge it, and it is signed for the search for duplicates. A document that is
dropped keeps its row and its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cllm.data.clean import decontaminate
from cllm.data.clean.exact import digest
from cllm.data.clean.filters import judge
from cllm.data.clean.languages import language_of
from cllm.data.clean.lines import drop_policy_lines
from cllm.data.clean.near import BANDS, signature
from cllm.data.clean.normalise import normalise
from cllm.data.clean.personal import protect
from cllm.data.clean.quality import Quality, half_of
from cllm.data.clean.rules import Rules
from cllm.data.clean.words import LETTERS, Words, split
from cllm.data.preparation.boilerplate import Boilerplate, site_of
from cllm.data.preparation.duplicates import BAND_ROW, EXACT_ROW, OWN, key_of, save
from cllm.data.preparation.examples import grams_at, score_at
from cllm.data.preparation.recipe import rules_of
from cllm.data.preparation.rows import Row, as_json, file_facts, read_rows, writing
from cllm.data.preparation.versions import reasons
from cllm.data.preparation.within import tell


def clean(
    place: str,
    inputs: list[str],
    piece: int,
    begin: int,
    first: int,
    last: int,
    changes: Mapping[str, Any],
    filter: bool,
    sign: bool,
    replaced: str,
    lines: list[str],
    evaluation: list[str],
    score: list[str],
) -> dict[str, Any]:
    """Cleans rows `first` to `last` of a piece, out of an extracted file that begins with row `begin` of it. Writes PLACE.parquet; PLACE.lengths, the
    bytes of each text as int32, -1 - bytes where it is dropped; PLACE.exact and PLACE.bands, what the search for duplicates sorts
    (see duplicates.py).

    replaced: the file of older versions of pages. lines: the counted lines of web pages. evaluation, score: place and digest of what `examples` has
    made, or nothing.
    """
    how = _How(rules_of(changes, filter), Boilerplate(lines), grams_at(*evaluation) if evaluation else None, score_at(*score) if score else ())
    signatures = _Signatures()
    lengths: list[int] = []
    counts: dict[str, int] = {}
    chars = 0
    target = Path(place + ".parquet")
    older = reasons(replaced, piece)
    with writing(target) as out:
        for number, row in enumerate(read_rows(Path(inputs[0]), first=first - begin, last=last - begin), first):
            row["id"] = f"{piece:08x}{number:08x}"  # a part of a large file is extracted without knowing how many rows the others have
            row["dropped_because"] = row["dropped_because"] or older.get(number, "")
            if not row["dropped_because"]:
                words = _cleaned(row, how, counts)
                if sign and words is not None and not row["dropped_because"]:
                    signatures.add(int(OWN) | key_of(row["id"]), row["text"], words)
            size = len(row["text"]) if row["text"].isascii() else len(row["text"].encode("utf-8", "replace"))
            lengths.append(-1 - size if row["dropped_because"] else size)
            out.add(row)
            chars += len(row["text"])
            tell(chars)
    files = {".parquet": file_facts(target), ".lengths": save(Path(place + ".lengths"), np.array(lengths, np.int32)), **signatures.save(place)}
    return {"files": files, "rows": len(lengths), "signed": signatures.count, "counts": dict(sorted(counts.items()))}


class _How(NamedTuple):
    """What documents are cleaned and judged by."""

    rules: Rules
    boilerplate: Boilerplate
    evaluation: decontaminate.Grams | None
    quality: tuple[Quality, ...]
    """For each half of the documents; none where nothing is scored."""


def _cleaned(row: Row, how: _How, counts: dict[str, int]) -> Words | None:
    """Cleans and judges a document in place, and adds to `counts` how often each rule of cleaning changed something.

    Gives the words of the text, which are cut once for all that needs them; None where no text is left.
    """

    def count(name: str, times: int) -> None:
        if times:
            counts[name] = counts.get(name, 0) + times

    text, rules, is_code, site = row["text"], how.rules, bool(row["code"]), site_of(row)
    if site:
        text, lines = how.boilerplate.without(text, site, rules)
        count("boilerplate_lines", lines)
        if rules.c4_policy_lines:
            text, lines = drop_policy_lines(text)
            count("c4_policy_lines", lines)
    text, changed = normalise(text, is_code, rules)
    text, found, secret = protect(text, rules)
    for name, times in (changed | found).items():
        count(name, times)
    row["text"] = text
    if not text.strip():
        row["dropped_because"] = "empty (nothing is left of its text)"
        return None
    words = split(text)
    scores: dict[str, Any] = {}
    if not is_code:
        row["language"], scores["language"] = language_of(text, int(words.counts[LETTERS]) + words.ideographs)
    reason, measured = judge(text, row["language"], is_code, rules, words)
    scores |= measured
    if how.quality:
        scores["quality"] = how.quality[half_of(row["id"])].score(words)
    row["scores"] = as_json(scores)
    row["dropped_because"] = (
        secret
        or ("" if is_code else _other_language(row["language"], scores["language"], rules))
        or reason
        or ("" if how.evaluation is None else decontaminate.judge(text, words, how.evaluation, rules))
        or _unlike(scores.get("quality"), rules)
    )
    return words


def _other_language(language: str, probability: float, rules: Rules) -> str:
    """Why a document is dropped where languages were chosen."""
    if not rules.languages or (language in rules.languages and probability >= (rules.min_language_probability or 0.0)):
        return ""
    return f"languages: it is in {language} with a probability of {probability:.2f}, and wanted is {', '.join(rules.languages)}"


def _unlike(score: float | None, rules: Rules) -> str:
    if score is None or rules.min_quality is None or score >= rules.min_quality:
        return ""
    return f"min_quality: {score:.2f}, less than {rules.min_quality:.2f}"


def sign(place: str, inputs: list[str], number: int) -> dict[str, Any]:
    """Writes PLACE.exact and PLACE.bands of a finished shard of an earlier data set, which has this number."""
    signatures = _Signatures()
    for place_in_it, row in enumerate(read_rows(Path(inputs[0]), ("text",))):
        signatures.add(number << 32 | place_in_it, row["text"], split(row["text"]))
    return {"files": signatures.save(place), "signed": signatures.count}


class _Signatures:
    """The rows by which documents find their duplicates."""

    def __init__(self) -> None:
        self._digests: list[tuple[int, int, int]] = []
        self._bands: list[np.ndarray] = []

    @property
    def count(self) -> int:
        return len(self._digests)

    def add(self, key: int, text: str, words: Words) -> None:
        equal = digest(text)
        self._digests.append((int.from_bytes(equal[:8], "big"), int.from_bytes(equal[8:], "big"), key))
        self._bands.append(signature(words))

    def save(self, place: str) -> dict[str, Any]:
        exact = np.array(self._digests, EXACT_ROW)
        near = np.zeros(self.count * BANDS, BAND_ROW)
        if self.count:
            near["hash"] = np.concatenate(self._bands)
            near["key"] = np.repeat(exact["key"], BANDS)
        return {
            ".exact": save(Path(place + ".exact"), exact[np.lexsort((exact["key"], exact["high"]))]),
            ".bands": save(Path(place + ".bands"), near[np.lexsort((near["key"], near["hash"]))]),
        }
