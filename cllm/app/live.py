"""What happens, as a stream of events for every page: one reader of each file, however many pages look.

A topic has a source, which is asked for news while somebody listens and for a while afterwards. Its events get numbers and go into one list of the
newest. A page is only a place in that list: it is sent what has come since, and where it was away, or is slow, it goes on where it was. What was
dropped meanwhile is made good by a `reset`, which tells the page to fetch everything of that topic again. No page has a queue of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cllm.app.exchange import one_line
from cllm.serve.errors import Refused

Event = dict[str, Any]
Source = Callable[[], Iterable[Event]]
"""Returns what is new since it was last asked: objects with a "kind"."""

PERIOD = 0.25  # seconds between two looks: at most four events a second of a topic
PING = 15.0  # seconds without an event after which a comment keeps the connection open
LINGER = 120.0  # seconds for which a topic goes on without anybody: a page that was reloaded, or a laptop that slept for a moment, misses nothing
MOST_KEPT = 4_000  # events
MOST_BYTES = 8 << 20  # of all that are kept
MOST_TOPICS = 64  # of one page
MOST_PAGES = 256
_MOST_PAST = 10_000  # names of topics that are remembered
_WHOLE = frozenset({"jobs", "runs", "crawl", "talk", "plan"})  # each event says everything, so that an older one need not be sent any more


@dataclass(frozen=True)
class _Entry:
    number: int
    topic: str
    kind: str
    data: str


@dataclass
class _Topic:
    source: Source
    opened: int  # a number that no event has: those before are of an earlier source of this topic
    is_first: bool  # no page can have missed anything of an earlier one
    listeners: int = 0
    left: float = 0.0  # when the last page left


class Live:
    """kinds: what stands before the colon of a topic ("run" of "run:runs/demo"), with a function from what stands after it to a source; it raises
    Refused for what there is not."""

    def __init__(self, log: Callable[..., None]) -> None:
        self.epoch = secrets.token_hex(4)  # numbers of another start of the app mean other events
        self._log = log
        self._kinds: dict[str, Callable[[str], Source]] = {}
        self._topics: dict[str, _Topic] = {}
        self._entries: deque[_Entry] = deque()
        self._bytes, self._number = 0, 0
        self._dropped: dict[str, int] = {}  # the number of the last event of a topic that is not kept any more
        self._past: set[str] = set()  # topics that had a source before
        self._lock = threading.RLock()
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._pages = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cllm-live", daemon=True)
        self._thread.start()

    def register(self, kind: str, source_of: Callable[[str], Source]) -> None:
        """Topics of this kind come from here on from such sources."""
        self._kinds[kind] = source_of

    def watch(self, kind: str, state: Callable[[], Any], seconds: float = 1.0) -> None:
        """A topic without a name that has an event {} whenever `state()` is another one than before; it is asked every so many seconds."""
        self.register(kind, lambda name: changes(state, seconds, lambda now: {"kind": kind}))

    def check(self, topics: list[str]) -> None:
        """Raises Refused for topics that there are not, and for more pages than there may be."""
        if self._pages >= MOST_PAGES:
            raise Refused(429, "too many pages are open. Close some.", code="rate_limit_exceeded")
        if not topics or len(topics) > MOST_TOPICS:
            raise Refused(400, f"topics must name 1 to {MOST_TOPICS} topics, as in jobs,run:runs/demo.", param="topics", code="invalid_value")
        with self._lock:
            for each in topics:
                if each not in self._topics:
                    self._source_of(each)

    async def listen(self, topics: list[str], last: str | None) -> AsyncIterator[bytes]:
        """The events of some topics, which `check` has passed, as lines of text/event-stream, after the one whose id is `last`."""
        woken = asyncio.Event()
        with self._lock:
            self._pages += 1
            since = self._since(last)
            missed = [each for each in topics if self._open(each, since)]
            place = self._number if since is None else since
            self._waiting[woken] = asyncio.get_running_loop()
        try:
            yield b"retry: 1000\n\n"
            for each in missed:
                yield self._line(place, one_line({"topic": each, "kind": "reset"}))
            while not self._is_over.is_set():
                with self._lock:
                    woken.clear()
                    lines, place = self._after(place, topics)
                if lines:
                    yield b"".join(lines)
                    continue
                try:
                    await asyncio.wait_for(woken.wait(), PING)
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            with self._lock:
                self._pages -= 1
                self._waiting.pop(woken, None)
                for each in topics:
                    topic = self._topics.get(each)
                    if topic is not None:
                        topic.listeners -= 1
                        topic.left = time.monotonic()

    def close(self) -> None:
        """Ends all streams."""
        self._is_over.set()
        self._wake_all()
        self._thread.join(5)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def _since(self, last: str | None) -> int | None:
        """The number of the event that a page has seen last: None for a new page, -1 where it is of another start of the app."""
        if not last:
            return None
        epoch, _, number = last.partition("-")
        is_ours = epoch == self.epoch and number.isascii() and number.isdigit() and len(number) < 16
        return int(number) if is_ours and int(number) <= self._number else -1

    def _open(self, name: str, since: int | None) -> bool:
        """Begins to listen to a topic; whether a page that has seen all until `since` has missed some of it."""
        topic = self._topics.get(name)
        if topic is None:
            self._number += 1
            topic = self._topics[name] = _Topic(self._source_of(name), self._number, name not in self._past and len(self._past) < _MOST_PAST)
            self._past |= {name} if topic.is_first else set()
        topic.listeners += 1
        if since is None or since < 0:
            return since is not None
        return (since < topic.opened and not topic.is_first) or since < self._dropped.get(name, 0)

    def _source_of(self, name: str) -> Source:
        kind, _, rest = name.partition(":")
        make = self._kinds.get(kind)
        if make is None:
            raise Refused(400, f"there is no topic {name[:100]!r}. There are: {', '.join(self._kinds)}.", param="topics", code="unknown_topic")
        return make(rest)

    def _after(self, place: int, topics: list[str]) -> tuple[list[bytes], int]:
        """What a page at `place` gets next, and where it is then."""
        lines: list[bytes] = []
        lost = [topic for topic in topics if place < self._dropped.get(topic, 0)]
        wanted = frozenset(topics)
        new = [each for each in _newer(self._entries, place) if each.topic in wanted]
        newest = {each.topic: each.number for each in new if each.kind in _WHOLE}
        size = 0
        for topic in lost:  # everything of it is fetched again, what is kept of it included
            lines.append(self._line(self._number, one_line({"topic": topic, "kind": "reset"})))
        for each in new:
            if each.topic in lost or newest.get(each.topic, each.number) != each.number:
                continue
            lines.append(self._line(each.number, each.data))
            size += len(each.data)
            if size > 1 << 20 and not lost:  # the rest next time: what is in the connection already cannot be taken back
                return lines, each.number
        return lines, self._number

    def _line(self, number: int, data: str) -> bytes:
        return f"id: {self.epoch}-{number}\ndata: {data}\n\n".encode()

    # -- the thread that reads -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over.wait(PERIOD):
            with self._lock:
                now = time.monotonic()
                for name, topic in list(self._topics.items()):
                    if topic.listeners <= 0 and now - topic.left > LINGER:
                        del self._topics[name]
                open_now = list(self._topics.items())
            found = [(name, event) for name, topic in open_now for event in self._ask(name, topic.source)]
            if found:
                with self._lock:
                    for name, event in found:
                        self._add(name, event)
                self._wake_all()

    def _ask(self, name: str, source: Source) -> list[Event]:
        try:
            return list(source())
        except Exception as error:  # one file that cannot be read does not keep the others from being read
            self._log("live", "error", topic=name[:200], message=f"{type(error).__name__}: {str(error)[:300]}")
            return []

    def _add(self, topic: str, event: Event) -> None:
        self._number += 1
        entry = _Entry(self._number, topic, str(event.get("kind", "")), one_line({"topic": topic, **event}))
        self._entries.append(entry)
        self._bytes += len(entry.data)
        while len(self._entries) > MOST_KEPT or self._bytes > MOST_BYTES:
            gone = self._entries.popleft()
            self._bytes -= len(gone.data)
            self._dropped[gone.topic] = gone.number
        if len(self._dropped) > 10 * MOST_KEPT:  # names of topics that nobody will ask for again
            self._dropped = {name: number for name, number in self._dropped.items() if name in self._topics}

    def _wake_all(self) -> None:
        with self._lock:
            waiting = list(self._waiting.items())
        for event, loop in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)


def changes(state: Callable[[], Any], seconds: float, event: Callable[[Any], Event]) -> Source:
    """A source that has an event whenever `state()`, asked every so many seconds, is another one than before. The first one is none."""
    before = [state()]
    due = [time.monotonic() + seconds]

    def look() -> list[Event]:
        if time.monotonic() < due[0]:
            return []
        due[0] = time.monotonic() + seconds
        now = state()
        if now == before[0]:
            return []
        before[0] = now
        return [event(now)]

    return look


def _newer(entries: deque[_Entry], place: int) -> list[_Entry]:
    """The entries after a place; from the end, because that is where a page nearly always is."""
    found = []
    for each in reversed(entries):
        if each.number <= place:
            break
        found.append(each)
    return found[::-1]
