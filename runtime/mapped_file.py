"""Files that are read as they are needed, through memory, without holding a descriptor open.

`numpy.memmap` keeps one for each file, although the map does not need it, and a process may have 1,024 of them: a training that follows a growing
site for a year has more shards than that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

_FAILED = ctypes.c_void_p(-1).value


def mapped(path: str | Path, dtype: np.dtype | type) -> np.ndarray:
    """(size of the file / size of an element,) array of this dtype that cannot be written to; an empty file has no map. Raises OSError.

    The map ends with the last array that looks into it. A file that another process shortens meanwhile ends this one (SIGBUS), as with every map.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return np.empty(0, dtype)
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, _libc().munmap, address, size).atexit = False
    array = np.frombuffer(memoryview(memory).cast("B"), dtype)
    array.flags.writeable = False
    return array


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
