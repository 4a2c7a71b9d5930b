"""What a crawl came to: pages, and what was left out and why."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cllm.data.sources.frontier import AGAIN, DONE, FAILED, LEASED, LEFT_OUT, NEW, PAGE, WAITING, Frontier, explained, open_frontier
from cllm.data.sources.settings import DATABASE, Settings, read_settings
from cllm.data.sources.writer import NOT_RENDERED, RENDERED

# Reasons that go on with what differs from URL to URL (an address, a name, a year), and how they are told together.
_TOGETHER = (
    (re.compile(r"(its answer is not HTTP|the connection broke|no connection|its certificate is not valid|refused|a calendar)\b"), ""),
    (re.compile(r"it redirects to (?!itself)"), "it redirects to where nothing may be fetched"),
)


@dataclass(frozen=True)
class Summary:
    """Numbers of URLs, unless another unit is in the name. The reasons are words that follow "because"."""

    pages: int
    duplicates: int
    bytes: int
    segments: int
    sites: int
    queued: int
    waiting: int
    failed: dict[str, int]
    left_out: dict[str, int]
    not_queued: dict[str, int]
    rendered: int
    not_rendered: dict[str, int]
    """Pages that are kept as they came, although their scripts were to be run."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(frontier: Frontier) -> Summary:
    """Reads the whole frontier once."""
    sql = frontier.sql
    (duplicates,) = sql.execute("SELECT COUNT(*) FROM urls WHERE stored > 0 AND reason = 'the same bytes as another page'").fetchone()
    (rendered,) = sql.execute("SELECT COUNT(*) FROM urls WHERE stored > 0 AND reason = ?", (RENDERED,)).fetchone()
    segments, num_bytes = sql.execute("SELECT SUM(bytes > 0), SUM(bytes) FROM segments").fetchone()
    return Summary(
        pages=frontier.pages,
        duplicates=duplicates,
        bytes=num_bytes,
        segments=segments,
        sites=len(frontier.sites),
        queued=frontier.counts[NEW] + frontier.counts[AGAIN] + frontier.counts[LEASED],
        waiting=frontier.counts[WAITING],
        failed=_reasons(frontier, f"SELECT reason, COUNT(*) FROM urls WHERE state = {FAILED} GROUP BY reason"),
        left_out=_reasons(
            frontier,
            f"SELECT reason, COUNT(*) FROM urls WHERE state = {LEFT_OUT} OR (state = {DONE} AND kind = {PAGE} AND stored = 0) GROUP BY reason",
        ),
        not_queued=_reasons(frontier, "SELECT reason, COUNT(*) FROM skipped GROUP BY reason"),
        rendered=rendered,
        not_rendered=_reasons(
            frontier,
            f"SELECT SUBSTR(reason, {len(NOT_RENDERED) + 1}), COUNT(*) FROM urls WHERE stored > 0 AND reason LIKE '{NOT_RENDERED}%' GROUP BY reason",
        ),
    )


def _reasons(frontier: Frontier, query: str) -> dict[str, int]:
    """Counts by reason, the most frequent first; what differs only in its details is one reason."""
    counts: Counter[str] = Counter()
    for reason, count in frontier.sql.execute(query):
        found = next((words or match[1] for each, words in _TOGETHER if (match := each.match(reason))), reason)
        counts[found] += count
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def read_summary(folder: Path) -> tuple[Settings, Summary, float | None]:
    """The settings and summary of a crawl folder, also while it is written, and when a page is due again (seconds since 1970).

    Raises DataError where it is none.
    """
    from cllm.runtime.errors import DataError

    settings = read_settings(folder)
    if settings is None or not (folder / DATABASE).exists():
        raise DataError(f"{folder} holds no crawl. Begin one with: cllm crawl URL --out {folder}")
    with explained(folder / DATABASE):
        frontier = open_frontier(folder / DATABASE, read_only=True)
        try:
            return settings, summarise(frontier), frontier.next_due(settings.revisit)
        finally:
            frontier.close()
