"""The machine in words: three lines at the start of a run, or all of it for `cllm doctor`."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cllm.runtime import ceiling, compiler, toolchain, tree, tuning
from cllm.runtime.device import available_memory, cpu, devices, gpus, operating_system
from cllm.runtime.errors import BackendError
from cllm.runtime.packages import version
from cllm.runtime.plan import explain, registered_operations, settings


@dataclass(frozen=True)
class Report:
    """`str()` is for people, `to_dict()` for programs, `brief()` the three lines that a run starts with."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.values

    def brief(self) -> str:
        values, peak = self.values, self.values["ceilings"]
        machine = values["devices"][0]
        extra = "".join(f", {gpu['name']}" for gpu in values["devices"][1:])
        sets = ", ".join(name for name in machine["features"] if name not in ("fma", "bf16", "asimd")) or "none known"
        return (
            f"device   {machine['name']}{extra}, {machine['workers']} usable core{'s' if machine['workers'] != 1 else ''}, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB\n"
            f"compute  {sets}; measured peak {peak['fp32_gflops']:.0f} GFLOP/s in fp32, {peak['bf16_gflops']:.0f} in bf16, "
            f"{peak['copy_gbps']:.0f} GB/s copying{' (at least: other programs were busy meanwhile)' if peak['disturbed'] else ''}\n"
            f"kernels  {values['summary']}"
        )

    def __str__(self) -> str:
        values = self.values
        machine = values["devices"][0]
        lines = [self.brief(), "", f"system   {values['system']}"]
        caches = ", ".join(f"{level} {size / 1024:,.0f} KiB" for level, size in machine["cache_bytes"].items()) or "not readable here"
        lines.append(f"caches   {caches}")
        lines.append(f"memory   {values['memory_available_bytes'] / 2**30:.1f} GiB free of {machine['memory_bytes'] / 2**30:.1f}")
        lines.append("versions " + ", ".join(f"{name} {number}" for name, number in values["versions"].items()))
        lines.append(f"cache    {values['cache_dir']}")
        parts = 1741
        lines.append(
            f"sums     in a fixed tree of one root and up to {tree.FANOUT} children each, the same bits for any number of threads "
            f"({parts:,} parts: {tree.describe(parts)})"
        )
        for place, operations in (("", values["operations"]), (" on the GPU", values["gpu_operations"])):
            if operations:
                lines += ["", f"{f'operation{place}':<22} float32   bfloat16  why"]
            for name, by_dtype in operations.items():
                single, half = by_dtype["float32"], by_dtype["bfloat16"]
                lines.append(f"{name:<22} {single['backend']:<9} {half['backend']:<9} {single['reason']}")
        lines += ["", *(f"missing: {text}" for text in values["missing"])] if values["missing"] else []
        return "\n".join(lines)


_libraries: dict[str, str] = dict.fromkeys(("cllm", "torch", "numpy"), "")


def register_library(name: str, missing: str = "") -> None:
    """A library whose version belongs in the report. missing: where it is not installed, what is not possible and how to install it."""
    _libraries[name] = missing


def _missing(features: frozenset[str], versions: dict[str, str]) -> list[str]:
    """What would make this installation faster or more complete, each with what to do."""
    missing = [f"{name}, {_libraries[name]}" for name, number in versions.items() if number == "absent" and _libraries[name]]
    if not gpus():
        missing.append("a GPU that torch can use; everything runs on the CPU")
    elif obstacle := toolchain.obstacle():
        missing.append(f"what a GPU's kernels need; everything runs on the CPU: {obstacle}")
    if features and not features & {"avx512f", "neon", "asimd"}:
        missing.append("512-bit vectors (AVX-512) in this CPU; the kernels use narrower ones")
    if features and not features & {"amx_bf16", "avx512_bf16", "bf16"}:
        missing.append("bfloat16 arithmetic in this CPU; fp32 is as fast here and the default")
    return missing


def _summary() -> str:
    """The backend that most of the registered operations get on the CPU."""
    asked, names = settings(), registered_operations()
    if not names:
        return "none are registered, because the kernels are not imported"
    plans = [explain(op) for op in names] if asked.backend is None else []
    chosen, _ = Counter(plan.backend for plan in plans).most_common(1)[0] if plans else (asked.backend, 0)
    why = next((plan.reason.partition(";")[0] for plan in plans if plan.backend == chosen), "asked for")
    threads = asked.threads or cpu().workers
    return f"{chosen} ({why}), up to {threads} worker{'s' if threads != 1 else ''} per operation, the same bits for any number of them"


def _backends(operations: Iterable[str], device: str) -> dict[str, dict[str, Any]]:
    """What each operation would get on a kind of device, by dtype."""
    return {name: {dtype: _plan(name, dtype, device) for dtype in ("float32", "bfloat16")} for name in operations}


def _plan(operation: str, dtype: str, device: str) -> dict[str, Any]:
    try:
        return explain(operation, dtype=dtype, device=device).to_dict()
    except BackendError as error:  # a backend that is asked for may not run there
        return {"backend": "none", "device": device, "reason": str(error)}


def describe(operations: Iterable[str] = ()) -> Report:
    """Everything known about this machine; with `operations`, the backend that each would get and why, on the CPU and on a GPU that can be used."""
    features, versions = compiler.cpu_features(), {name: version(name) for name in _libraries}
    asked, names = settings(), list(operations)
    return Report(
        {
            "devices": [device.to_dict() for device in devices()],
            "system": operating_system(),
            "memory_available_bytes": available_memory(),
            "versions": versions,
            "cache_dir": str(tuning.cache_dir()),
            "ceilings": ceiling.ceilings().to_dict(),
            "settings": {"backend": asked.backend, "threads": asked.threads, "deterministic": asked.deterministic},
            "summary": _summary(),
            "operations": _backends(names, "cpu"),
            "gpu_operations": _backends(names, "cuda") if gpus() and not toolchain.obstacle() else {},
            "missing": _missing(features, versions),
        }
    )
