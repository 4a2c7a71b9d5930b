"""Named ranges around kernels and training stages, for Perfetto (ui.perfetto.dev) and for a table of where the time went.

    with profiler.record() as recording:
        step(tokens, targets)
    recording.save("trace.json")

Every call of a backend's kernel is recorded by the one place that hands kernels out, `kernels/_register.py`: its name, start, end, thread and the
shapes it got. `with profiler.span("evaluate"): ...` adds a range of one's own. While nothing records, a kernel costs one `is None` more.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from cllm.runtime import files
from cllm.runtime.errors import UserError


class Operand(NamedTuple):
    """What is kept of a tensor; keeping the tensor itself would change the memory that is being watched."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def numel(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass
class Event:
    """One range. `operation` and `function` name a kernel's entry point and are empty for a stage; flops and bytes may be filled in later."""

    name: str
    start_ns: int
    end_ns: int
    thread: int
    operation: str = ""
    function: str = ""
    backend: str = ""
    operands: tuple[Any, ...] = ()
    workers: int = 1
    """The most threads that a numba kernel in it ran on; other backends do not tell, and have 1."""
    flops: float | None = None
    bytes: float | None = None

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def to_trace(self, origin_ns: int, thread: int) -> dict[str, Any]:
        """Chrome's trace-event format: a complete event, times in microseconds."""
        about: dict[str, Any] = {}
        shapes = ["x".join(map(str, each.shape)) for each in self.operands if isinstance(each, Operand)]
        if shapes:
            about["shapes"] = ", ".join(shapes)
        if self.backend:
            about["backend"] = self.backend
            if self.workers > 1:
                about["workers"] = self.workers
        for unit, amount in (("FLOP", self.flops), ("bytes", self.bytes)):
            if amount is not None:
                about[unit] = amount
                if self.seconds > 0:
                    about[f"G{unit}/s"] = round(amount / self.seconds / 1e9, 2)
        return {
            "name": self.name,
            "cat": "kernel" if self.operation else "stage",
            "ph": "X",
            "ts": (self.start_ns - origin_ns) / 1e3,
            "dur": (self.end_ns - self.start_ns) / 1e3,
            "pid": os.getpid(),
            "tid": thread,
            "args": about,
        }


def kernel_name(operation: str, function: str) -> str:
    """attention, backward -> "attention backward"; rms_norm, rms_norm_backward likewise; matmul, matmul and rotary, apply -> the operation."""
    rest = function.removeprefix(operation).strip("_").replace("_", " ")
    return operation if rest in ("", "apply", "step") else f"{operation} {rest}"


def _operand(value: Any) -> Any:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return Operand(tuple(value.shape), value.dtype.itemsize)
    if isinstance(value, list | tuple):
        return tuple(map(_operand, value))
    return value if isinstance(value, bool | int | float | str | None) else str(value)


@dataclass
class Recording:
    """The ranges of one `record()`, in the order in which they ended."""

    events: list[Event] = field(default_factory=list)
    threads: dict[int, str] = field(default_factory=dict)
    _watched: dict[tuple[str, str], "_Watched"] = field(default_factory=dict, repr=False)
    _running: threading.local = field(default_factory=threading.local, repr=False)

    def add(self, name: str, start_ns: int, end_ns: int, **about: Any) -> Event:
        """A range whose times (of `time.perf_counter_ns`) the caller took, in the calling thread."""
        thread = threading.current_thread()
        self.threads.setdefault(thread.native_id or 0, thread.name)
        event = Event(name, start_ns, end_ns, thread.native_id or 0, **about)
        self.events.append(event)
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, start, time.perf_counter_ns())

    def launched(self, workers: int) -> None:
        """Tells that the calling thread starts a kernel on so many workers."""
        self._running.workers = max(workers, getattr(self._running, "workers", 1))

    def watch(self, operation: str, module: ModuleType) -> Any:
        """Stands in for a backend's module and records each call of one of its functions."""
        key = operation, module.__name__
        if key not in self._watched:
            self._watched[key] = _Watched(self, operation, module)
        return self._watched[key]

    def kernels(self) -> list[Event]:
        return [event for event in self.events if event.operation]

    def to_trace(self, about: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole recording in Chrome's trace-event format; `about` is kept beside it."""
        origin = min((event.start_ns for event in self.events), default=0)
        numbers = {thread: number for number, thread in enumerate(sorted(self.threads))}
        names: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": os.getpid(), "args": {"name": "cllm"}}]
        for thread, name in self.threads.items():
            names.append({"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": numbers[thread], "args": {"name": name}})
        # Outer ranges first: viewers nest by order where two begin in the same microsecond.
        ordered = sorted(self.events, key=lambda event: (event.start_ns, -event.end_ns))
        events = [event.to_trace(origin, numbers[event.thread]) for event in ordered]
        return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": about or {}}

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> Path:
        """Writes the file that ui.perfetto.dev and chrome://tracing open."""
        path = Path(path)
        files.write_file(path, (json.dumps(self.to_trace(about), default=str) + "\n").encode())
        return path


class _Watched:
    def __init__(self, recording: Recording, operation: str, module: ModuleType) -> None:
        self._recording, self._operation, self._module = recording, operation, module
        self._backend = module.__name__.rpartition(".")[0].rpartition(".")[2]  # cllm.kernels.numba.attention: "numba"

    def __getattr__(self, function: str) -> Any:
        target = getattr(self._module, function)
        if not callable(target) or isinstance(target, type):
            return target
        name = kernel_name(self._operation, function)

        def call(*args: Any, **kwargs: Any) -> Any:
            about = {
                "operation": self._operation,
                "function": function,
                "backend": self._backend,
                "operands": tuple(map(_operand, (*args, *kwargs.values()))),
            }
            running = self._recording._running
            running.workers = 1
            start = time.perf_counter_ns()
            try:
                return target(*args, **kwargs)
            finally:
                self._recording.add(name, start, time.perf_counter_ns(), workers=running.workers, **about)

        vars(self)[function] = call  # found without __getattr__ from now on
        return call


recording: Recording | None = None
"""What records now. Of the whole process and not of one context: the backward pass may run in threads of its own."""


@contextmanager
def record() -> Iterator[Recording]:
    """Records all kernels and spans of the process while the scope is open. Raises UserError inside another recording."""
    global recording
    if recording is not None:
        raise UserError("a recording is already running, and there is one for the whole process. End it first, or use profiler.span in it.")
    recording = mine = Recording()
    try:
        yield mine
    finally:
        recording = None


def span(name: str) -> AbstractContextManager[None]:
    """A named range around a stage; nothing while nothing records."""
    return nullcontext() if recording is None else recording.span(name)
