"""What this machine can do at best, measured once and kept: the denominator of every "share of peak". Never a table of product names.

The rate is the best of torch's matrix product and of every probe that the kernels registered, over all usable cores; the bandwidth is that of
a large copy (bytes read plus bytes written).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from cllm.runtime import compiler, tuning
from cllm.runtime.device import cpu

Probe = Callable[[str], float | None]
"""Called with "fp32" or "bf16", returns the GFLOP/s it reached or None where it has no such kernel."""

_probes: dict[str, Probe] = {}
SIZE = 1024  # a 1024^3 product: 2 GFLOP, inside every last-level cache
ROUNDS = 12


@dataclass(frozen=True)
class Ceilings:
    """GFLOP/s of dense matrix products and GB/s of copying, all usable cores; `best` names who reached the rates."""

    fp32_gflops: float
    bf16_gflops: float
    copy_gbps: float
    best: tuple[tuple[str, str], ...] = ()

    def gflops(self, precision: str) -> float:
        return self.bf16_gflops if precision == "bf16" else self.fp32_gflops

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"best": dict(self.best)}


def register_probe(name: str, probe: Probe) -> None:
    """A kernel that may beat torch's matrix product."""
    _probes[name] = probe
    ceilings.cache_clear()


def best_seconds(call: Callable[[], Any], rounds: int = ROUNDS, budget: float = 0.4) -> float:
    """The fastest of up to `rounds` calls within `budget` seconds, after one to warm up."""
    call()
    start = time.perf_counter()
    best = float("inf")
    for _ in range(rounds):
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
        if time.perf_counter() - start > budget:
            break
    return best


def _torch_gflops(precision: str) -> float:
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator).to(dtype) for _ in range(2))
    return 2 * SIZE**3 / best_seconds(lambda: torch.mm(a, b)) / 1e9


def _copy_gbps() -> float:
    import torch

    source = torch.zeros(32 << 20, dtype=torch.float32)  # 128 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), rounds=6) / 1e9


def _measure() -> dict[str, Any]:
    rates: dict[str, float] = {}
    best: dict[str, str] = {}
    for precision in ("fp32", "bf16"):
        reached = {"torch": _torch_gflops(precision)}
        for name, probe in _probes.items():
            rate = probe(precision)
            if rate is not None:
                reached[name] = rate
        best[precision] = max(reached, key=lambda name: reached[name])
        rates[precision] = reached[best[precision]]
    return {"fp32_gflops": rates["fp32"], "bf16_gflops": rates["bf16"], "copy_gbps": _copy_gbps(), "best": best}


def _valid(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), int | float) and value[name] > 0 for name in ("fp32_gflops", "bf16_gflops", "copy_gbps")
    ) and isinstance(value.get("best"), dict)


@lru_cache(maxsize=1)
def ceilings() -> Ceilings:
    """This machine's ceilings: from the cache, or measured now in about two seconds."""
    import torch

    key = "ceilings-" + tuning.digest(cpu().name, cpu().workers, torch.__version__, compiler.kernel_cache_key(), sorted(_probes))
    value = tuning.remembered(key, _measure, _valid)
    best = tuple(sorted((str(k), str(v)) for k, v in value["best"].items()))
    return Ceilings(float(value["fp32_gflops"]), float(value["bf16_gflops"]), float(value["copy_gbps"]), best)
