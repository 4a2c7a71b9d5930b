"""Which site is asked next, and when: one request in flight for each site and for each address, and a pause after it.

Sites that share an IP address share a slot. A slot is busy while a request of one of its sites is in flight and rests after it; among its sites the
one that was asked longest ago comes first. Times are seconds since 1970, because a pause outlives the process.
"""

from __future__ import annotations

import asyncio
import heapq
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from cllm.data.sources.frontier import Site
from cllm.data.sources.urls import authority

LONGEST_BACK_OFF = 600.0  # seconds
LONGEST_RETRY_AFTER = 6 * 3600.0  # a server that asks for more is asked again then
SHORTEST_BACK_OFF = 0.5


def pause_of(delay: float, key: bytes) -> float:
    """Seconds between a site's answer and its next request: `delay` and up to half of it more, which depends on nothing but the URL's key."""
    return delay * (1.0 + 0.5 * int.from_bytes(key[:4]) / 2**32)


def back_off(delay: float, failures: int, retry_after: float | None) -> float:
    """Seconds to leave a site alone after so many failures in a row. `retry_after`: what the server asks for."""
    doubled = max(delay, SHORTEST_BACK_OFF) * 2.0 ** min(failures, 20)
    return max(min(doubled, LONGEST_BACK_OFF), min(retry_after or 0.0, LONGEST_RETRY_AFTER))


@dataclass
class _Slot:
    ready_at: float = 0.0
    is_busy: bool = False
    queue: list[tuple[float, int]] = field(default_factory=list)  # a heap of (ready_at, number) of the sites that have work
    members: set[int] = field(default_factory=set)


class Schedule:
    """Sites that have something to fetch, by address."""

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._heap: list[tuple[float, str]] = []  # slots that are not busy; an outdated time is put right when it is reached
        self._sites: dict[int, Site] = {}
        self.in_flight = 0

    def push(self, site: Site) -> None:
        """A site has work."""
        slot = self._slots.setdefault(site.address, _Slot())
        if site.id not in slot.members:
            self._sites[site.id] = site
            slot.members.add(site.id)
            heapq.heappush(slot.queue, (site.ready_at, site.id))
            self._offer(site.address, slot)

    def rest(self, site: Site, until: float) -> None:
        """The address of a site is not to be asked before this time."""
        slot = self._slots.setdefault(site.address, _Slot())
        slot.ready_at = max(slot.ready_at, until)

    def _offer(self, address: str, slot: _Slot) -> None:
        if slot.queue and not slot.is_busy:
            heapq.heappush(self._heap, (max(slot.ready_at, slot.queue[0][0]), address))

    def pop(self, now: float) -> Site | None:
        """A site that may be asked now; its slot is busy until `done`."""
        while self._heap and self._heap[0][0] <= now:
            _, address = heapq.heappop(self._heap)
            slot = self._slots[address]
            if slot.is_busy or not slot.queue:
                continue
            if max(slot.ready_at, slot.queue[0][0]) > now:
                self._offer(address, slot)
                continue
            known, number = slot.queue[0]
            if self._sites[number].ready_at > known:  # it was put off after it had been queued
                heapq.heapreplace(slot.queue, (self._sites[number].ready_at, number))
                self._offer(address, slot)
                continue
            heapq.heappop(slot.queue)
            slot.members.discard(number)
            slot.is_busy = True
            self.in_flight += 1
            return self._sites.pop(number)
        return None

    def done(self, site: Site, until: float) -> None:
        """The request is over, and the next one of the slot comes not before `until`."""
        slot = self._slots[site.address]
        slot.is_busy, slot.ready_at = False, until
        self.in_flight -= 1
        self._offer(site.address, slot)

    def next_time(self) -> float | None:
        """When `pop` can have a site again, as far as is known; None where there is nothing to wait for."""
        return self._heap[0][0] if self._heap else None


class Turns:
    """One request in flight for each host, where more than the schedule asks: the scripts of pages load from any host."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, url: str) -> asyncio.Lock:
        """What is held while a clean address is asked for."""
        return self._locks.setdefault(authority(url), asyncio.Lock())
