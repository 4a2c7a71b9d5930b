"""Which of the URLs that a crawl comes across are queued, and in which order they will come."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cllm.data.sources import urls
from cllm.data.sources.frontier import PAGE, Frontier, Site
from cllm.data.sources.scope import Patterns, Scope, trap
from cllm.data.sources.settings import Settings
from cllm.data.sources.traps import prefix_name, surplus

OFF_SCOPE = "outside of --scope"


@lru_cache(1 << 16)
def key_of(url: str) -> bytes:
    """16 bytes that are equal for the spellings of one page."""
    return hashlib.blake2b(urls.key(url).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Discovery:
    """Queues what is found. Raises UserError for settings that cannot be followed."""

    def __init__(self, frontier: Frontier, settings: Settings) -> None:
        self._frontier, self._depth = frontier, settings.depth
        self._scope = Scope(settings.scope, settings.seeds)
        self._patterns = Patterns(settings.allow, settings.deny)

    def add_seed(self, url: str) -> None:
        """A page that is in scope from now on with what belongs to it."""
        self._scope.add(url)

    def found(self, url: str, *, depth: int, hops: int = 0, kind: int = PAGE, first: bool = False) -> Site | None:
        """Queues a clean URL where it is new and wanted, and counts it otherwise. `first`: no rule but scope holds it up.

        Returns the site that has more to do now.
        """
        key = key_of(url)
        if self._frontier.is_known(key):
            return self._frontier.not_so_deep(key, depth) if depth <= self._depth else None
        reason = self._refusal(url, first)
        if reason:
            self._frontier.skip(key, reason)
            return None
        site = self._frontier.site(urls.origin(url))
        prefix = self._frontier.prefix(site, prefix_name(url))
        if site.closed or prefix.closed:
            self._frontier.skip(key, site.closed or prefix.closed)
            return None
        if depth > self._depth and not first:
            self._frontier.leave_out(url, key, site, prefix, kind=kind, depth=depth, hops=hops)
            return None
        wait = 0 if first or kind != PAGE else surplus(prefix.found)
        rank = -8 + kind if kind != PAGE else 8 * (depth + wait) + ("?" in url)
        self._frontier.add(url, key, site, prefix, kind=kind, depth=depth, hops=hops, rank=rank)
        return site

    def _refusal(self, url: str, first: bool) -> str:
        if not self._scope.covers(url):
            return OFF_SCOPE
        if first:
            return ""
        return self._patterns.refusal(url) or trap(url)
