"""Crawls of the workspace: their figures, hosts, what robots.txt forbade, and the newest pages. Their databases are only read."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm.app.readers.inside import check_files, problem
from cllm.app.readers.inventory import CRAWL, Found, Inventory
from cllm.app.readers.pages import newest_pages
from cllm.data.sources.frontier import AGAIN, FAILED, LEFT_OUT, NEW, Frontier, explained, open_frontier
from cllm.data.sources.settings import DATABASE, LOCK, PAGES, SETTINGS, Settings, is_running, read_settings
from cllm.data.sources.summary import Summary, summarise
from cllm.runtime.errors import CLLMError, DataError

_FILES = (SETTINGS, DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", LOCK)
_SECONDS = 20.0  # in which a database has to answer
_PAUSE = 2.0  # seconds between two looks at one that changes all the time
_FORBIDDEN = "robots.txt forbids it"
_HOSTS, _URLS, _NEWEST = 500, 100, 20

Job = Mapping[str, Any]


class Crawls:
    """The crawls below `root`, which is resolved. For one thread at a time."""

    def __init__(self, root: Path, inventory: Inventory) -> None:
        self._root, self._inventory = root, inventory
        self._known: dict[str, tuple[Any, float, dict[str, Any]]] = {}

    def list(self, jobs: Mapping[str, Job]) -> list[dict[str, Any]]:
        """All crawls by path. jobs: the newest job of each, by its path."""
        found = self._inventory.look(CRAWL)
        self._known = {each.path: self._known[each.path] for each in found if each.path in self._known}
        return [self._entry(each, jobs.get(each.path)) for each in found]

    def entry(self, path: str, place: Path, job: Job | None) -> dict[str, Any]:
        """One crawl, as `list` shows it."""
        return self._entry(Found(path, CRAWL, place), job)

    def _entry(self, found: Found, job: Job | None) -> dict[str, Any]:
        known = self._known.get(found.path)
        mark = _mark(found.place)
        if known is None or (known[0] != mark and time.monotonic() - known[1] > _PAUSE):
            known = self._known[found.path] = (mark, time.monotonic(), self._figures(found.place))
        return {"path": found.path, "name": found.name, **known[2], **_state(found.place, known[2], job, self._root)}

    def _figures(self, place: Path) -> dict[str, Any]:
        try:
            check_files(place, self._root, *_FILES)
            _, summary, _, _ = _look(place, lambda frontier, settings: None)
            return _counts(summary) | {"damaged": None}
        except (CLLMError, OSError) as error:
            blank = dict.fromkeys(("pages", "bytes", "queued", "waiting", "errors", "sites"))
            return blank | {"damaged": str(error).replace(f"{self._root}/", "")}


def detail(path: str, place: Path, root: Path, job: Job | None) -> dict[str, Any]:
    """One crawl with its settings, hosts, reasons and newest pages. Raises DataError where there is none, or it is damaged."""
    check_files(place, root, *_FILES)
    settings, summary, due, more = _look(place, _more)
    pages = {each.url: each for each in newest_pages(place / PAGES, root, _NEWEST)} if (place / PAGES).is_dir() else {}
    newest = [each | _content(pages.get(each["url"])) for each in more.pop("newest")]
    counts = _counts(summary)
    return {
        "path": path,
        "name": place.name,
        **counts,
        **_state(place, counts | {"damaged": None}, job, root),
        "settings": settings.to_json(),
        "duplicates": summary.duplicates,
        "segments": summary.segments,
        "next_due": due,
        "by_reason": {
            "failed": summary.failed,
            "left_out": summary.left_out,
            "not_queued": summary.not_queued,
            "not_rendered": summary.not_rendered,
        },
        "newest": newest,
        **more,
    }


def begun(path: str, place: Path, job: Job) -> dict[str, Any]:
    """A crawl of which there is nothing but its job yet, in the form of `detail`: it begins, or has failed before it began."""
    return {
        "path": path,
        "name": place.name,
        **dict.fromkeys(("pages", "bytes", "queued", "waiting", "sites", "errors", "duplicates", "segments"), 0),
        "state": job["state"],
        "job": job["id"],
        "settings": {},
        "next_due": None,
        "by_reason": {"failed": {}, "left_out": {}, "not_queued": {}, "not_rendered": {}},
        "robots_forbidden": {"count": 0, "urls": []},
        **{name: [] for name in ("newest", "hosts", "queue", "failures")},
    }


def _look(place: Path, more: Any) -> tuple[Settings, Summary, float | None, Any]:
    """Settings, summary, when a page is due again, and what `more` makes of the open frontier."""
    settings = read_settings(place)
    if settings is None or not (place / DATABASE).is_file():
        raise DataError(f"{place.name} holds no crawl.")
    with explained(place / DATABASE):
        frontier = open_frontier(place / DATABASE, read_only=True, seconds=_SECONDS)
        try:
            return settings, summarise(frontier), frontier.next_due(settings.revisit), more(frontier, settings)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{DATABASE} is damaged ({error}).") from error
        finally:
            frontier.close()


def _counts(summary: Summary) -> dict[str, Any]:
    return {
        "pages": summary.pages,
        "bytes": summary.bytes,
        "queued": summary.queued,
        "waiting": summary.waiting,
        "sites": summary.sites,
        "errors": sum(summary.failed.values()),
    }


def _more(frontier: Frontier, settings: Settings) -> dict[str, Any]:
    sql = frontier.sql
    errors = dict(sql.execute(f"SELECT site, COUNT(*) FROM urls WHERE state = {FAILED} GROUP BY site"))
    sites = sorted(frontier.sites.values(), key=lambda each: (-(each.new + each.again), -each.pages, each.name))
    (forbidden,) = sql.execute(f"SELECT COUNT(*) FROM urls WHERE state = {LEFT_OUT} AND reason = ?", (_FORBIDDEN,)).fetchone()
    urls = sql.execute(f"SELECT url FROM urls WHERE state = {LEFT_OUT} AND reason = ? LIMIT {_URLS}", (_FORBIDDEN,))
    newest = sql.execute(f"SELECT url, status, fetched_at FROM urls WHERE stored > 0 ORDER BY fetched_at DESC, id DESC LIMIT {_NEWEST}")
    queue = sql.execute(f"SELECT url, depth FROM urls WHERE state IN ({NEW}, {AGAIN}) ORDER BY state, rank, key LIMIT {_URLS}")
    failed = sql.execute(f"SELECT url, reason, status, fetched_at FROM urls WHERE state = {FAILED} ORDER BY fetched_at DESC, id DESC LIMIT {_URLS}")
    return {
        "hosts": [
            {
                "host": _text(each.name),
                "pages": int(each.pages),
                "found": int(each.found),
                "queued": each.new + each.again,
                "errors": errors.get(each.id, 0),
                "failures": each.failures,
                "delay": settings.delay,
                "next_at": each.ready_at or None,
                "closed": each.closed or None,
                "robots": each.closed if "robots" in each.closed else None,
            }
            for each in sites[:_HOSTS]
        ],
        "robots_forbidden": {"count": forbidden, "urls": [_text(url) for (url,) in urls]},
        "newest": [{"url": _text(url), "status": int(status), "fetched": float(fetched)} for url, status, fetched in newest],
        "queue": [{"url": _text(url), "depth": int(depth)} for url, depth in queue],
        "failures": [
            {"url": _text(url), "reason": _text(reason), "status": int(status), "fetched": float(fetched)} for url, reason, status, fetched in failed
        ],
    }


def _text(value: Any) -> str:
    """A text of a database, which may hold anything in its place."""
    return value[:4_000] if isinstance(value, str) else ""


def _content(page: Any) -> dict[str, Any]:
    return {"title": page.title, "text": page.text, "bytes": page.bytes} if page else {"title": None, "text": None, "bytes": None}


def _state(place: Path, figures: Mapping[str, Any], job: Job | None, root: Path) -> dict[str, Any]:
    holder = is_running(place) if problem(place / LOCK, root) is None else None
    left = (figures.get("queued") or 0) + (figures.get("waiting") or 0)
    state = "running" if holder else "failed" if job and job.get("state") in ("failed", "lost") else "paused" if left else "done"
    return {"state": state, "job": job.get("id") if job else None}


def _mark(place: Path) -> Any:
    found: list[tuple[int, int, int] | None] = []
    for name in (DATABASE, f"{DATABASE}-wal", SETTINGS):
        try:
            stat = os.stat(place / name)
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)
