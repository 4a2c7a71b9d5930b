"""Which work of a GPU happens before which: vector clocks of streams, and the races that they show.

A stream does its work in order; streams know nothing of each other until one waits for an event of the other, or the host, having waited for one,
gives work to the other. Two uses of the same memory, one of them a write, must be ordered so. Memory that is freed goes back to the stream that it
was made on, so what another stream still does with it must be known to the allocator (`record_stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from gpu_emulation.graphs import Record

Clock = dict[int, int]  # how far each stream had come, by its number


class RaceError(AssertionError):
    """Work that another stream may not have done yet."""


def _later(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


class Stream:
    """torch.cuda.Stream, as far as the order of work goes."""

    def __init__(self, order: Order, index: int, current: Callable[[Any], Stream]) -> None:
        self.device = torch.device("cuda", index)
        self.number = order.add(self)
        self.clock: Clock = {self.number: 0}
        self.cuda_stream = self.number
        self._order = order
        self._current = current

    def wait_stream(self, other: Stream) -> None:
        _later(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        _later(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event(self._order, self._current) if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class Event:
    """torch.cuda.Event, as far as the order of work goes."""

    def __init__(self, order: Order, current: Callable[[Any], Stream]) -> None:
        self.clock: Clock = {}
        self._current = current

    def record(self, stream: Stream | None = None) -> None:
        stream = self._current(None) if stream is None else stream
        self.clock = dict(stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (self._current(None) if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        return True


class _Memory:
    """The last uses of one piece of memory."""

    def __init__(self, storage: torch.UntypedStorage, home: Stream) -> None:
        self.alive = StorageWeakRef(storage)
        self.home = home  # the stream that the allocator gave it to
        self.written: tuple[int, int, str] | None = None  # stream, time, what wrote
        self.read: dict[int, tuple[int, str]] = {}  # by stream
        self.known: set[int] = {home.number}  # streams that the allocator waits for before it gives the memory away

    def uses(self) -> list[tuple[int, int, str]]:
        return [*([self.written] if self.written else []), *((stream, time, who) for stream, (time, who) in self.read.items())]


class Order:
    """The order of all work of a process on its GPUs. Raises RaceError where two uses of memory are not ordered."""

    current: Callable[[Any], Stream]

    def __init__(self) -> None:
        self._defaults: dict[int, Stream] = {}
        self._all: list[Stream] = []
        self._memory: dict[int, _Memory] = {}
        self._host: Clock = {}
        self.recording = False  # during a capture nothing is done

    def add(self, stream: Stream) -> int:
        self._all.append(stream)
        return len(self._all)

    def default(self, index: int) -> Stream:
        if index not in self._defaults:
            self._defaults[index] = Stream(self, index, lambda device: self.current(device))
        return self._defaults[index]

    def streams(self, index: int) -> list[Stream]:
        return [each for each in self._all if each.device.index == index]

    def host_waits_for(self, streams: Sequence[Stream | Event]) -> None:
        """The host knows that everything that it gave to these streams is done."""
        for stream in streams:
            _later(self._host, stream.clock)

    def host_writes(self, who: str, tensor: torch.Tensor) -> None:
        """The host changes pinned memory, which copies that are on their way may still read or write."""
        memory = self._memory.get(tensor.untyped_storage().data_ptr())
        for stream, time, what in memory.uses() if memory is not None and not memory.alive.expired() else ():
            if self._host.get(stream, 0) < time:
                raise RaceError(f"{who} of the host does not wait for {what} on stream {stream}, which uses the same memory")

    def used_by(self, tensor: torch.Tensor, stream: Stream) -> None:
        """record_stream"""
        memory = self._memory.get(tensor.untyped_storage().data_ptr())
        if memory is not None:
            memory.known.add(stream.number)

    def operator(self, who: str, device: torch.device, tensors: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> None:
        """Work on the current stream of `device` with some tensors, of which `written` are known to be written; one that it made is among them."""
        if not self.recording:
            self._use(
                who, self.current(device), [each.untyped_storage() for each in tensors], {each.untyped_storage().data_ptr() for each in written}
            )

    def replay(self, record: Record, stream: Stream) -> None:
        """The work of a graph."""
        for call in record.calls:
            self._use(f"{call.name} of a graph", stream, [place.tensor().untyped_storage() for place in call.places()], call.writes)

    def _use(self, who: str, stream: Stream, storages: Sequence[torch.UntypedStorage], writes: Set[int]) -> None:
        _later(stream.clock, self._host)
        stream.clock[stream.number] += 1
        now = stream.clock[stream.number]
        for storage in {each.data_ptr(): each for each in storages if each.data_ptr()}.values():
            at = storage.data_ptr()
            memory = self._memory.get(at)
            if memory is None or memory.alive.expired():
                if memory is not None:
                    self._check_freed(who, stream, memory)
                memory = self._memory[at] = _Memory(storage, stream)
            for other, time, what in memory.uses() if at in writes else [memory.written] if memory.written else []:
                if stream.clock.get(other, 0) < time:
                    raise RaceError(f"{who} on stream {stream.number} does not wait for {what} on stream {other}, which uses the same memory")
            if at in writes:
                memory.written, memory.read = (stream.number, now, who), {}
            else:
                memory.read[stream.number] = now, who

    def _check_freed(self, who: str, stream: Stream, memory: _Memory) -> None:
        """Memory that was freed and is given out again: to the stream it belongs to, which must know of every use by others."""
        home = memory.home
        for other, time, what in memory.uses():
            if other not in memory.known and home.clock.get(other, 0) < time and self._host.get(other, 0) < time:
                raise RaceError(f"memory that {what} on stream {other} still uses was freed to stream {home.number}")
