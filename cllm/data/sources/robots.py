"""What sites allow by their robots.txt (RFC 9309): parsed by protego, fetched and kept by the rules below.

    | answer for robots.txt                  | the site                                            |
    |----------------------------------------|-----------------------------------------------------|
    | 2xx                                    | what it says, for 24 hours; 512 KiB of it are read  |
    | 401, 403                               | is closed to robots, for 24 hours                   |
    | other 4xx                              | is open, for 24 hours                               |
    | 429, 5xx, time limit, no connection,   | is closed for now; asked again after a minute, then |
    | more than 5 redirects, to where none   | after twice as long each time, up to an hour, or    |
    | may be followed                        | when Retry-After says so                            |

A file that asks not to train on the site's pages ("Content-Signal: ai-train=no" in the group of this robot, https://contentsignals.org) closes the
site, unless these signals are not to be obeyed.

Where a file could be read in more than one way the one that forbids more is taken. The site of a robots.txt is scheme, host and port.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cllm.data.sources.directives import forbids_training
from cllm.data.sources.fetch import PRODUCT, Fetched, Fetcher
from cllm.data.sources.urls import BadURL, clean, origin

if TYPE_CHECKING:
    from protego import Protego

MAX_BYTES = 512 << 10
MAX_HOPS = 5
MAX_DELAY = 60.0  # seconds; a site that asks for more between two pages is visited at this pace
_KEEP = 24 * 3600.0
_FIRST_RETRY, _LAST_RETRY = 60.0, 3600.0
_KEPT_SITES, _KEPT_BYTES = 10_000, 64 << 20
_MAX_WILDCARDS = 5000  # lines with "*"; each costs time for every address
_MAX_SITEMAPS = 100
_ANY_TYPE = ("*",)

_AGENT = re.compile(r"\s*user[- ]?agent(?:\s*:|\s)\s*([a-z0-9_-]+|\*(?=\s*(?:#|$)))[^#]*", re.IGNORECASE)
_NO_TRAINING = "its robots.txt asks not to train on its pages (Content-Signal: ai-train=no)"
_NOBODY = "\x01"  # a name that no group has, for which those of "*" are


@dataclass(frozen=True)
class Verdict:
    """Whether an address may be fetched."""

    allowed: bool
    reason: str = ""
    """Why not: words that complete "not fetched: ..."."""
    wait: float = 0.0
    """Seconds after which it is worth asking again; 0 where the answer is final."""


@dataclass
class Site:
    """What the robots.txt of one site says."""

    rules: Protego | None = None
    agent: str = PRODUCT
    closed: str = ""
    """Why nothing of the site is fetched; empty where the rules decide."""
    temporary: bool = False
    until: float = 0.0
    """Seconds of the monotonic clock, after which the file is fetched again."""
    failures: int = 0
    """In a row."""
    delay: float = 0.0
    """Seconds between two requests that the site asks for, at most `MAX_DELAY`."""
    sitemaps: tuple[str, ...] = ()
    """Clean addresses, of any host: the scope of the crawl decides on them."""
    size: int = 0


class Robots:
    """The robots.txt of every site that was asked about, each fetched once in 24 hours however many ask at the same time."""

    def __init__(self, fetcher: Fetcher, first_retry: float = _FIRST_RETRY, signals: bool = True) -> None:
        """signals: whether a site is closed that asks not to be trained on."""
        self._fetcher, self._first_retry, self._signals = fetcher, first_retry, signals
        self._sites: OrderedDict[str, Site] = OrderedDict()
        self._asked: dict[str, asyncio.Task[Site]] = {}
        self._bytes = 0

    async def verdict(self, url: str) -> Verdict:
        """Whether a clean address may be fetched. Fetches the robots.txt of its site where that is not known."""
        site = await self.site(url)
        if site.closed:
            return Verdict(False, site.closed, max(site.until - time.monotonic(), 1.0) if site.temporary else 0.0)
        if site.rules is not None and not site.rules.can_fetch(url, site.agent):
            return Verdict(False, "robots.txt forbids it")
        return Verdict(True)

    def known(self, url: str) -> Site | None:
        """What the site of a clean address says; None where it has to be fetched first."""
        name = origin(url)
        found = self._sites.get(name)
        if found is None or time.monotonic() >= found.until:
            return None
        self._sites.move_to_end(name)
        return found

    async def site(self, url: str) -> Site:
        """What the site of a clean address says, fetched where it is not known or too old."""
        found = self.known(url)
        if found is not None:
            return found
        name = origin(url)
        known = self._sites.get(name)
        task = self._asked.get(name)
        if task is None:
            task = self._asked[name] = asyncio.create_task(self._fetched(name, known))
            task.add_done_callback(lambda _: self._asked.pop(name, None))
        return await asyncio.shield(task)  # one who gives up leaves it to the others

    async def _fetched(self, name: str, before: Site | None) -> Site:
        answer = await self._fetcher.fetch(f"{name}/robots.txt", may_follow=_any, max_hops=MAX_HOPS, types=_ANY_TYPE, head_bytes=MAX_BYTES)
        site = self._decided(answer, before)
        self._bytes += site.size - (before.size if before and name in self._sites else 0)
        self._sites[name] = site
        self._sites.move_to_end(name)
        while len(self._sites) > _KEPT_SITES or (self._bytes > _KEPT_BYTES and len(self._sites) > 1):
            self._bytes -= self._sites.popitem(last=False)[1].size
        return site

    def _decided(self, answer: Fetched, before: Site | None) -> Site:
        now = time.monotonic()
        if not answer.problem:
            site = parsed(answer.body, answer.final_url, self._signals)
            site.until = now + _KEEP
            return site
        if answer.status in (401, 403):
            return Site(closed=f"robots.txt is not shown to robots (status {answer.status})", until=now + _KEEP)
        if 400 <= answer.status < 500 and answer.status not in (408, 425, 429):
            return Site(until=now + _KEEP)
        if answer.problem.startswith("refused: ") and not answer.hops:  # the guard of addresses says the same when it is asked again
            return Site(closed=f"its robots.txt cannot be read: {answer.problem}", until=now + _KEEP)
        failures = before.failures + 1 if before else 1
        wait = min(self._first_retry * 2 ** min(failures - 1, 20), _LAST_RETRY)
        if answer.retry_after is not None:
            wait = max(self._first_retry, answer.retry_after)
        return Site(closed=f"its robots.txt cannot be read: {answer.problem}", temporary=True, until=now + wait, failures=failures)


def parsed(body: bytes, url: str, signals: bool = True) -> Site:
    """What a robots.txt says; where it is cut off, its last line is left out. signals: whether one against training closes the site."""
    from protego import Protego

    if len(body) >= MAX_BYTES:
        body = body[: max(body.rfind(end, 0, MAX_BYTES) for end in (b"\n", b"\r")) + 1]
    # Lines end as protego ends them. It takes a group for "cl" as one for "cllm", and one for "cllm/1.0" or "cllm bot" as one for somebody else.
    names: set[str] = set()
    lines = _text(body).splitlines()
    for number, line in enumerate(lines):
        if found := _AGENT.match(line):
            names.add(found[1].lower())
            lines[number] = f"User-agent: {found[1]} {line[found.end() :]}"
    text = "\n".join(lines)
    if text.count("*") > _MAX_WILDCARDS:
        return Site(closed=f"its robots.txt has more than {_MAX_WILDCARDS:,} wildcards", size=0)
    agent = PRODUCT if PRODUCT in names else _NOBODY
    rules = Protego.parse(text)
    pauses = [rules.crawl_delay(agent) or 0.0]
    rate = rules.request_rate(agent)
    if rate and rate.requests > 0:
        pauses.append(rate.seconds / rate.requests)
    sitemaps: dict[str, None] = {}
    for each in list(rules.sitemaps)[:_MAX_SITEMAPS]:
        try:
            sitemaps.setdefault(clean(each, url))
        except BadURL:
            continue
    closed = _NO_TRAINING if signals and _forbids_training(text, PRODUCT if agent == PRODUCT else "*") else ""
    return Site(rules, agent, closed, delay=min(max(pauses), MAX_DELAY), sitemaps=tuple(sitemaps), size=20 * len(body))


def _forbids_training(text: str, name: str) -> bool:
    """Whether a signal in a group of this name, or outside of all groups, is against training."""
    group: set[str] = set()
    is_heading = False
    for line in text.splitlines():
        field, colon, value = line.partition("#")[0].partition(":")
        field = field.strip().lower()
        if field in ("user-agent", "useragent", "user agent"):
            group = {*(group if is_heading else ()), value.strip().lower()}
            is_heading = True
        elif colon:
            is_heading = is_heading and field == "sitemap"
            if field == "content-signal" and (not group or name in group) and forbids_training(value):
                return True
    return False


def _text(body: bytes) -> str:
    for mark, codec in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if body.startswith(mark):
            return body.decode(codec, "replace").replace(_NOBODY, "")
    return body.decode("utf-8", "replace").replace(_NOBODY, "")


async def _any(url: str) -> str:
    """A robots.txt may lie anywhere on the web (RFC 9309, 2.3.1.2); the guard of addresses and the rules of redirects hold for it, too."""
    return ""
