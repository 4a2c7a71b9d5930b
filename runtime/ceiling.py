"""What this machine can do at best, measured once and kept: the denominator of every "share of peak". Never a table of product names.

The rate is the best of torch's matrix product and of every probe that the kernels registered, over all usable cores; the bandwidth is that of
a large copy (bytes read plus bytes written). Whatever limit is in force where it is asked for, all usable cores are measured; and what was
measured while other programs had the cores is used for a few minutes and no longer, or every later share of peak would be too large.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

from cllm.runtime import compiler, tuning
from cllm.runtime.device import cpu, usable_cores
from cllm.runtime.errors import CLLMError
from cllm.runtime.plan import use

Probe = Callable[[str], float | None]
"""Called with "fp32" or "bf16", returns the GFLOP/s it reached or None where it has no such kernel."""

_probes: dict[str, Probe] = {}
SIZES = ((1024, 1024, 1024), (4096, 384, 1536))  # rows, depth, columns: matrix units reach most on flat products, others on square ones
PASSES = 2  # each rate is taken twice, seconds apart: a short disturbance then hits only one of them
PROBE_ROWS = 64
SLOW_SECONDS, BUDGET_SECONDS = 1.0, 0.2  # a product that would take longer than the first is measured on so many rows as take about the second
QUIET_SHARE = 0.85  # rates are kept for good only if this process had at least this share of the cores' time while they were measured
BUSY_SECONDS = 300.0  # others serve for so long: commands that follow each other on a busy machine would each measure for two seconds


@dataclass(frozen=True)
class Ceilings:
    """GFLOP/s of dense matrix products and GB/s of copying, all usable cores; `best` names who reached the rates."""

    fp32_gflops: float
    bf16_gflops: float
    copy_gbps: float
    best: tuple[tuple[str, str], ...] = ()
    disturbed: bool = False
    """Other programs had the cores meanwhile: the true ceilings are higher, and a run some minutes later measures again."""

    def gflops(self, precision: str) -> float:
        return self.bf16_gflops if precision == "bf16" else self.fp32_gflops

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"best": dict(self.best)}


def register_probe(name: str, probe: Probe) -> None:
    """A kernel that may beat torch's matrix product."""
    _probes[name] = probe
    ceilings.cache_clear()


class _Clock:
    """Times calls, and adds up how much of the cores' time this process had meanwhile."""

    def __init__(self) -> None:
        self.wall_seconds = self.core_seconds = 0.0

    def best_seconds(self, call: Callable[[], Any], budget: float = BUDGET_SECONDS) -> float:
        """The fastest of as many calls as `budget` seconds hold (at least one), after one to warm up."""
        call()
        start, had = time.perf_counter(), time.process_time()
        best, before = float("inf"), start
        while before < start + budget:
            call()
            after = time.perf_counter()
            best, before = min(best, after - before), after
        self.wall_seconds += before - start
        self.core_seconds += time.process_time() - had
        return best

    @property
    def share(self) -> float:
        return self.core_seconds / (self.wall_seconds * usable_cores())


def _affordable_rows(rows: int, probe: Callable[[], Any]) -> int:
    """Of a product of so many rows, those to measure; `probe` computes PROBE_ROWS of them.

    A processor without instructions for bfloat16 makes one GFLOP/s of it: the whole products would take half a minute, and no more be learnt.
    """
    probe()
    start = time.perf_counter()
    probe()
    seconds = (time.perf_counter() - start) * rows / PROBE_ROWS
    return rows if seconds <= SLOW_SECONDS else max(PROBE_ROWS, int(rows * BUDGET_SECONDS / seconds))


def _torch_gflops(precision: str, clock: _Clock) -> float:
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    best = 0.0
    for rows, depth, columns in SIZES:
        a, b = torch.randn(rows, depth, generator=generator).to(dtype), torch.randn(depth, columns, generator=generator).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)  # made once: page faults are not the matrix product's
        rows = _affordable_rows(rows, partial(torch.mm, a[:PROBE_ROWS], b, out=out[:PROBE_ROWS]))
        seconds = clock.best_seconds(partial(torch.mm, a[:rows], b, out=out[:rows]))
        best = max(best, 2.0 * rows * depth * columns / seconds / 1e9)
    return best


def _copy_gbps(clock: _Clock) -> float:
    import torch

    source = torch.zeros(32 << 20, dtype=torch.float32)  # 128 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.best_seconds(lambda: target.copy_(source), 0.1) / 1e9


def _reached(probe: Probe, precision: str) -> float:
    try:
        return probe(precision) or 0.0
    except CLLMError:  # a kernel that cannot serve here sets no ceiling
        return 0.0


def _measure() -> dict[str, Any]:
    rates = {"fp32": 0.0, "bf16": 0.0}
    best: dict[str, str] = {}
    copy_gbps = 0.0
    # The fp32 product keeps every core busy, so its clock shows who else had them; oneDNN's bf16 product may use fewer cores by its own choice.
    clocks = {"fp32": _Clock(), "bf16": _Clock(), "copy": _Clock()}
    probes: dict[str, Probe] = {"torch": lambda precision: _torch_gflops(precision, clocks[precision]), **_probes}
    for _ in range(PASSES):
        for precision in rates:
            for name, probe in probes.items():
                rate = _reached(probe, precision)
                if rate > rates[precision]:
                    rates[precision], best[precision] = rate, name
        copy_gbps = max(copy_gbps, _copy_gbps(clocks["copy"]))
        if clocks["fp32"].share < QUIET_SHARE:
            break  # what this gives is soon measured again; runs on a busy machine would pay for the second pass
    measured = {"fp32_gflops": rates["fp32"], "bf16_gflops": rates["bf16"], "copy_gbps": copy_gbps, "best": best}
    return measured | {"disturbed": clocks["fp32"].share < QUIET_SHARE}


def _valid(value: Any) -> bool:
    """Whether a kept value can be used: it is whole, and not of a busy machine some minutes ago."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), int | float) and 0 < value[name] < 1e12 for name in ("fp32_gflops", "bf16_gflops", "copy_gbps"))
        and isinstance(value.get("best"), dict)
        and not (value.get("disturbed") and not 0 <= time.time() - _number(value.get("measured")) < BUSY_SECONDS)
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


@lru_cache(maxsize=1)
def ceilings() -> Ceilings:
    """This machine's ceilings: from the cache, or measured now in about two seconds."""
    import torch

    probes = [(name, compiler.kernel_cache_key()) for name in sorted(_probes)]
    key = "best-ceilings-" + tuning.digest(cpu().name, cpu().workers, torch.__version__, probes)
    value = tuning.load(key)
    if not _valid(value):
        with use(threads=usable_cores()):
            value = _measure()
        tuning.store(key, value | {"measured": time.time()})
    best = tuple(sorted((str(k), str(v)) for k, v in value["best"].items()))
    return Ceilings(float(value["fp32_gflops"]), float(value["bf16_gflops"]), float(value["copy_gbps"]), best, bool(value.get("disturbed")))
