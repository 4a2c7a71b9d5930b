"""Brings pages to the disk in batches: records into the open segment first, then the frontier's word that they are there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cllm._version import __version__
from cllm.data.sources.fetch import Fetched
from cllm.data.sources.frontier import Entry, Frontier
from cllm.data.sources.store import SEGMENT_BYTES, SEGMENT_SECONDS, Store, conversion_record, info_record, response_record, revisit_record
from cllm.data.sources.traps import Novelty

BATCH_PAGES, BATCH_BYTES, BATCH_SECONDS = 128, 16 << 20, 0.25  # after which pages are brought to the disk
RENDERED, NOT_RENDERED = "its scripts were run", "its scripts were not run: "  # what is told of a page that is stored
NOVELTY_SECONDS = 10.0  # between two times that it is saved what was seen


@dataclass(frozen=True, slots=True)
class Page:
    """A page that is to be stored. `same_as`: the URL under which its bytes are stored already.

    `rendered`: what its scripts have made of it; `note`: whether they have been run, for the summary.
    """

    entry: Entry
    fetched: Fetched
    date: float
    digest: bytes
    same_as: str | None
    rendered: bytes = b""
    note: str = ""


class Writer:
    """The pages of a crawl on their way to the disk. Only `run` writes, one batch at a time."""

    def __init__(self, frontier: Frontier, store: Store, sealed: Callable[[Path], None]) -> None:
        self._frontier, self._store, self._sealed = frontier, store, sealed
        self.novelty = Novelty(frontier.fact("novelty"))
        self._batch: list[Page] = []
        self._bytes = 0
        self._digests: dict[bytes, str] = {}  # of pages that are not in the frontier yet
        self._full, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._opened_at = frontier.segment()[3] or time.time()
        self._saved_at = 0.0
        self._finishing = False
        self._pending = 0
        self.new_pages = 0
        """Pages on their way to the disk of which nothing was stored before."""

    @property
    def bytes_stored(self) -> int:
        """Of the open segment."""
        return self._store.size

    @property
    def is_busy(self) -> bool:
        """Whether pages are on their way to the disk."""
        return self._pending > 0

    def with_digest(self, digest: bytes) -> str | None:
        """The URL under which these bytes are stored, or about to be."""
        return self._digests.get(digest) or self._frontier.with_digest(digest)

    async def put(self, page: Page) -> None:
        """Takes a page; waits where more wait for the disk than memory should hold."""
        self._batch.append(page)
        self._pending += 1
        self.new_pages += not page.entry.stored
        self._digests.setdefault(page.digest, page.entry.url)
        self._bytes += len(page.fetched.body) + len(page.rendered)
        if len(self._batch) >= BATCH_PAGES or self._bytes >= BATCH_BYTES:
            self._full.set()
        if self._bytes >= 2 * BATCH_BYTES:
            self._room.clear()
        await self._room.wait()

    async def run(self) -> None:
        """Writes until `finish`. Raises DataError when the disk does not take it."""
        try:
            while not self._finishing:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), BATCH_SECONDS)
                self._full.clear()
                await self._flush()
        finally:
            self._room.set()

    def finish(self) -> None:
        """Makes `run` return; what was put is on the disk then, and its segment whole."""
        self._finishing = True
        self._full.set()

    async def _flush(self) -> None:
        batch, self._batch, self._bytes = self._batch, [], 0
        now = time.time()
        seen = None
        if self.novelty.has_changed and (self._finishing or now - self._saved_at >= NOVELTY_SECONDS):
            # As it is before more pages come: one that is seen and never stored would bring nothing new when it is fetched again.
            self._saved_at, seen = now, self.novelty.save()
        if batch:
            self._opened_at = self._opened_at if self._store.size else now
            num_bytes = await asyncio.to_thread(self._write, batch)
            for page in batch:
                self._mark(page)
                self._pending -= 1
                self.new_pages -= not page.entry.stored
                self._digests.pop(page.digest, None)
            self._frontier.grew(num_bytes, len(batch), self._opened_at)
        if seen is not None:
            self._frontier.set_fact("novelty", seen)
        if self._store.size >= SEGMENT_BYTES or (self._store.size and (self._finishing or now - self._opened_at >= SEGMENT_SECONDS)):
            self._seal()
        else:
            self._frontier.commit()
        self._room.set()

    def _seal(self) -> None:
        whole = self._store.sealed_path(self._store.number)
        self._frontier.next_segment()
        self._frontier.commit()
        self._store.next_segment()
        self._sealed(whole)

    def _write(self, batch: list[Page]) -> int:
        """In another thread, because compressing and flushing take most of their time without Python."""
        records = [] if self._store.size else [info_record(self._store.number, batch[0].date, f"cllm/{__version__}")]
        for page in batch:
            fetched = page.fetched
            headers = [(name.encode("utf-8", "surrogateescape"), value.encode("utf-8", "surrogateescape")) for name, value in fetched.headers]
            answer = (page.entry.url, page.date, fetched.status, headers, fetched.body)
            records.append(response_record(*answer) if page.same_as is None else revisit_record(*answer, page.same_as))
            if page.rendered and page.same_as is None:
                records.append(conversion_record(page.entry.url, page.date, page.rendered))
        self._store.append(records)
        return sum(map(len, records))

    def _mark(self, page: Page) -> None:
        self._frontier.stored(
            page.entry,
            page.date,
            status=page.fetched.status,
            etag=page.fetched.header("ETag") or None,
            last_modified=page.fetched.header("Last-Modified") or None,
            digest=page.digest,
            reason=page.note if page.same_as is None else "the same bytes as another page",
        )
