"""A thread that makes the data of the next update while this one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
Result = TypeVar("Result")


class Loader(Generic[Key, Value]):
    """Makes values in a thread of its own, which no other thread may make meanwhile, one ahead of the caller.

    make: the value of a key, a pure function of it. What it raises is raised by `take` of that key.
    """

    def __init__(self, make: Callable[[Key], Value]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "cllm-loader")
        self._coming: tuple[Key, Future[Value]] | None = None

    def take(self, key: Key, following: Key) -> Value:
        """The value of `key`; that of `following` is made from now on. A value that was made for nothing is dropped."""
        if self._coming is None or self._coming[0] != key:
            self._start(key)
        assert self._coming is not None
        value = self._coming[1].result()
        self._start(following)
        return value

    def _start(self, key: Key) -> None:
        if self._coming is not None:
            self._coming[1].cancel()
        self._coming = key, self._thread.submit(self._make, key)

    def run(self, work: Callable[[], Result]) -> Result:
        """Does other work that needs what `make` uses, in the same thread."""
        return self._thread.submit(work).result()

    def close(self) -> None:
        """Ends the thread, after what it is at."""
        self._thread.shutdown(cancel_futures=True)
