"""What every profiling script shares: interleaved timing, the machine's description, a table, a JSON file that says where it was measured.

Figures that cannot be trusted say so: a share of peak above 100 % is marked invalid, ceilings taken while other programs had the cores and code that
no commit holds are warned of, on the screen and in the file.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
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


def commit() -> tuple[str, bool]:
    """(the commit, whether the code on disk differs from it). Measured results and notes are no code."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    name = git("rev-parse", "--short", "HEAD")
    if name is None:
        return "unknown", True
    changed = git("status", "--porcelain", "--", "cllm", "kernels", "runtime", "profiling", ":!profiling/results", ":!*.md")
    return (name, False) if changed == "" else (f"{name}-dirty", True)


def provenance(threads: int | None = None) -> dict[str, Any]:
    """Machine, its ceilings, versions and commit: without them a figure means nothing. `threads`: what was asked for, None for all cores."""
    from cllm import runtime

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    name, dirty = commit()
    packages = ("torch", "numpy", "numba", "llvmlite", "triton", "cllm")
    return {
        "machine": {key: value for key, value in runtime.describe().to_dict().items() if key != "cache_dir"},  # nobody's folders are published
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        "threads": threads or runtime.settings().threads or runtime.device.usable_cores(),
        "commit": name,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%d"),
    }


def mark_invalid(rows: list[dict[str, Any]]) -> list[str]:
    """Gives each row with a share of peak above 100 % an "invalid" that says why, and returns one warning if there is any."""
    marked = 0
    for row in rows:
        above = [name for name, value in row.items() if (name == "share" or name.endswith("_share")) and value is not None and not value <= 1.0]
        row.pop("invalid", None)
        if above:
            marked += 1
            row["invalid"] = f"{', '.join(above)} above 100 %: the ceiling was measured too low, or does not hold here (data that fits in a cache)"
    if not marked:
        return []
    return [
        f"{marked} of {len(rows)} rows have a share of peak above 100 % and are marked invalid: the ceilings were measured on a busy machine, or the "
        "data fits in a cache. Measure again with nothing else running."
    ]


def percent(share: float | None) -> str:
    """For tables: "87 %", or "invalid" where more than all of the peak is claimed."""
    return "-" if share is None else f"{100 * share:.0f} %" if share <= 1.0 else "invalid"


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, tuple("-" * width for width in widths), *rows]:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))


def write(name: str, rows: list[dict[str, Any]], threads: int | None = None) -> Path:
    """`profiling/results/NAME.json`: the measured rows, where they were measured, and what is wrong with them, which is also printed."""
    about = provenance(threads)
    warnings = mark_invalid(rows)
    if about["dirty"]:
        warnings.append(f"the code measured is not that of a commit ({about['commit']}). Commit first, then measure what is to be published.")
    if about["machine"]["ceilings"]["disturbed"]:
        warnings.append("other programs had the cores while the ceilings were measured: shares of peak are too high. Measure on an idle machine.")
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**about, "warnings": warnings, "rows": rows}, indent=1, default=str) + "\n")
    return path


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """--plot, --write and --json, the same in every script."""
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw the figures (needs the extra [plot])")
    parser.add_argument("--write", metavar="NAME", help="write profiling/results/NAME.json")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")


def finish(options: argparse.Namespace, rows: list[dict[str, Any]], draw: Callable[[Path], None], threads: int | None = None) -> None:
    """What the options of `add_output_options` ask for, after the table; the JSON comes last."""
    if options.write:
        print(f"wrote {write(options.write, rows, threads)}")
    else:
        for text in mark_invalid(rows):
            print(f"warning: {text}", file=sys.stderr)
    if options.plot:
        draw(options.plot)
        print(f"wrote {options.plot}")
    if options.json:
        print(json.dumps(rows))


def run(main: Callable[[], None]) -> None:
    """A script's last line: an error made on purpose ends it with one sentence and its exit status, as in the `cllm` command."""
    from cllm.runtime.errors import CLLMError

    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except CLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
