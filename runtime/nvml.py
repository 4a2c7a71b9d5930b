"""What NVIDIA's management library (NVML) knows of a GPU. Asking it makes no context on the GPU, which would take memory there.

The library comes with the driver. Each function returns None where it is not there or does not know, as for the load of a part of a GPU (MIG).
"""

import ctypes
import os
from functools import lru_cache
from itertools import takewhile
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


def has_gpu() -> bool:
    """Whether there is a GPU for torch, without loading torch."""
    return bool(visible_gpus())


def visible_gpus() -> list[str]:
    """Of each GPU that torch would find, what CUDA_VISIBLE_DEVICES has to be in a process that is to find this one alone. Torch is not loaded."""
    library, count = _library(), ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0 or not count.value:
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(index) for index in range(count.value)]
    return list(takewhile(lambda name: name not in ("", "-1"), (name.strip() for name in given.split(","))))


def free_memory(index: int) -> int | None:
    """Bytes that are free on the GPU that torch calls `index`."""
    memory = _Memory()
    return int(memory.free) if _answers("nvmlDeviceGetMemoryInfo", index, memory) else None


def utilization(index: int) -> float | None:
    """The share of the last moments in which the GPU that torch calls `index` was busy, within 0 and 1."""
    share = _Utilization()
    return share.gpu / 100 if _answers("nvmlDeviceGetUtilizationRates", index, share) else None


def _answers(function: str, index: int, answer: ctypes.Structure) -> bool:
    """Whether the library filled in `answer`."""
    library, handle = _library(), _handle(index)
    return library is not None and handle is not None and getattr(library, function)(handle, ctypes.byref(answer)) == 0


@lru_cache(maxsize=1)
def _library() -> Any:
    try:
        library = ctypes.CDLL(_LIBRARY)
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):  # no driver, or one of other times
        return None


@lru_cache(maxsize=64)
def _handle(index: int) -> ctypes.c_void_p | None:
    """NVML counts all GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES leaves; both know a GPU, or a part of one, by its identity."""
    library = _library()
    if library is None:
        return None
    import torch

    identity = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    handle = ctypes.c_void_p()
    for name in (identity, f"GPU-{identity}", f"MIG-{identity}"):
        if library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)) == 0:
            return handle
    return None
