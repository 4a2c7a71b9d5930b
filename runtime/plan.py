"""Which backend an operation gets and how many workers: the only place that decides.

The kernels register what they have: an operation, with how much work it is on given shapes, and the backends that serve it, each with a priority
on a type of device and `can_serve(shapes, dtype, device) -> (bool, reason)`. The plan takes the highest priority that can serve, or the backend
asked for by name; a backend asked for that cannot serve is an error, never replaced in silence.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from cllm.runtime import choice
from cllm.runtime import threads as _threads
from cllm.runtime.device import usable_cores
from cllm.runtime.errors import BackendError, UserError

Shapes = tuple[tuple[int, ...], ...]
CanServe = Callable[[Shapes, str, str], tuple[bool, str]]
Work = Callable[..., float]
Workers = Callable[[Shapes, str, int, Mapping[str, Any]], tuple[int, str]]

# A fork over two cores costs about 2 us, and one core computes some 50,000 operations in a microsecond: with less work than this a second worker
# costs more than it brings.
WORK_PER_WORKER = 100_000

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Settings:
    """What the caller asked for; None leaves it to the plan."""

    backend: str | None = None
    threads: int | None = None
    deterministic: bool = True


class _Operation(NamedTuple):
    work: Work
    inputs: str
    example: Shapes


class _Entry(NamedTuple):
    name: str
    priority: int
    can_serve: CanServe
    workers: Workers | None


@dataclass(frozen=True)
class LaunchPlan:
    """The decision for one operation on one shape."""

    op: str
    backend: str
    device: str
    workers: int
    reason: str
    rejected: tuple[tuple[str, str], ...] = field(default=())
    """(backend, why it was not taken) of all others."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rejected": dict(self.rejected)}

    def __str__(self) -> str:
        workers = f"{self.workers} worker{'s' if self.workers != 1 else ''}"
        lines = [f"{self.op} on {self.device}: {self.backend}, {workers} ({self.reason})"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.rejected])


_operations: dict[str, _Operation] = {}
_entries: dict[tuple[str, str], list[_Entry]] = {}
_settings: ContextVar[Settings | None] = ContextVar("cllm_settings", default=None)


def register_operation(op: str, work: Work, inputs: str, example: Shapes) -> None:
    """Makes known how much work `op` is: `work(shapes, itemsize, **options)` in floating-point operations, or bytes moved where that is more.

    inputs: the shapes that it takes, in words; example: some to explain it with where none are given.
    """
    _operations[op] = _Operation(work, inputs, example)
    _plan.cache_clear()


def register_backend(op: str, name: str, device_type: str, priority: int, can_serve: CanServe, workers: Workers | None = None) -> None:
    """Adds a backend for `op` on devices of `device_type`; a name registered before is replaced.

    can_serve(shapes, dtype, device) -> (bool, reason), with the dtype's name. workers(shapes, dtype, planned, options) -> (workers that a forward
    pass really puts to work, why they are others than the planned ones); asked by `explain` alone.
    """
    entries = [entry for entry in _entries.get((op, device_type), []) if entry.name != name]
    _entries[op, device_type] = sorted([*entries, _Entry(name, priority, can_serve, workers)], key=lambda entry: -entry.priority)
    _plan.cache_clear()


def backends(op: str, device_type: str = "cpu") -> list[str]:
    """The names of the backends of `op` on a type of device, the preferred one first."""
    return [entry.name for entry in _entries.get((op, device_type), [])]


def registered_operations() -> list[str]:
    """The names of all operations that the kernels made known."""
    return list(_operations)


@lru_cache(maxsize=8)
def _from_environment(backend: str | None, threads: str | None) -> Settings:
    return Settings(backend or None, _threads.default_threads() if threads else None)


def settings() -> Settings:
    """What is in force here: the innermost `use`, else CLLM_BACKEND and CLLM_THREADS."""
    current = _settings.get()
    return current if current is not None else _from_environment(os.environ.get("CLLM_BACKEND"), os.environ.get("CLLM_THREADS"))


@contextmanager
def use(backend: str | None = None, threads: int | None = None, deterministic: bool | None = None) -> Iterator[Settings]:
    """Settings for everything inside the scope; None keeps what was in force.

    backend: "numba", "torch", ...; threads: upper limit of workers, 1 to thousands. Raises UserError for a backend nobody registered.
    """
    before = settings()
    known = {entry.name for entries in _entries.values() for entry in entries}
    if backend is not None and known and backend not in known:
        raise UserError(f"unknown backend {backend!r}. Known: {', '.join(sorted(known))}.")
    wanted = Settings(
        before.backend if backend is None else backend,
        before.threads if threads is None else _threads.checked(threads),
        before.deterministic if deterministic is None else deterministic,
    )
    token = _settings.set(wanted)
    try:
        with _threads.limit(threads, inherited=before.threads):
            yield wanted
    finally:
        _settings.reset(token)


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, to be called later from any thread under the settings of this moment.

    Settings belong to the thread that opened the scope. Autograd computes the gradients of a GPU in a thread of its own, where none was opened.
    """
    here = copy_context()
    return lambda *args: here.copy().run(function, *args)  # a copy, because a context is entered once at a time


def plan(op: str, shapes: Shapes, dtype: Any, device: str = "cpu", work: float | None = None, **options: Any) -> LaunchPlan:
    """The backend and the number of workers for `op` on these shapes.

    dtype: a torch.dtype or its name. work: floating-point operations, or bytes moved where that is more; by default what the operation itself
    counts for these shapes and `options` (enough for all workers where it was not registered).
    Raises BackendError when no backend can serve, or the one asked for cannot.
    """
    asked = settings()
    try:
        return _plan(op, shapes, dtype, device, work, tuple(options.items()), asked.backend, asked.threads)
    except TypeError:  # lists cannot be remembered
        return _plan(op, tuple(map(tuple, shapes)), dtype, device, work, tuple(options.items()), asked.backend, asked.threads)


def explain(op: str, *shapes: tuple[int, ...], dtype: Any = "float32", device: str = "cpu", **options: Any) -> LaunchPlan:
    """The plan of a forward pass: str() of it says which backend would run, how many workers it would really put to work, and why no other.

    options: what else changes the work, such as `causal=True` for attention. Without shapes, some of a common size are taken. Raises UserError
    for shapes, a dtype or an option that the operation does not take.
    """
    known = _operations.get(op)
    name = str(dtype).removeprefix("torch.")
    if name not in ITEMSIZE:
        raise UserError(f"explain: unknown dtype {name!r}. Use one of {', '.join(ITEMSIZE)}.")
    shapes = tuple(map(tuple, shapes))
    if known is None:
        return plan(op, shapes, name, device)
    shapes = shapes or known.example
    parameters = inspect.signature(known.work).parameters.items()
    allowed = [each for each, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY and each != "backward"]
    for option in options:
        if option not in allowed:
            raise UserError(f"explain: {op} has no option {option!r}. It has: {', '.join(allowed) or 'none'}.")
    try:
        if any(size < 0 for shape in shapes for size in shape):
            raise ValueError("a negative size")
        work = float(known.work(shapes, ITEMSIZE[name], **options))
    except UserError:
        raise
    except (ValueError, TypeError):  # too few shapes or sizes, or too many
        raise UserError(f"explain: {op} takes the shapes of {known.inputs}, got {', '.join(map(str, shapes))}.") from None
    chosen = plan(op, shapes, name, device, work)
    entry = next(entry for entry in _entries[op, device.partition(":")[0]] if entry.name == chosen.backend)
    if entry.workers is None or chosen.device != "cpu":
        return chosen
    working, why = entry.workers(shapes, name, chosen.workers, options)
    return chosen if working == chosen.workers else replace(chosen, workers=working, reason=f"{chosen.reason}; {why}")


def _nobody(op: str, device_type: str) -> str:
    """Why an operation has no backend at all, and what to do."""
    known = sorted(name for name, kind in _entries if kind == device_type)
    nearest = get_close_matches(op, known, n=1)
    if nearest:
        return f"none is registered; did you mean {nearest[0]}?"
    return f"none is registered; known: {', '.join(known)}" if known else "none is registered; import the kernels first"


def _work(op: str, shapes: Shapes, dtype: str, options: tuple[tuple[str, Any], ...]) -> float:
    known = _operations.get(op)
    return float("inf") if known is None else known.work(shapes, ITEMSIZE.get(dtype, 4), **dict(options))


@lru_cache(maxsize=8192)
def _plan(
    op: str, shapes: Shapes, dtype: Any, device: str, work: float | None, options: tuple[tuple[str, Any], ...],
    backend: str | None, threads: int | None,
) -> LaunchPlan:  # fmt: skip
    dtype, shapes = str(dtype).removeprefix("torch."), tuple(map(tuple, shapes))
    device_type = device.partition(":")[0]
    entries = _entries.get((op, device_type), [])
    answers = [(entry, *entry.can_serve(shapes, dtype, device)) for entry in entries]
    if backend is not None:
        answers.sort(key=lambda answer: answer[0].name != backend)  # the one asked for first, the rest in order of priority
        if not answers or answers[0][0].name != backend:
            raise BackendError(f"{op} on {device_type} has no backend {backend!r}. It has: {', '.join(backends(op, device_type)) or 'none'}.")
        if not answers[0][1]:
            raise BackendError(f"backend {backend!r} cannot serve {op} {shapes} {dtype} on {device}: {answers[0][2]}.")
    chosen = next((answer for answer in answers if answer[1]), None)
    if chosen is None:
        reasons = "; ".join(f"{entry.name}: {reason}" for entry, _, reason in answers)
        raise BackendError(f"no backend can serve {op} {shapes} {dtype} on {device} ({reasons or _nobody(op, device_type)}).")
    if backend is None and device_type != "cpu":
        measured = choice.best(op, device, dtype, shapes, tuple(entry.name for entry, serves, _ in answers if serves))
        if measured is not None:
            chosen = next((entry, True, measured[1]) for entry, _, _ in answers if entry.name == measured[0])
    entry, _, reason = chosen
    others = tuple(
        (other.name, why if not serves else f"could serve ({why}), but {entry.name} {'was asked for' if backend else 'is preferred'}")
        for other, serves, why in answers
        if other is not entry
    )
    if device_type != "cpu":
        return LaunchPlan(op, entry.name, device, 1, reason, others)
    most = threads if threads is not None else usable_cores()
    work = _work(op, shapes, dtype, options) if work is None else work
    workers = max(1, int(min(work / WORK_PER_WORKER, most)))
    limit = "threads asked for" if threads is not None else "usable cores"
    sized = f"all {most} {limit}" if workers == most else "too little work to share" if workers == 1 else f"work for {workers} of {most} {limit}"
    return LaunchPlan(op, entry.name, device, workers, f"{reason}; {sized}", others)
