"""What every profiling script shares: interleaved timing, the machine's description, a table, a JSON file that says where it was measured."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(contestants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each, called in turn A B C A B C ..., so that a machine that drifts drifts for all."""
    for call in contestants.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def provenance() -> dict[str, Any]:
    """Machine, versions and commit: without them a figure means nothing."""
    from cllm import runtime

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    packages = ("torch", "numpy", "numba", "llvmlite", "triton", "cllm")
    return {
        "machine": {key: value for key, value in runtime.describe().to_dict().items() if key != "cache_dir"},  # nobody's folders are published
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        "commit": git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, tuple("-" * width for width in widths), *rows]:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """`profiling/results/NAME.json`: the measured rows and where they were measured."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**provenance(), "rows": rows}, indent=1, default=str) + "\n")
    return path
