"""Which of several backends was fastest for an operation, where somebody measured it on this device: kept on disk, read by the plan.

Nothing is measured here and nothing in the middle of training: `profiling/gpu_suite.py` records. Sizes are rounded up to powers of two, so that a
measurement speaks for its neighbours, and the key holds the device and the versions, so that it speaks for no other.
"""

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cllm.runtime import tuning
from cllm.runtime.packages import version

LOSES = 0.95  # a backend below this share of the fastest one's speed is not chosen; among the others priority decides

Shapes = tuple[tuple[int, ...], ...]


def shape_class(shapes: Shapes) -> str:
    """ "1x2048x16x128,1x2048x4x128": every size rounded up to a power of two."""
    return ",".join("x".join(str(1 << max(0, size - 1).bit_length()) for size in shape) for shape in shapes)


@lru_cache(maxsize=64)
def _device(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") and torch.cuda.is_available() else device
    return f"{name}|cuda {torch.version.cuda or torch.version.hip}|torch {torch.__version__}|triton {version('triton')}|cllm {version('cllm')}"


def _key(op: str, device: str, dtype: str, shapes: Shapes) -> str:
    return f"choice|{_device(device)}|{op}|{dtype}|{shape_class(shapes)}"


def record(op: str, device: str, dtype: str, shapes: Shapes, seconds: Mapping[str, float]) -> None:
    """Seconds of one call by backend, measured in one run; replaces what was known."""
    tuning.store(_key(op, device, dtype, shapes), {"seconds": dict(seconds), "date": time.strftime("%Y-%m-%d")})
    best.cache_clear()


@lru_cache(maxsize=4096)
def best(op: str, device: str, dtype: str, shapes: Shapes, candidates: tuple[str, ...]) -> tuple[str, str] | None:
    """(backend, why) among `candidates`, which stand in the order of priority; None where nothing was measured."""
    found: Any = tuning.load(_key(op, device, dtype, shapes))
    try:
        measured = {name: float(found["seconds"][name]) for name in candidates if name in found["seconds"]}
        date = str(found["date"])
    except (TypeError, KeyError, ValueError):  # nothing there, or not ours
        return None
    if not measured or min(measured.values()) <= 0:
        return None
    fastest = min(measured.values())
    chosen = next(name for name in candidates if name in measured and measured[name] * LOSES <= fastest)
    figures = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in sorted(measured.items(), key=lambda item: item[1]))
    return chosen, f"measured here on {date}: {figures}"
