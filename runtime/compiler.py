"""Prepares numba before its first use: where compiled kernels are kept, what they are compiled for, and a word to the user while they are.

The name of the cache folder is a digest of all that a compiled kernel depends on: the CPU's features, the versions of numba and llvmlite, and the
sources and environment variables that the kernels registered. A kernel compiled for another machine, by another compiler or from another source
is never loaded. numba writes each entry beside and renames it, and compiles anew what it cannot read; processes may start together.
"""

import hashlib
import io
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cllm.runtime import heap, tuning
from cllm.runtime.errors import BackendError

DIGEST_BYTES = 32

_folders: set[Path] = set()
_variables: set[str] = set()
_ready = False
_lock = threading.Lock()


def register_kernels(folder: str | Path, variables: Iterable[str] = ()) -> None:
    """Makes known where sources of numba kernels lie, and which environment variables they read: their cache depends on both.

    numba itself watches only the file of the function that it loads, not those of the functions that it calls. Call before the kernels are
    imported.
    """
    _folders.add(Path(folder))
    _variables.update(variables)
    kernel_cache_key.cache_clear()
    if _ready:
        _choose({"CACHE_DIR": _cache_folder()})


def _plain(name: str) -> str:
    """One spelling for LLVM's and Linux's names: avx512bf16, amx-bf16 -> avx512_bf16, amx_bf16."""
    name = name.lower().replace("-", "_")
    for start in ("avx512", "amx"):
        if name.startswith(start) and len(name) > len(start) + 1 and name[len(start)] != "_":
            return f"{start}_{name[len(start) :]}"
    return name


@lru_cache(maxsize=1)
def _llvm_features() -> dict[str, bool]:
    import llvmlite.binding as llvm

    return dict(llvm.get_host_cpu_features())


def _linux_features() -> dict[str, bool]:
    """What Linux lists for the first core, for reports where llvmlite is missing; nothing is compiled then."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return dict.fromkeys(listed.partition(":")[2].split(), True)


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Instruction sets of this CPU: avx2, fma, avx512f, avx512_bf16, amx_bf16, neon, ... (empty where nothing tells)."""
    try:
        found = _llvm_features()
    except (ImportError, RuntimeError):  # not installed; not known for this kind of CPU
        found = _linux_features()
    return frozenset({_plain(name) for name, present in found.items() if present} | {name for name, present in found.items() if present})


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


@lru_cache(maxsize=1)
def kernel_cache_key() -> str:
    """A digest of all that a compiled kernel depends on."""
    return tuning.digest(
        *(path.read_text("utf-8") for folder in sorted(_folders) for path in sorted(folder.glob("*.py"))),
        sorted(cpu_features()),
        sys.version_info[:2],
        _version("numba"),
        _version("llvmlite"),
        _version("numpy"),
        *((name, os.environ.get(name, "")) for name in sorted(_variables)),
    )


def _cache_folder() -> str:
    return str(tuning.cache_dir() / f"numba-{kernel_cache_key()}")


def numba_setup() -> None:
    """Call before importing numba; later calls do nothing.

    Raises BackendError where numba is not installed.
    """
    global _ready
    if not _ready:
        with _lock:
            if not _ready:
                _set_up()
                _ready = True


def _set_up() -> None:
    if _version("numba") == "absent":
        raise BackendError("the CPU kernels need numba, which is not installed. Install it with: pip install numba")
    settings: dict[str, Any] = {
        "CACHE_DIR": _cache_folder(),
        "THREADING_LAYER_PRIORITY": ["omp", "tbb", "workqueue"],
    }
    if "avx512f" in cpu_features():
        # LLVM splits 512-bit vectors in two on CPUs of which it believes that they clock down; our micro-kernels need all 32 whole registers.
        names = (f"{'+' if present else '-'}{name}" for name, present in sorted(_llvm_features().items()))
        settings["CPU_FEATURES"] = ",".join([*names, "-prefer-256-bit"])
        import llvmlite.binding as llvm

        settings["CPU_NAME"] = llvm.get_host_cpu_name()
    heap.keep_freed_memory()
    _choose(settings)
    _seal_cache()
    _announce_compilation()


def _choose(settings: dict[str, Any]) -> None:
    """Puts numba's settings in force, also where numba was imported before; what the user chose in the environment stands."""
    for name, value in settings.items():
        chosen = os.environ.get(f"NUMBA_{name}")
        # A cache folder of ours is no choice of the user's: a parent process handed it down, perhaps with other settings.
        if chosen and not re.fullmatch("numba-[0-9a-f]{16}", os.path.basename(chosen)):
            continue
        os.environ[f"NUMBA_{name}"] = " ".join(value) if isinstance(value, list) else value
    import numba

    for name, value in settings.items():
        if os.environ[f"NUMBA_{name}"] == (" ".join(value) if isinstance(value, list) else value):
            setattr(numba.config, name, value)


def _seal_cache() -> None:
    """A damaged file of numba's cache is compiled again; without this it ends the program, or runs.

    Each file ends with the SHA-256 of what comes before, looked at before numba unpickles anything. numba itself ignores what follows.
    """
    from numba.core import caching

    files = caching.IndexDataCacheFile
    load_index, load_data, open_for_write = files._load_index, files._load_data, files._open_for_write

    def intact(path: str) -> bool:
        try:
            content = Path(path).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]

    def load_intact_index(self: Any) -> Any:
        return load_index(self) if intact(self._index_path) else {}

    def load_intact_data(self: Any, name: str) -> Any:
        if not intact(self._data_path(name)):
            raise OSError(f"{name} is damaged")  # which numba takes for a missing file
        return load_data(self, name)

    @contextmanager
    def open_sealed(self: Any, path: str) -> Iterator[io.BytesIO]:
        with open_for_write(self, path) as file:
            content = io.BytesIO()
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())

    for name, method in {"_load_index": load_intact_index, "_load_data": load_intact_data, "_open_for_write": open_sealed}.items():
        setattr(files, name, method)


def _announce_compilation() -> None:
    """Has the user told when numba really compiles, which it tells of, and not when it loads from the cache."""
    from numba.core import event

    from cllm.runtime.progress import compilation

    class Announcer(event.Listener):
        def on_start(self, event: Any) -> None:
            compilation.begin("compiling CPU kernels for this machine (once; kept for the next run)")

        def on_end(self, event: Any) -> None:
            compilation.end()

    event.register("numba:compile", Announcer())
