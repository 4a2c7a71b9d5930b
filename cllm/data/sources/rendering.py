"""Pages whose scripts a browser runs, and what these scripts may load: as little as a text needs, and by the rules for pages.

- Only scripts and what scripts ask for with GET is loaded, of any site whose robots.txt allows it and that does not ask not to be trained on; no
  pictures, fonts, styles and frames, and nothing that --deny names. Nothing is ever sent but the address.
- The addresses are those that `Guard` allows. Those of this machine or network that the user has allowed are for pages that came from such an
  address; a public page reaches public ones alone, whatever is allowed. Otherwise it could read what is inside and carry it out.
- A host is asked for one thing at a time, its pages included. The pause of a site is between pages: a page counts with what its scripts load, most
  of which is kept for the next page. A host that does not answer, or asks for a pause, is left alone.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from typing import Any

from cllm.data.sources import urls
from cllm.data.sources.addresses import Guard
from cllm.data.sources.browser import Answer, Bounds, Browser, Rendered
from cllm.data.sources.directives import of_headers
from cllm.data.sources.fetch import Fetched, Fetcher, Limits, downgrade
from cllm.data.sources.links import codec_of
from cllm.data.sources.politeness import Turns, back_off
from cllm.data.sources.robots import Robots
from cllm.data.sources.scope import Patterns
from cllm.data.sources.settings import Settings

REQUESTS, BYTES = 100, 32 << 20  # that one page may cost
HOPS = 5
_RESTING = 10_000  # hosts that are remembered
_KEPT_BYTES, _KEPT_SECONDS = 64 << 20, 600.0  # of answers, for the pages to come
_PASSED_ON = (
    "access-control-allow-credentials", "access-control-allow-origin", "access-control-expose-headers", "content-type",
    "cross-origin-resource-policy", "x-content-type-options",
)  # fmt: skip
_OF_PAGES = ("content-security-policy",)
_Key = tuple[str, str, str, bool]
"""Address, Accept, origin of the page, and whether that came from an address that was allowed by name."""


class Rendering:
    """Renders the pages of a crawl. An asynchronous context manager. fetcher, robots: of the crawl, which reach all that it may reach."""

    def __init__(self, browser: Browser, settings: Settings, limits: Limits, user_agent: str, fetcher: Fetcher, robots: Robots, turns: Turns) -> None:
        self._browser, self._settings, self._turns = browser, settings, turns
        self._public = Guard()
        self._inside = fetcher, robots
        public = Fetcher(limits, self._public, user_agent)
        self._outside = public, Robots(public, back_off(settings.delay, 1, None), settings.content_signals)
        self._bounds = Bounds(settings.timeout, settings.max_bytes)
        self.denied = Patterns((), settings.deny)
        self._kept: OrderedDict[_Key, tuple[float, Answer]] = OrderedDict()
        self._kept_bytes = 0
        self._resting: dict[str, float] = {}  # until when, in seconds of the monotonic clock, a host is left alone

    async def __aenter__(self) -> Rendering:
        await self._outside[0].__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._outside[0].__aexit__(*error)

    async def of(self, answer: Fetched) -> tuple[Rendered, float]:
        """A page that was fetched, after its scripts have run, and the seconds for which its site is to be left alone because of what they loaded."""
        loads = _Loads(self, answer.final_url, self._is_inside(answer))
        page = Answer(answer.status, _named(answer, _OF_PAGES) | {"content-type": _type(answer)}, answer.body)
        rendered = await self._browser.render(page, answer.final_url, loads.load, self._bounds)
        return rendered, max(0.0, self._resting.get(urls.authority(answer.final_url), 0.0) - time.monotonic())

    def _is_inside(self, answer: Fetched) -> bool:
        """Whether a page came from an address that was allowed by name."""
        return bool(answer.address and self._public.refusal(answer.address, 0))

    async def get(self, url: str, headers: dict[str, str], page: str, is_inside: bool) -> Fetched | None:
        """One request, no redirect followed; None where it is not made."""
        fetcher, robots = self._inside if is_inside else self._outside
        if urls.origin(url) == urls.origin(page):
            robots = self._inside[1]  # which knows the file, since the page was allowed
        host = urls.authority(url)
        async with self._turns.of(url):
            if self._resting.get(host, 0.0) > time.monotonic() or not (await robots.verdict(url)).allowed:
                return None
            answer = await fetcher.fetch(url, types=("*",), headers=headers)
        if answer.transient and (answer.status in (0, 429, 503) or answer.retry_after is not None):
            if len(self._resting) >= _RESTING:
                self._resting.clear()
            self._resting[host] = time.monotonic() + back_off(self._settings.delay, 1, answer.retry_after)
        if of_headers(answer.headers, self._settings.content_signals).notraining:
            return None  # noindex alone stands on data that pages show
        return answer

    def kept(self, key: _Key) -> Answer | None:
        """An answer of the last minutes."""
        found = self._kept.get(key)
        return found[1] if found and found[0] > time.monotonic() else None

    def keep(self, key: _Key, answer: Answer) -> None:
        before = self._kept.pop(key, None)
        self._kept[key] = time.monotonic() + _KEPT_SECONDS, answer
        self._kept_bytes += len(answer.body) - (len(before[1].body) if before else 0)
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1][1].body)


class _Loads:
    """What one page loads."""

    def __init__(self, rendering: Rendering, page: str, is_inside: bool) -> None:
        self._rendering, self._page, self._is_inside = rendering, page, is_inside
        self._requests, self._bytes = REQUESTS, BYTES

    async def load(self, asked: str, accept: str) -> Answer | None:
        """The answer to a script, after redirects; None where it is not loaded."""
        try:
            url = urls.clean(asked)
        except urls.BadURL:
            return None
        headers = {"Accept": accept[:500] if accept.isascii() and accept.isprintable() else "*/*"}
        key = url, headers["Accept"], urls.origin(self._page), self._is_inside
        if found := self._rendering.kept(key):
            return found
        for _ in range(HOPS):
            if urls.origin(url) != urls.origin(self._page):
                headers["Origin"] = urls.origin(self._page)  # by which a server knows whom it lets read its answer
            if self._requests <= 0 or self._bytes <= 0 or self._rendering.denied.refusal(url):
                return None
            self._requests -= 1
            answer = await self._rendering.get(url, headers, self._page, self._is_inside)
            if answer is None:
                return None
            self._bytes -= len(answer.body)
            if answer.redirect and not downgrade(url, answer.redirect):
                url = answer.redirect
                continue
            if answer.problem and answer.status < 400:
                return None
            loaded = Answer(answer.status, _named(answer, _PASSED_ON), answer.body)
            if not answer.problem:
                self._rendering.keep(key, loaded)
            return loaded
        return None


def _type(answer: Fetched) -> str:
    """The Content-Type of a page. UTF-8 that nobody has declared is told, because browsers take it for an older charset."""
    if codec_of(answer.body, answer.charset) == "utf-8":
        with contextlib.suppress(UnicodeDecodeError):
            answer.body.decode()
            return f"{answer.content_type or 'text/html'}; charset=utf-8"
    return answer.header("Content-Type") or "text/html"


def _named(answer: Fetched, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := answer.header(name))}
