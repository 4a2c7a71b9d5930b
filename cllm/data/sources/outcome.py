"""What becomes of a URL that was asked for: stored, tried again, a redirect, or left out with a reason; and of the links on it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import Callable

from cllm.data.sources import urls
from cllm.data.sources.browser import Rendered
from cllm.data.sources.directives import NO_TRAINING, Directives, of_headers
from cllm.data.sources.discovery import Discovery, key_of
from cllm.data.sources.fetch import MAX_HOPS, Fetched
from cllm.data.sources.frontier import DONE, FAILED, FEED, LEFT_OUT, PAGE, SITEMAP, SLOWEST, Entry, Frontier, Site
from cllm.data.sources.links import Links, is_html, links
from cllm.data.sources.politeness import back_off
from cllm.data.sources.rendering import Rendering
from cllm.data.sources.settings import Settings
from cllm.data.sources.sitemaps import read
from cllm.data.sources.traps import NOVEL, STALE
from cllm.data.sources.writer import NOT_RENDERED, RENDERED, Page, Writer

UNREACHABLE = 12  # failures in a row, after which a site is left for this run
LARGE = 1 << 18  # bytes of a page whose links are looked for in another thread
NO_ANSWER = "the site does not answer"
ASKS_NOT = "the page asks not to be kept (noindex or noai)"
ASKS_NO_TRAINING = "the page asks not to be trained on (Content-Signal: ai-train=no)"
NOTHING_NEW = "a part of the site that brings nothing new"
REDIRECT = "it redirects"
A_LIST = "a sitemap or feed"
SITE_FULL = "the site has given --max-per-site pages"
MAX_NESTED = 4  # sitemaps that are named in sitemaps
_OF_PAGE, _OF_RENDERED = 16, 17  # bytes of the digest of what is stored, which tell the two apart for good
_SCRIPT = re.compile(rb"<\0?s\0?c\0?r\0?i\0?p\0?t\b", re.IGNORECASE)  # in UTF-16 too


class Outcomes:
    """Decides about answers. `enter`: called with each site that has more to do; `rendering`: runs the scripts of pages, where they are run."""

    def __init__(
        self,
        frontier: Frontier,
        discovery: Discovery,
        writer: Writer,
        settings: Settings,
        enter: Callable[[Site], None],
        rendering: Rendering | None = None,
    ) -> None:
        self._frontier, self._discovery, self._writer, self._settings, self._enter = frontier, discovery, writer, settings, enter
        self._rendering = rendering

    async def of(self, site: Site, entry: Entry, answer: Fetched) -> float:
        """Returns how many seconds the site is to be left alone because of it; 0 for no more than the usual pause."""
        now = time.time()
        if answer.transient:
            return self._failed(site, entry, answer, now)
        if site.failures:
            site.failures = 0
            self._frontier.changed(site)
        if answer.redirect:
            self._redirected(entry, answer, now)
        elif answer.problem:
            # Most sites have no sitemap at the usual place, and a feed may be gone: that is no page that was lost.
            state = DONE if entry.kind != PAGE else FAILED if answer.status >= 400 or not answer.status else LEFT_OUT
            self._finish(entry, state, answer.problem, now, status=answer.status, pace=1)
        elif answer.not_modified:
            self._finish(entry, DONE, RENDERED if _is_rendered(entry) else "", now, status=200, pace=entry.pace + 1)
        elif entry.kind != PAGE:
            await self._read_list(entry, answer, now)
        else:
            return await self._read_page(site, entry, answer, now)
        return 0.0

    def _finish(self, entry: Entry, state: int, reason: str, now: float, *, status: int = 0, pace: int = 0) -> None:
        self._frontier.finish(entry, state, reason, now, status=status, pace=min(SLOWEST, pace))

    def _failed(self, site: Site, entry: Entry, answer: Fetched, now: float) -> float:
        """A failure that may pass. No answer at all, or one that asks for a pause, concerns the whole site; any other only its page."""
        concerns_all = answer.status in (0, 429, 503) or answer.retry_after is not None
        if concerns_all:
            site.failures += 1
            self._frontier.changed(site)
        pause = back_off(self._settings.delay, site.failures if concerns_all else entry.tries + 1, answer.retry_after)
        if entry.tries >= self._settings.retries:
            self._finish(entry, FAILED, answer.problem, now, status=answer.status, pace=1)
        else:
            self._frontier.retry(entry, now + pause, answer.problem, answer.status)
        if site.failures >= UNREACHABLE:
            self._frontier.close_site(site, NO_ANSWER)
        return pause if concerns_all else 0.0

    def _redirected(self, entry: Entry, answer: Fetched, now: float) -> None:
        target = answer.redirect
        if entry.hops >= MAX_HOPS:
            self._finish(entry, FAILED, f"it redirects more than {MAX_HOPS} times", now, status=answer.status, pace=1)
        elif key_of(target) == entry.key and target != entry.url:
            self._frontier.moved(entry, target)
        elif target == entry.url:
            self._finish(entry, FAILED, "it redirects to itself", now, status=answer.status, pace=1)
        else:
            if entry.depth == 0 and _same_name(entry.url, target):
                self._discovery.add_seed(target)
                self._frontier.add_seed(target)
            self._queue(target, depth=entry.depth, hops=entry.hops + 1, kind=entry.kind, first=entry.depth == 0)
            self._finish(entry, DONE, REDIRECT, now, status=answer.status)

    def _queue(self, url: str, *, depth: int, hops: int = 0, kind: int = PAGE, first: bool = False) -> None:
        site = self._discovery.found(url, depth=depth, hops=hops, kind=kind, first=first)
        if site is not None:
            self._enter(site)

    async def _read_list(self, entry: Entry, answer: Fetched, now: float) -> None:
        """A sitemap or feed: its URLs are queued, and nothing is stored."""
        found = await asyncio.to_thread(read, answer.body, entry.url)
        for url in found.sitemaps:
            if entry.depth < MAX_NESTED:
                self._queue(url, depth=entry.depth + 1, kind=SITEMAP)
        for url, _ in found.pages:
            self._queue(url, depth=1 if entry.kind == SITEMAP else entry.depth + 1)
        self._finish(entry, DONE, A_LIST, now, status=answer.status, pace=0 if found.pages else 1)

    async def _read_page(self, site: Site, entry: Entry, answer: Fetched, now: float) -> float:
        directives = of_headers(answer.headers, self._settings.content_signals)
        rendered, pause = Rendered(), 0.0
        if is_html(answer.content_type, answer.body):
            directives |= await self._read_links(entry, answer.body, answer.charset, directives.nofollow)
            if self._rendering is not None and not directives.noindex and _SCRIPT.search(answer.body):
                rendered, pause = await self._rendering.of(answer)
                directives |= await self._read_links(entry, rendered.body, "utf-8", directives.nofollow, rendered.leads_to)
        if directives.noindex:
            self._finish(entry, LEFT_OUT, ASKS_NO_TRAINING if directives.words == NO_TRAINING else ASKS_NOT, now, status=answer.status, pace=1)
            return pause
        note = RENDERED if rendered.body else NOT_RENDERED + rendered.problem if rendered.problem else ""
        if rendered.problem and _is_rendered(entry):
            self._finish(entry, DONE, RENDERED, now, status=answer.status, pace=entry.pace)  # what is stored has more in it
            return pause
        digest = hashlib.blake2b(answer.body + rendered.body, digest_size=_OF_RENDERED if rendered.body else _OF_PAGE).digest()
        if entry.digest == digest:
            self._finish(entry, DONE, note, now, status=answer.status, pace=entry.pace + 1)
            return pause
        same_as = self._writer.with_digest(digest)
        self._judge(site, entry, 0.0 if same_as else self._writer.novelty.of(site.id, rendered.body or answer.body))
        await self._writer.put(Page(entry, answer, now, digest, None if same_as == entry.url else same_as, rendered.body, note))
        return pause

    async def _read_links(self, entry: Entry, body: bytes, charset: str, nofollow: bool, more: tuple[str, ...] = ()) -> Directives:
        """Queues the links of a page, and `more` addresses. Returns what its tags ask for."""
        page = await asyncio.to_thread(links, body, entry.url, charset) if len(body) > LARGE else links(body, entry.url, charset)
        if not nofollow:
            self._follow(page, entry)
            for each in more:
                with contextlib.suppress(urls.BadURL):
                    self._queue(urls.clean(each, entry.url), depth=entry.depth + 1)
        return page.directives

    def _follow(self, page: Links, entry: Entry) -> None:
        for url in page.pages:
            self._queue(url, depth=entry.depth + 1)
        if page.canonical:
            self._queue(page.canonical, depth=entry.depth)
        for url in page.feeds if self._settings.feeds else ():
            self._queue(url, depth=entry.depth + 1, kind=FEED)

    def _judge(self, site: Site, entry: Entry, novelty: float) -> None:
        """Closes a part of a site that goes on without bringing anything new, and a site that has given enough."""
        prefix = self._frontier.prefix_of(entry)
        site.pages += not entry.stored
        prefix.pages += not entry.stored
        prefix.stale = prefix.stale + 1 if novelty < NOVEL else max(0, prefix.stale - 2)
        self._frontier.changed(site)
        self._frontier.changed(prefix)
        if prefix.stale >= STALE and not prefix.closed:
            self._frontier.close_prefix(prefix, NOTHING_NEW)
        if site.pages >= self._settings.max_per_site and not site.closed:
            self._frontier.close_site(site, SITE_FULL)


def _is_rendered(entry: Entry) -> bool:
    """Whether what is stored of it is what its scripts have made of it."""
    return len(entry.digest or b"") == _OF_RENDERED


def _same_name(one: str, other: str) -> bool:
    """Whether two URLs differ in no more than http and https or a "www." before the name, as a site's own redirects do."""
    return urls.host(one).removeprefix("www.") == urls.host(other).removeprefix("www.") and all(
        urls.authority(each) == urls.host(each) for each in (one, other)
    )
