"""Keeps freed memory in the process instead of handing it back to the kernel after every operation.

A training step frees and allocates the same tens of megabytes hundreds of times. glibc returns them at once by default, and every return costs a
page fault per 4 KB when the memory is taken again: measured, up to half of the time of a small step. Peak memory stays what it was; the process
holds on to it until it ends. `CLLM_KEEP_HEAP=0` leaves the allocator alone; other C libraries are left alone as well.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc accepts no more; what is larger is mapped and unmapped as before

_done = False


def keep_freed_memory() -> None:
    """Called before the first CPU kernel; later calls do nothing."""
    global _done
    if _done or os.environ.get("CLLM_KEEP_HEAP") == "0":
        return
    _done = True
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 16 << 20)
