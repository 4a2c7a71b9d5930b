"""Prepares numba before its first use: where compiled kernels are kept, what they are compiled for, and a word to the user while they are.

Each registered folder of sources has a cache folder of its own, whose name is a digest of all that its compiled kernels depend on: the CPU's
features, the versions of numba and llvmlite, the sources in the folder and the environment variables that they read. A kernel compiled for another
machine, by another compiler or from another source is never loaded. `runtime/kernel_cache.py` says how processes share these folders.
"""

import os
import re
import sys
import threading
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from cllm.runtime import heap, kernel_cache, kernel_linking, tuning
from cllm.runtime.errors import BackendError
from cllm.runtime.packages import version

_folders: dict[Path, set[str]] = {}  # registered sources, and the environment variables that they read
_beside: dict[Path, set[Path]] = {}  # files elsewhere whose values a folder's kernels hold
_ready = False
_lock = threading.Lock()


def register_kernels(folder: str | Path, variables: Iterable[str] = (), beside: Iterable[Path] = ()) -> None:
    """Makes known where sources of numba kernels lie, which environment variables they read, and from which files `beside` the folder they take
    constants: their cache depends on all three.

    numba itself watches only the file of the function that it loads, not those of the functions that it calls. Call before the kernels are
    imported. What other folders register does not change where the kernels of this one are kept: otherwise a command that reads text before it
    trains would compile again what one that only trains has compiled.
    """
    _folders.setdefault(Path(folder), set()).update(variables)
    _beside.setdefault(Path(folder), set()).update(beside)
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


@cache
def kernel_cache_key(folder: Path | None = None) -> str:
    """A digest of all that a compiled kernel of a registered folder depends on; without a folder, of all of them."""
    folders = sorted(_folders) if folder is None else [folder]
    variables = set().union(*(_folders[each] for each in folders))
    return tuning.digest(
        *(path.read_text("utf-8") for each in folders for path in [*sorted(each.glob("*.py")), *sorted(_beside.get(each, ()))]),
        sorted(cpu_features()),
        sys.version_info[:2],
        *map(version, ("numba", "llvmlite", "numpy")),
        *((name, os.environ.get(name, "")) for name in sorted(variables)),
    )


def _cache_folder(folder: Path | None = None) -> str:
    return str(tuning.cache_dir() / f"numba-{kernel_cache_key(folder)}")


def folder_of(source: str) -> str | None:
    """The cache folder for what a file of sources defines; None where nobody registered it, or where the user chose a folder for all kernels."""
    folder = Path(source).parent
    return _cache_folder(folder) if folder in _folders and _is_ours(os.environ.get("NUMBA_CACHE_DIR")) else None


def _is_ours(chosen: str | None) -> bool:
    """Whether a cache folder is no choice of the user's: there is none, or a parent process handed it down, perhaps with other settings."""
    return not chosen or re.fullmatch("numba-[0-9a-f]{16}", os.path.basename(chosen)) is not None


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
    if version("numba") == "absent":
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
    kernel_cache.prepare(folder_of)
    kernel_linking.prepare()
    _announce_compilation()


def _choose(settings: dict[str, Any]) -> None:
    """Puts numba's settings in force, also where numba was imported before; what the user chose in the environment stands."""
    for name, value in settings.items():
        chosen = os.environ.get(f"NUMBA_{name}")
        if not _is_ours(chosen):
            continue
        os.environ[f"NUMBA_{name}"] = " ".join(value) if isinstance(value, list) else value
    import numba

    for name, value in settings.items():
        if os.environ[f"NUMBA_{name}"] == (" ".join(value) if isinstance(value, list) else value):
            setattr(numba.config, name, value)


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
