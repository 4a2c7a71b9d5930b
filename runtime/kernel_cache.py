"""numba's cache of compiled kernels on disk, made fit to be shared by processes.

- The kernels of one folder of sources lie in one folder of the cache, which no other sources change.
- Of several processes that need the same function, one compiles it; the others wait, and load what it wrote. Each function that is being compiled
  has a locked file (flock) beside its entry. The kernel releases the lock when the process ends, however it ends, and another process goes on.
- A damaged file is compiled again; without this it ends the program, or runs.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cllm.runtime.progress import compilation

DIGEST_BYTES = 32
# How long one waits for a process that compiles the same function. After that it compiles the function too: the other may have been stopped.
WAIT_SECONDS = 300.0
POLL_SECONDS = 0.02


class _Claims(threading.local):
    """The locks that this thread holds, in lists by compilation: a function is compiled in the middle of another that calls it."""

    def __init__(self) -> None:
        self.compilations: list[list[Path]] = []


_claims = _Claims()
_locks: dict[Path, int] = {}  # what this process has locked, and the descriptors that hold the locks


def prepare(folder_of: Callable[[str], str | None]) -> None:
    """Changes how numba keeps compiled functions; to be called once, before the first of them is defined.

    folder_of: given the path of a source file, the folder for what is compiled from it, or None, which leaves the choice to numba.
    """
    from numba.core import caching, ccallback, dispatcher

    _place(caching, folder_of)
    _seal(caching.IndexDataCacheFile)
    _wait_for_others(caching, (dispatcher.Dispatcher, ccallback.CFunc))


def _replace(owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    setattr(owner, name, change(getattr(owner, name)))


# ---- where ------------------------------------------------------------------------------------------------------------------------------------


def _place(caching: Any, folder_of: Callable[[str], str | None]) -> None:
    class Registered(caching.UserProvidedCacheLocator):
        def __init__(self, py_func: Any, py_file: str) -> None:
            super().__init__(py_func, py_file)
            self._cache_path = str(folder_of(py_file))

        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            return super().from_function(py_func, py_file) if folder_of(py_file) else None

        def get_source_stamp(self) -> str:
            """The folder's name depends on its sources already; a copy of them elsewhere, with other times, may use the same entries."""
            return os.path.basename(self._cache_path)

    caching.CacheImpl._locator_classes = [Registered, *caching.CacheImpl._locator_classes]


# ---- one process compiles, others wait --------------------------------------------------------------------------------------------------------


def _wait_for_others(caching: Any, compilers: tuple[Any, ...]) -> None:
    def load_or_claim(load: Any) -> Any:
        def load_overload(self: Any, signature: Any, context: Any) -> Any:
            loaded = load(self, signature, context)
            if loaded is None and _claims.compilations:
                _claim(_lock_of(self._cache_file, signature))
                loaded = load(self, signature, context)  # another process may have written it meanwhile
            return loaded

        return load_overload

    def claiming(compile: Any) -> Any:
        def compile_claimed(self: Any, *args: Any) -> Any:
            with _compilation():
                return compile(self, *args)

        return compile_claimed

    def save_alone(save: Any) -> Any:
        """Its index is read, extended and written again: by two processes at a time, one's entry would be lost."""

        def save_entry(self: Any, *args: Any) -> Any:
            with _compilation():
                _claim(Path(f"{self._index_path}.lock"))
                return save(self, *args)

        return save_entry

    _replace(caching.Cache, "load_overload", load_or_claim)
    _replace(caching.IndexDataCacheFile, "save", save_alone)
    for compiler in compilers:
        _replace(compiler, "compile", claiming)


def _lock_of(file: Any, signature: Any) -> Path:
    digest = hashlib.sha256(repr(signature).encode()).hexdigest()[:16]
    return Path(f"{file._index_path}.{digest}.lock")


@contextmanager
def _compilation() -> Iterator[None]:
    """What is claimed within is given back at its end, also when it fails. Python does not look for garbage within, a tenth of the time."""
    claimed: list[Path] = []
    collecting = gc.isenabled() and not _claims.compilations
    if collecting:
        gc.disable()
    _claims.compilations.append(claimed)
    try:
        yield
    finally:
        _claims.compilations.pop()
        if collecting:
            gc.enable()
        for path in reversed(claimed):
            _release(path)


def _claim(path: Path) -> None:
    """Returns when this process holds the lock, or when it is to go on without: where nothing can be locked, or after waiting for too long."""
    if path in _locks:
        return
    until = time.monotonic() + WAIT_SECONDS
    waiting = False
    try:
        while (handle := _try_to_lock(path)) is None and time.monotonic() < until:
            if not waiting:
                waiting = True
                compilation.begin("waiting for CPU kernels that another process compiles for this machine")
            time.sleep(POLL_SECONDS)
    except OSError:  # a folder that cannot be written, a file system without locks
        return
    finally:
        if waiting:
            compilation.end()
    if handle is not None:
        _locks[path] = handle
        _claims.compilations[-1].append(path)


def _try_to_lock(path: Path) -> int | None:
    """The descriptor of a file that is now locked; None where another process has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, handle):
            return handle
    except BlockingIOError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _is_at(path: Path, handle: int) -> bool:
    """Whether the open file still has this name: who held the lock before has removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(path: Path) -> None:
    handle = _locks.pop(path)
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a child process was forked meanwhile
    os.close(handle)


def _forget() -> None:
    """In a forked process: the locks are its parent's."""
    for handle in _locks.values():
        os.close(handle)
    _locks.clear()
    _claims.compilations.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---- whole or not at all ----------------------------------------------------------------------------------------------------------------------


def _seal(files: Any) -> None:
    """Each file ends with the SHA-256 of what comes before, looked at before numba unpickles anything. numba itself ignores what follows."""

    def intact(path: str) -> bool:
        try:
            content = Path(path).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]

    def load_intact_index(load_index: Any) -> Any:
        return lambda self: load_index(self) if intact(self._index_path) else {}

    def load_intact_data(load_data: Any) -> Any:
        def load(self: Any, name: str) -> Any:
            if not intact(self._data_path(name)):
                raise OSError(f"{name} is damaged")  # which numba takes for a missing file
            return load_data(self, name)

        return load

    def write_sealed(open_for_write: Any) -> Any:
        @contextmanager
        def open_sealed(self: Any, path: str) -> Iterator[io.BytesIO]:
            with open_for_write(self, path) as file:
                content = io.BytesIO()
                yield content
                file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())

        return open_sealed

    for name, change in {"_load_index": load_intact_index, "_load_data": load_intact_data, "_open_for_write": write_sealed}.items():
        _replace(files, name, change)
