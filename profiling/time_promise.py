"""What `cllm train --minutes` promises, and what it keeps: the predicted loss with its interval, and the time, over texts and budgets.

    python profiling/time_promise.py js=some/scripts perl=/usr/share/perl --minutes 1.5 3 --work /tmp/promise --write time-promise

Give texts that the scaling law was not fitted to, and nothing else to do to the machine: the time is kept on a busy one too, the prediction is not.
What is in --work is not run again.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import plots
from report import add_output_options, finish, print_table, run

from cllm.runtime.errors import CLLMError
from cllm.runtime.progress import track

_EXPECTED = re.compile(r"expected ([0-9.]+) bits per byte on the validation text, ([0-9.]+) to ([0-9.]+) in 8 of 10 cases")
_PLANNED = re.compile(r"([0-9,]+) tokens at ([0-9,]+) tokens/s")


def measure(name: str, path: str, minutes: float, work: Path) -> dict[str, Any]:
    """One training, or what --work holds of it."""
    place = work / f"{name}-{minutes:g}"
    kept = place / "promise.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    command = [sys.executable, "-m", "cllm", "train", path, "--out", str(place), "--minutes", f"{minutes:g}", "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise CLLMError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    row = {"text": name, "minutes": minutes, **figures(json.loads(done.stdout.splitlines()[-1]), done.stderr), "seconds": seconds}
    kept.write_text(json.dumps(row))
    return row


def figures(result: dict[str, Any], said: str) -> dict[str, Any]:
    """What a training promised on standard error, and what it came to."""
    expected, planned = _EXPECTED.search(said), _PLANNED.search(said)
    if expected is None or planned is None:
        raise CLLMError(f"the training told no expected loss or no speed: {said.strip()[-500:]}")
    predicted, low, high = map(float, expected.groups())
    found = result["validation"]["bits_per_byte"]
    return {
        "parameters": result["parameters"], "planned_tokens": int(planned[1].replace(",", "")), "tokens": result["tokens"],
        "predicted": predicted, "low": low, "high": high, "bits_per_byte": found, "inside": low <= found <= high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--minutes", nargs="+", type=float, default=[1.5, 3.0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [(*text.partition("=")[::2], minutes) for minutes in options.minutes for text in options.texts]
    rows = [measure(name, path, minutes, options.work) for name, path, minutes in track(wanted, len(wanted), "training")]
    print_table(
        ("text", "minutes", "taken", "parameters", "tokens / planned", "predicted", "interval", "measured", "inside"),
        [
            (
                r["text"], f"{r['minutes']:g}", f"{r['seconds'] / 60:.2f}", f"{r['parameters']:,}", f"{r['tokens'] / r['planned_tokens']:.2f}",
                f"{r['predicted']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", f"{r['bits_per_byte']:.3f}", "yes" if r["inside"] else "no",
            )
            for r in rows
        ],
    )  # fmt: skip
    latest = max(r["seconds"] / (60 * r["minutes"]) for r in rows)
    print(f"{sum(r['inside'] for r in rows)} of {len(rows)} inside the interval; the longest took {100 * latest:.1f} % of its time")
    finish(options, rows, lambda path: draw(path, rows))


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    labels = [f"{r['text']}\n{r['minutes']:g} min" for r in rows]
    series = {"measured": [r["bits_per_byte"] for r in rows], "predicted": [r["predicted"] for r in rows]}
    plots.bars(path, "What --minutes predicts", labels, series, "bits per byte")


if __name__ == "__main__":
    run(main)
