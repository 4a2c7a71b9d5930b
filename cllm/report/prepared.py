"""The page about prepared data: what came, what went and why, with samples to judge the choices by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm.data.preparation.manifest import Prepared
from cllm.files import DATA, write_file
from cllm.report.charts import bars
from cllm.report.markup import Html, element, table
from cllm.report.page import section, whole_page
from cllm.runtime.quantities import counted, size

PAGE = "report.html"
MOST_LANGUAGES, MOST_REASONS, MOST_NAMES = 20, 40, 200


def write_prepared_report(prepared: Prepared) -> Path:
    """Writes FOLDER/report.html, which says the same for the same data. Raises DataError where the disk does not take it."""
    place = prepared.folder / PAGE
    write_file(place, prepared_page(prepared.summary).encode("utf-8"), DATA)
    return place


def prepared_page(summary: Mapping[str, Any]) -> str:
    """summary: as in prepared.json."""
    found = summary["tally"]
    parts = [
        _tiles(summary),
        _sources(found, summary["taken"]),
        _reasons(found),
        _unreadable(found, summary["not_looked_at"]),
        _beside(summary["evaluation"], "Text for evaluation", "What has a part of them was dropped (max_evaluation_overlap)."),
        _beside(summary["examples"], "Examples of good text", "Documents that are too unlike them were dropped (min_quality)."),
        _histograms(found),
        _samples(found),
    ]
    return whole_page("Prepared data", parts, dated=False)


def _tiles(summary: Mapping[str, Any]) -> Html:
    facts = [
        ("files", f"{summary['files']:,}"),
        ("documents", f"{summary['documents']:,}"),
        ("kept", f"{summary['kept']:,}"),
        ("characters kept", f"{summary['kept_chars']:,}"),
        ("shards to train on", f"{summary['shards']:,}"),
    ]
    if summary["written_chars"] != summary["kept_chars"]:
        facts.append(("characters with repeats", f"{summary['written_chars']:,}"))
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts), class_="tiles")


def _sources(found: Mapping[str, Any], taken: Mapping[str, float]) -> Html:
    """What each source gave, with its duplicates; where sources are mixed, also how often each document is taken."""
    is_mixed = any(times != 1 for times in taken.values())
    rows = []
    for name, counts in found["sources"].items():
        dropped = counts["dropped"]
        exact, near = dropped.get("exact duplicate", 0), dropped.get("near duplicate", 0)
        other = counts["documents"] - counts["kept"] - exact - near
        share = f"{100 * counts['kept'] / max(counts['documents'], 1):.0f} %"
        mix = [f"{taken[name]:.4g} times", size(counts["written_chars"])] if is_mixed else []
        figures = (f"{each:,}" for each in (counts["documents"], exact, near, other, counts["kept"]))
        rows.append([name, *figures, share, size(counts["kept_chars"]), *mix])
    head = ["source", "documents", "exact duplicates", "near duplicates", "dropped otherwise", "kept", "share kept", "text kept"]
    head += ["taken", "text written"] if is_mixed else []
    return section("Sources", table(head, rows, numbers=range(1, len(head))))


def _reasons(found: Mapping[str, Any]) -> Html:
    """What was dropped and why, the most frequent reason first."""
    total: dict[str, int] = {}
    for counts in found["sources"].values():
        for reason, count in counts["dropped"].items():
            total[reason] = total.get(reason, 0) + count
    if not total:
        return section("What went and why", element("p", "Nothing was dropped."))
    rows = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    more = [element("p", f"And {counted(len(rows) - MOST_REASONS, 'other reason')}.")] if len(rows) > MOST_REASONS else []
    return section(
        "What went and why",
        element("p", "Each of these documents stands in the folder named dropped, with its text and its full reason in the column dropped_because."),
        table(["reason", "documents"], [[reason, f"{count:,}"] for reason, count in rows[:MOST_REASONS]], numbers=[1]),
        *more,
    )


def _unreadable(found: Mapping[str, Any], not_looked_at: Mapping[str, Any]) -> Html | None:
    """Files that gave no text, by name, and what was passed over by its name alone."""
    parts: list[Html] = []
    if found["unreadable"]:
        rows = [[f"{source}/{path}", reason] for source, path, reason in found["unreadable"][:MOST_NAMES]]
        parts.append(table(["file", "why"], rows))
        if found["without_text"] > len(rows):
            parts.append(element("p", f"{len(rows)} of {found['without_text']:,} are named. `cllm data search` finds the others by their reasons."))
    if not_looked_at:
        names = [f"{values['count']:,} {reason} ({', '.join(values['examples'])})" for reason, values in not_looked_at.items()]
        parts.append(element("p", "Not looked at: " + "; ".join(names) + "."))
    return section("Files without text", *parts) if parts else None


def _beside(read: Mapping[str, Any] | None, title: str, effect: str) -> Html | None:
    """Texts that were read beside the documents, and the files that gave none and so had no effect."""
    if read is None:
        return None
    parts = [element("p", f"{counted(read['texts'], 'text')} in {', '.join(read['places'])}. {effect}")]
    if read["unread"]:
        parts += [element("p", "These could not be read, and had no effect:"), table(["file", "why"], read["unread"])]
    if read["num_unread"] > len(read["unread"]):
        parts.append(element("p", f"And {counted(read['num_unread'] - len(read['unread']), 'other file')}."))
    return section(title, *parts)


def _histograms(found: Mapping[str, Any]) -> Html | None:
    if not found["lengths"]:
        return None
    languages = sorted(found["languages"].items(), key=lambda item: (-item[1], item[0]))
    shown = languages[:MOST_LANGUAGES]
    if len(languages) > MOST_LANGUAGES:
        shown.append(("others", sum(count for _, count in languages[MOST_LANGUAGES:])))
    lengths = {int(bin): count for bin, count in found["lengths"].items()}
    by_length = [(f"{1 << bin - 1 if bin else 0:,} to {(1 << bin) - 1:,}", lengths.get(bin, 0)) for bin in range(min(lengths), max(lengths) + 1)]
    return section(
        "What was kept",
        element(
            "div",
            element("figure", element("h3", "Languages"), bars("languages", "Documents by language", shown)),
            element("figure", element("h3", "Length in characters"), bars("lengths", "Documents by length", by_length)),
            class_="grid-of-two",
        ),
    )


def _samples(found: Mapping[str, Any]) -> Html:
    """Some documents of each kind, drawn by their ids."""
    parts = []
    for kind, samples in found["samples"].items():
        shown = [part for sample in samples for part in _sample(*sample[1:])]
        summary = element("summary", f"Dropped: {kind}" if kind else "Kept")
        parts.append(element("details", summary, *shown, **({} if kind else {"open": ""})))
    return section("Samples", *parts)


def _sample(number: str, source: str, place: str, reason: str, text: str) -> list[Html]:
    where = place if "://" in place else f"{source}/{place}"
    return [element("p", f"{number}, {where}", f": {reason}" if reason else "", class_="quiet"), element("pre", text)]
