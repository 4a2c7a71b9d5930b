"""The crawl: takes URLs from the frontier when their site may be asked, fetches them, queues their links and stores their pages.

Everything happens in one thread but the compression and the flushing of pages. A page is marked as stored only after its record is on the disk, in
the same transaction that says how long the segment is; what a kill interrupts is fetched again.

Redirects are links: where they lead is queued, and so is subject to scope, robots.txt and politeness like any other URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.data.sources import urls
from cllm.data.sources.addresses import Guard
from cllm.data.sources.browser import Browser
from cllm.data.sources.discovery import Discovery, key_of
from cllm.data.sources.fetch import DOCUMENTS, Fetcher, Limits, agent
from cllm.data.sources.frontier import AGAIN, FAILED, LEFT_OUT, NEW, PAGE, SITEMAP, WAITING, Entry, Site, explained, open_frontier
from cllm.data.sources.outcome import Outcomes
from cllm.data.sources.politeness import Schedule, Turns, back_off, pause_of
from cllm.data.sources.rendering import Rendering
from cllm.data.sources.robots import Robots
from cllm.data.sources.settings import DATABASE, PAGES, Settings
from cllm.data.sources.store import Store
from cllm.data.sources.writer import Writer

CONNECTIONS = 64
_PATIENCE = 0.2  # seconds between two questions whether to pause


@dataclass(frozen=True)
class Figures:
    """How far a crawl is."""

    pages: int
    queued: int
    in_flight: int
    waiting: int
    failed: int
    left_out: int
    pages_per_second: float


class Crawl:
    """A crawl into `folder`, whose lock the caller holds.

    browser: runs the scripts of pages. stop: asked five times a second whether to pause. tell: called as often with the figures. sealed: called with
    each segment that is whole. Raises DataError and UserError.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        guard: Guard,
        *,
        browser: Browser | None = None,
        stop: Callable[[], bool] = lambda: False,
        tell: Callable[[Figures], None] = lambda figures: None,
        sealed: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder, self.settings, self._guard, self._browser = folder, settings, guard, browser
        self._stop, self._tell, self._sealed = stop, tell, sealed
        self._agent = agent(settings.contact)
        self._limits = Limits(settings.timeout, settings.max_bytes, settings.types or DOCUMENTS, CONNECTIONS)

    def run(self) -> bool:
        """Crawls until nothing is left to do, or it is to pause. Returns whether it came to its end."""
        with explained(self.folder / DATABASE):
            self.frontier = open_frontier(self.folder / DATABASE, time.time() + self.settings.delay)
            try:
                number, size, _, _ = self.frontier.segment()
                self._store = Store(self.folder / PAGES, number, size, self.frontier.sealed())
                try:
                    return asyncio.run(self._run())
                finally:
                    self._store.close()
            finally:
                self.frontier.close()

    async def _run(self) -> bool:
        self._schedule, self._writer = Schedule(), Writer(self.frontier, self._store, self._sealed)
        self._discovery = Discovery(self.frontier, self.settings)
        self._entered: set[int] = set()  # sites whose address is known or being looked up
        self._parked: dict[int, Site] = {}  # sites with nothing but new pages, of which there are enough
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._threads = ThreadPoolExecutor(8, "names")  # a name server that hangs must not hold up the end
        self._reserved = 0  # requests in flight that may bring a new page
        self._failure: BaseException | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=50)
        self._turns = Turns() if self._browser else None
        self._begin()
        async with contextlib.AsyncExitStack() as stack:
            self._fetcher = await stack.enter_async_context(Fetcher(self._limits, self._guard, self._agent))
            self._robots = Robots(self._fetcher, back_off(self.settings.delay, 1, None), self.settings.content_signals)
            rendering = None
            if self._browser and self._turns:
                rendering = Rendering(self._browser, self.settings, self._limits, self._agent, self._fetcher, self._robots, self._turns)
                await stack.enter_async_context(rendering)
            self._outcomes = Outcomes(self.frontier, self._discovery, self._writer, self.settings, self._enter, rendering)
            writing = asyncio.create_task(self._writer.run())
            try:
                is_done = await self._loop(writing)
            finally:
                await self._end(writing)
                self._threads.shutdown(wait=False, cancel_futures=True)
        return is_done

    def _begin(self) -> None:
        """Queues the seeds, what is due again, and what did not answer the last time."""
        now = time.time()
        self.frontier.reopen(self.settings.max_per_site)
        self.frontier.reach(self.settings.depth)
        self.num_due = self.frontier.due_again(now, self.settings.revisit)
        for seed in self.settings.seeds:
            url = urls.clean(seed)
            self._discovery.add_seed(url)
            self._discovery.found(url, depth=0, first=True)
        for url in self.frontier.more_seeds():
            self._discovery.add_seed(url)
        for site in list(self.frontier.sites.values()):
            site.ready_at = min(site.ready_at, now + 86400.0)  # whatever the clock said then
            self._enter(site)
        self.frontier.commit()

    async def _loop(self, writing: asyncio.Task[None]) -> bool:
        told = 0.0
        while not self._stop():
            self._changed.clear()
            if self._failure is not None:
                raise self._failure
            if writing.done():
                await writing  # raises what went wrong
            now = time.time()
            for site in self.frontier.wake(now):
                self._enter(site)
            if self._parked and self._room() > 0:
                parked, self._parked = self._parked, {}
                for site in parked.values():
                    self._enter(site)
            while self._schedule.in_flight < CONNECTIONS and (found := self._schedule.pop(now)) is not None:
                self._start(self._visit(found))
            if now - told >= _PATIENCE:
                told = now
                self._tell(self.figures())
            next_time = self._schedule.next_time()
            is_waiting = self.frontier.waiting and self._room() > 0
            if not self._tasks and next_time is None and not is_waiting and not self._writer.is_busy:
                return True
            is_free = next_time is not None and self._schedule.in_flight < CONNECTIONS
            await self._wait(min(_PATIENCE, max(0.0, next_time - now)) if is_free and next_time is not None else _PATIENCE)
        return False

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            pass

    async def _end(self, writing: asyncio.Task[None]) -> None:
        """Requests in flight are given up and their URLs queued again; all that has arrived is brought to the disk."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.finish()
        await writing
        self.frontier.end()
        self._tell(self.figures())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()

    # -- sites ----------------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """How many pages may still be new."""
        if self.settings.max_pages is None:
            return 1 << 60
        return self.settings.max_pages - self.frontier.pages - self._writer.new_pages - self._reserved

    def _enter(self, site: Site) -> None:
        """A site may have work: once its address is known, it takes part."""
        if not site.new + site.again:
            return
        if site.id in self._entered:
            if site.id not in self._parked:
                self._schedule.push(site)
            return
        self._entered.add(site.id)
        self._start(self._look_up(site))

    async def _look_up(self, site: Site) -> None:
        name = urls.host(site.name + "/").strip("[]")
        try:
            site.address = str(ipaddress.ip_address(name))
        except ValueError:
            try:
                async with asyncio.timeout(self.settings.timeout):
                    found = await asyncio.get_running_loop().run_in_executor(self._threads, socket.getaddrinfo, name, None)
                site.address = min(str(each[4][0]) for each in found)
            except (OSError, UnicodeError):  # the request will say what is the matter
                site.address = name
        self._schedule.rest(site, min(site.ready_at, time.time() + self.settings.delay))
        self._schedule.push(site)

    async def _visit(self, site: Site) -> None:
        """One request to a site that may be asked now: for its robots.txt where that is not known or old, otherwise for a page."""
        until = time.time()
        try:
            if self._robots.known(f"{site.name}/") is None:
                await self._read_robots(site)
                until = time.time() + pause_of(self.settings.delay, key_of(f"{site.name}/robots.txt"))
            elif (entry := await self._take(site)) is not None:
                pause = await self._ask(site, entry)
                until = time.time() + pause
        finally:
            site.ready_at = max(site.ready_at, until)
            self.frontier.changed(site)
            self._schedule.done(site, until)
            self._enter(site)

    async def _read_robots(self, site: Site) -> None:
        async with self._turn(site):
            rules = await self._robots.site(f"{site.name}/")
        if not rules.temporary:
            for url in rules.sitemaps or (f"{site.name}/sitemap.xml",):
                if self.settings.sitemaps and self.settings.depth and not rules.closed:
                    found = self._discovery.found(url, depth=0, kind=SITEMAP)
                    self._enter(found or site)
        elif rules.failures > self.settings.retries:
            self.frontier.close_site(site, rules.closed)
        else:
            site.ready_at = time.time() + max(0.0, rules.until - time.monotonic())

    async def _take(self, site: Site) -> Entry | None:
        """The next URL of a site that its robots.txt allows."""
        while True:
            has_room = self._room() > 0
            entry = self.frontier.take(site, new=has_room)
            if entry is None:
                if site.new and not has_room:
                    self._parked[site.id] = site
                return None
            verdict = await self._robots.verdict(entry.url)
            if verdict.wait and not site.closed:
                self.frontier.release(entry)
                site.ready_at = time.time() + verdict.wait
                return None
            if verdict.allowed and not site.closed:
                return entry
            self.frontier.finish(entry, LEFT_OUT, site.closed or verdict.reason, time.time())

    async def _ask(self, site: Site, entry: Entry) -> float:
        """Fetches a URL. Returns the seconds of pause after it."""
        is_new = not entry.stored
        self._reserved += is_new
        try:
            async with self._turn(site):
                etag, last_modified = self._conditions(entry)
                answer = await self._fetcher.fetch(entry.url, etag=etag, last_modified=last_modified, types=self._types(entry))
            pause = await self._outcomes.of(site, entry, answer)
        finally:
            self._reserved -= is_new
        if pause:
            site.ready_at = time.time() + pause
        rules = self._robots.known(entry.url)
        return pause_of(max(self.settings.delay, rules.delay if rules else 0.0), entry.key)

    def _turn(self, site: Site) -> contextlib.AbstractAsyncContextManager[Any]:
        """What is held during a request to a site: nothing where the schedule alone decides who is asked."""
        return self._turns.of(f"{site.name}/") if self._turns else contextlib.nullcontext()

    def _conditions(self, entry: Entry) -> tuple[str, str]:
        """The ETag and Last-Modified of what is at hand. Whether a page changed whose scripts are run, its server does not know."""
        return ("", "") if self._browser and entry.kind == PAGE else (entry.etag or "", entry.last_modified or "")

    def _types(self, entry: Entry) -> tuple[str, ...] | None:
        """The content types to take: a sitemap or feed is never stored, and may be of any."""
        return None if entry.kind == PAGE else ("*",)

    def figures(self) -> Figures:
        counts, now = self.frontier.counts, time.monotonic()
        self._recent.append((now, self.frontier.pages))
        then, pages = self._recent[0]
        seconds = now - then
        return Figures(
            pages=self.frontier.pages,
            queued=counts[AGAIN] + counts[NEW],
            in_flight=self._schedule.in_flight,
            waiting=counts[WAITING],
            failed=counts[FAILED],
            left_out=counts[LEFT_OUT],
            pages_per_second=(self.frontier.pages - pages) / seconds if seconds > 0 else 0.0,
        )
