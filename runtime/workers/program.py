"""Work on a CPU that is recorded while it runs and replayed later, with no Python between its kernels.

    with record(most_bytes) as recorder:
        loss = model.loss(tokens, targets)      # runs as it would run anyway
        recorder.part("backward")
        loss.backward()
    program = recorder.program()
    program.run("forward")                      # the same on what `tokens`, `targets` and the weights hold now

What is recorded are the launches of our kernels with their tables of arguments, and what torch computes between them, in order. All that is made
on the way lies in an arena (`arena.py`), and what the work was given stays where it is as long as the program lives. `Recorder.reason` says why some
work cannot be replayed: it reads a value on the host, changes what was there before, draws random numbers, needs too much memory, or has an address
in its arguments of which nobody knows to whom it belongs.
"""

from __future__ import annotations

import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from functools import partial
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cllm.runtime import profiler
from cllm.runtime import workers as room
from cllm.runtime.workers import Launch, run, table_of
from cllm.runtime.workers.arena import Arena
from cllm.runtime.workers.loop import FIELDS

FIRST = "forward"  # the part that a recording begins with
# No number in a table of arguments but an address is as large: sizes and distances stay below, and what is ignored is negative.
SMALLEST_ADDRESS = 1 << 32

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default, _aten.new_empty_strided.default}
_FILLED = {
    _aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default, _aten.ones.default, _aten.ones_like.default, _aten.new_ones.default,
    _aten.full.default, _aten.full_like.default, _aten.new_full.default, _aten.scalar_tensor.default,
}  # fmt: skip
_RANGES = {_aten.arange.default, _aten.arange.start, _aten.arange.start_step}
_COPIES = {_aten.clone.default, _aten._to_copy.default}
# Operations that can write where they are told. All others make a tensor, which is then copied.
_INTO = {
    _aten.add.Tensor: _aten.add.out,
    _aten.sub.Tensor: _aten.sub.out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.div.Tensor: _aten.div.out,
    _aten.cat.default: _aten.cat.out,
    _aten.stack.default: _aten.stack.out,
    _aten.sum.default: _aten.sum.out,
    _aten.sum.dim_IntList: _aten.sum.IntList_out,
}
TRANSLATED: dict[Any, Callable[..., bool]] = {}
"""Operations of torch, and what does the same by launches of ours: f(out, *args, **kwargs), False where it does not serve."""

_REFUSED_TAGS = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Item(NamedTuple):
    """A part of the work: launches, or what torch computes."""

    launches: tuple[Launch, ...]
    operation: Callable[[], object] | None
    name: str
    part: str
    at: int  # nanoseconds, when it was recorded


class Call(NamedTuple):
    """A kernel's entry point as the profiler saw it, or None for what is outside of kernels, and its items."""

    event: profiler.Event | None
    items: list[_Item]


class Recorder(TorchDispatchMode):
    """Listens to one thread; `record` makes one."""

    def __init__(self, most_bytes: int, numbers: Mapping[str, float], longest: int) -> None:
        super().__init__()
        self.longest = longest
        self._numbers = dict(numbers)
        self._followed: dict[tuple[object, ...], tuple[np.ndarray, ...]] = {}
        self.arena = Arena(most_bytes)
        self.reason: str | None = None
        """Why the work cannot be replayed, as a part of a sentence."""
        self._part = FIRST
        self._items: list[_Item] = []
        self._kept: list[object] = []
        self._known: dict[int, int] = {}  # where memory that the program keeps begins and ends
        self._addresses: set[int] = set()  # that stand in arguments
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}  # what is the same in every replay, by where its memory begins, and a copy of it
        self._calls: profiler.Recording | None = None

    # -- what is recorded -----------------------------------------------------------------------------------------------------

    def part(self, name: str) -> None:
        """What follows belongs to another part of the program."""
        self._part = name

    def launches(self, table: int, count: int, workers: int, held: object) -> None:
        words = (c_int64 * (FIELDS * count)).from_address(table)
        listed = [Launch(*words[i * FIELDS : (i + 1) * FIELDS]) for i in range(count)]
        self._items.append(
            self._item(tuple(each._replace(workers=min(each.workers, workers)) for each in listed if each.tasks > 0 or each.counted), None, "")
        )
        arrays = held if isinstance(held, tuple) else ()
        self.hold(*arrays)
        numbers = [np.frombuffer(each, np.int64) for each in arrays if _is_integers(each)]
        for each in listed:
            if not any(_begin(each_array) <= each.ints < _end(each_array) for each_array in arrays):
                self._refuse("a launch does not say where its arguments lie")
        self._addresses.update(*(each[each >= SMALLEST_ADDRESS].tolist() for each in numbers))
        self._addresses.update(each.counted for each in listed if each.counted)

    def hold(self, *held: object) -> None:
        for each in held:
            self._kept.append(each)
            if isinstance(each, Tensor):
                if not self.arena.holds(each) and each.numel():
                    storage = each.untyped_storage()
                    self._know(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
            else:
                self._know(_begin(each), _end(each))

    def followed(self, key: tuple[object, ...], make: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
        """Arrays that every replay fills anew with what `make` returns then, from inputs of the work; one set for each key."""
        if not self.longest:
            self._refuse("it looks at the bounds of documents")
        if key not in self._followed:
            arrays = self._followed[key] = tuple(each.copy() for each in make())
            self.hold(*arrays)

            def again() -> None:
                for array, new in zip(arrays, make(), strict=True):
                    array[...] = new

            self._items.append(self._item((), again, str(key[0])))
        return self._followed[key]

    def _know(self, begin: int, end: int) -> None:
        self._known[begin] = max(end, self._known.get(begin, end))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would load its compiler for a mode, a second of time, only to keep it out."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.reason is not None:
            return func(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self.hold(*(each for each in tensors if not each.is_meta and each.device.type == "cpu" and not self.arena.holds(each)))
        made_of = getattr(func, "made_of", None)
        if made_of is not None:  # an operator of ours: the launches and the operations in it are what is recorded
            with self:
                return made_of(*args, **kwargs)
        if func._can_decompose():  # such as `to`, which may or may not make a copy: what it is made of tells
            with self:
                return func.decompose(*args, **kwargs)
        if any(each.is_meta for each in tensors) or str(kwargs.get("device")) == "meta":
            return func(*args, **kwargs)
        if any(each.device.type != "cpu" for each in tensors) or not _REFUSED_TAGS.isdisjoint(func.tags):
            return self._dependent(func, args, kwargs, tensors)
        if func in _EMPTY:
            return self._new(func(*args, **{**kwargs, "device": "meta"}))
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        result = func(*args, **kwargs)
        if not all(isinstance(each, Tensor) for each in tree_leaves(result)):
            self._refuse(f"{func} is computed on the host")
            return result
        return self._computed(func, args, kwargs, tensors, result)

    def _dependent(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """An operation whose result depends on values, or whose tensors lie elsewhere."""
        if func is not _aten._local_scalar_dense.default or not self._is_constant(tensors[0]):
            self._refuse(f"{func} depends on values or on chance")
        return func(*args, **kwargs)

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        named = [(each, kwargs[each.name]) for each in func._schema.arguments if each.name in kwargs]
        written = [
            tensor
            for argument, value in (*zip(func._schema.arguments, args), *named)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value)
        ]
        if not all(isinstance(each, Tensor) and (not each.numel() or self.arena.holds(each)) for each in written):
            self._refuse(f"{func} changes what was there before")
        else:
            self._record(func, partial(func, *self._twins(args), **self._twins(kwargs)))
        return func(*args, **kwargs)

    def _computed(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Any) -> Any:
        """An operation that made new tensors, or views of old ones."""
        made = tree_leaves(result)
        places = {each.untyped_storage().data_ptr() for each in tensors}
        if any(each.untyped_storage().data_ptr() in places for each in made if each.numel()):
            return result
        if self._makes_constant(func, args, tensors, made):  # not in the arena, where every replay writes to what the recording had used before
            self.hold(*made)
            self._constants.update({each.untyped_storage().data_ptr(): (each, each.clone()) for each in made if each.numel()})
            return result
        homes = {id(each): self._new(each) for each in made}
        full = [(each, homes[id(each)]) for each in made if each.numel()]
        translated = TRANSLATED.get(func)
        if self.reason is not None or not full:
            pass
        elif translated is not None and translated(full[0][1], *args, **kwargs):
            if not torch.equal(*(each.reshape(-1).view(torch.uint8) for each in full[0])):
                self._refuse(f"{func} gives other bits by our kernels")
        else:
            self._record(func, self._again(func, args, kwargs, [self.arena.twin(home) for _, home in full], made))
        for each, home in full:
            home.copy_(each)
        return tree_map_only(Tensor, lambda each: homes[id(each)], result)

    def _is_constant(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._constants

    def _makes_constant(self, func: Any, args: Any, tensors: list[Tensor], made: list[Tensor]) -> bool:
        """Whether the result is the same in every replay and nobody writes to it, which `Program.holds` checks: numbers in a row and what is computed
        from them, and single numbers such as the gradient that a backward begins with."""
        if func in _FILLED:
            return made[0].dim() == 0 and self._number(func, args) is None
        return all(map(self._is_constant, tensors)) and (bool(tensors) or func in _RANGES)

    def _number(self, func: Any, args: Any) -> str | None:
        """The name of the number that a tensor is filled with, where it is one that differs from replay to replay."""
        return next((each for each, number in self._numbers.items() if func is _aten.full.default and args[1] == number), None)

    def _again(self, func: Any, args: Any, kwargs: Any, out: list[Tensor], made: list[Tensor]) -> Callable[[], object]:
        """What computes the same into `out`."""
        if func in _FILLED:
            value, name = made[0].flatten()[0].item(), self._number(func, args)
            if name is not None:
                return partial(_fill, out[0], self._numbers, name)
            return out[0].zero_ if value == 0 and str(value) != "-0.0" else partial(out[0].fill_, value)
        inputs, options = self._twins(args), self._twins(kwargs)
        if func in _COPIES:
            return partial(out[0].copy_, inputs[0])
        if func in _INTO:
            return partial(_INTO[func], *inputs, **options, out=out[0])

        def again() -> None:
            found = [each for each in tree_leaves(func(*inputs, **options)) if each.numel()]
            for place, each in zip(out, found, strict=True):
                place.copy_(each)

        return again

    def _new(self, like: Tensor) -> Tensor:
        """Memory for a tensor of this shape and layout."""
        if not like.numel():
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        found = self.arena.tensor(like.shape, like.stride(), like.dtype)
        if found is None:
            self._refuse("it needs too much memory")
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return found

    def _twins(self, arguments: Any) -> Any:
        return tree_map_only(Tensor, lambda each: self.arena.twin(each) if self.arena.holds(each) else each.detach(), arguments)

    def _record(self, func: Any, again: Callable[[], object]) -> None:
        self._items.append(self._item((), again, str(func)))

    def _item(self, launches: tuple[Launch, ...], operation: Callable[[], object] | None, name: str) -> _Item:
        return _Item(launches, operation, name, self._part, time.perf_counter_ns())

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    # -- what becomes of it ---------------------------------------------------------------------------------------------------

    def program(self) -> Program | None:
        """What replays the work, after the recording has ended; None where that cannot be done, for `reason`."""
        self._check_addresses()
        if self.reason is not None:
            return None
        return Program(self._items, self._events(), self._numbers, list(self._constants.values()), self.arena, self._kept)

    def _check_addresses(self) -> None:
        """An address that lies in nothing that is kept would be one of memory that is somebody else's at the next replay."""
        self._known[self.arena.begin] = self.arena.end
        begins = sorted(self._known)
        reached = list(accumulate((self._known[each] for each in begins), max))  # how far memory reaches that begins here or before
        for address in self._addresses - room._lasting:
            place = bisect_right(begins, address) - 1
            if place < 0 or address > reached[place]:
                self._refuse("an argument is an address that nobody has made known")

    def _events(self) -> list[profiler.Event]:
        mine = threading.current_thread().native_id or 0  # as the profiler sees it, in a forked process too
        return [] if self._calls is None else [each for each in self._calls.kernels() if each.thread == mine]


def _fill(place: Tensor, numbers: dict[str, float], name: str) -> None:
    place.fill_(numbers[name])


def _is_integers(held: object) -> bool:
    return held.typecode == "q" if isinstance(held, array) else isinstance(held, np.ndarray) and held.dtype == np.int64


def _begin(held: Any) -> int:
    return int(held.buffer_info()[0] if isinstance(held, array) else held.ctypes.data)


def _end(held: Any) -> int:
    return _begin(held) + (held.itemsize * len(held) if isinstance(held, array) else held.nbytes)


class Program:
    """Recorded work. `run` replays one of its parts; whoever uses it from several threads lets one after the other do so."""

    def __init__(
        self, items: list[_Item], events: list[profiler.Event], numbers: dict[str, float], constants: list[tuple[Tensor, Tensor]], arena: Arena,
        kept: list[object],
    ) -> None:  # fmt: skip
        self._kept, self._constants = (arena, kept), constants
        self.numbers = numbers
        """What the next replay fills tensors with."""
        self.bytes = arena.peak
        """Of memory that it has to itself."""
        self.calls = {part: _calls(list(found), events) for part, found in groupby(items, lambda each: each.part)}
        """For each part, what it does, in order."""
        self._parts = {part: _joined(item for call in calls for item in call.items) for part, calls in self.calls.items()}

    def holds(self) -> bool:
        """Whether what was taken for constant is what it was. To be asked after a replay."""
        return all(torch.equal(*each) for each in self._constants)

    def run(self, part: str) -> None:
        recording = profiler.recording
        if recording is not None:
            self._run_watched(part, recording)
            return
        for each in self._parts.get(part, ()):
            each()

    def kernel_seconds(self) -> float:
        """Replays all parts; the seconds that their launches took, without what torch computes between them."""
        taken = 0.0
        for each in chain.from_iterable(self._parts.values()):
            began = time.perf_counter()
            each()
            taken += time.perf_counter() - began if isinstance(each, _Walk) else 0.0
        return taken

    def _run_watched(self, part: str, recording: profiler.Recording) -> None:
        """Call by call, each of which the profiler gets to see."""
        for event, items in self.calls.get(part, ()):
            steps = _joined(items)
            start = time.perf_counter_ns()
            for each in steps:
                each()
            if event is not None:
                about = {name: getattr(event, name) for name in ("operation", "function", "backend", "operands", "workers")}
                recording.add(event.name, start, time.perf_counter_ns(), **about)


def _calls(items: list[_Item], events: list[profiler.Event]) -> list[Call]:
    """The items of each kernel's call, by the times at which they were recorded."""

    def number(item: _Item) -> int:
        inside = [place for place, each in enumerate(events) if each.start_ns <= item.at <= each.end_ns]
        return min(inside, key=lambda place: events[place].end_ns - events[place].start_ns, default=-1)

    return [Call(events[place] if place >= 0 else None, list(found)) for place, found in groupby(items, number)]


def _joined(items: Iterable[_Item]) -> list[Callable[[], object]]:
    """Launches that follow each other become one list, which one compiled call walks through."""
    steps: list[Callable[[], object]] = []
    for by_torch, found in groupby(items, lambda each: each.operation is not None):
        if by_torch:
            steps += [each.operation for each in found if each.operation is not None]
        else:
            listed = [launch for each in found for launch in each.launches]
            steps.append(_Walk(listed))
    return steps


class _Walk:
    """Launches, one after the other, as one compiled call."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._table = table_of(launches)
        self._given = self._table.buffer_info()[0], len(launches), max((each.workers for each in launches), default=1)

    def __call__(self) -> None:
        run(*self._given)


@contextmanager
def record(most_bytes: int, numbers: Mapping[str, float] | None = None, longest: int = 0) -> Iterator[Recorder]:
    """Records what this thread does inside. The profiler must not be at work, and nobody else may record in this thread.

    numbers: what differs from replay to replay, by name: where `torch.full` fills a tensor with one of these, a replay takes `Program.numbers`.
    longest: the most tokens that a document has in any replay, for work whose bounds of documents differ.
    """
    recorder, thread = Recorder(most_bytes, numbers or {}, longest), threading.get_ident()
    assert thread not in room.recorders, "this thread is recorded already"
    with profiler.record() as recorder._calls:
        room.recorders[thread] = recorder
        try:
            with recorder:
                yield recorder
        finally:
            del room.recorders[thread]
