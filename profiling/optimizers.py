"""Every optimizer on one recipe, through the command line: the learning rate that `--find-lr` suggests, others around it, and the loss of each.

    python profiling/optimizers.py tinyshakespeare.txt --work /tmp/optimizers
    python profiling/optimizers.py tinyshakespeare.txt --work /tmp/optimizers --write optimizers-MACHINE

The recipe is nanoGPT's Shakespeare model for CPUs: characters, 4 layers x 128, 64 tokens, batches of 12, 1000 steps. It compares losses, not
times, so a busy machine does no harm. Runs stay in --work: what is finished there is not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import plots
from report import RESULTS, add_output_options, finish, print_table, run

from cllm.config.schema import OPTIMIZERS
from cllm.monitor.metrics import read_metrics
from cllm.runtime.errors import CLLMError

RECIPE = (
    "--tokenizer", "char", "--embed-dim", 128, "--num-layers", 4, "--num-heads", 4, "--seq-len", 64, "--batch-size", 12, "--checkpoint-every", 100000,
    "--set", "train.keep=1", "--set", "log.tensorboard=false",
)  # fmt: skip
CONTESTANTS = {name: ("--set", f"optim.optimizer={name}") for name in OPTIMIZERS} | {"adamw, ema 0.99": ("--set", "optim.ema=0.99")}
FACTORS = (0.25, 0.5, 1.0, 2.0)


def cllm(*words: object) -> dict[str, Any]:
    """What a `cllm` command gives with --json."""
    done = subprocess.run([sys.executable, "-m", "cllm", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    if done.returncode:
        raise CLLMError(f"cllm {words[0]} ended with status {done.returncode}: {found.get('error', 'see above')}")
    return found


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each learning rate."""
    place = options.work / name.replace(", ", "-").replace(" ", "-")
    common = (options.data, *RECIPE, "--steps", options.steps, "--precision", options.precision, "--seed", options.seed, *CONTESTANTS[name])
    if options.threads:
        common += ("--threads", options.threads)
    kept = place / "find-lr.json"
    if not kept.exists():
        found = cllm("train", *common, "--out", place, "--find-lr")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    suggestion = json.loads(kept.read_text())["suggestion"]
    rows = []
    for factor in options.factors:
        rate = float(f"{suggestion * factor:.2g}")
        result = cllm("train", *common, "--out", place / f"{rate:g}", "--learning-rate", rate, "--eval-every", options.steps)
        rows.append(
            {
                "optimizer": name,
                "suggestion": suggestion,
                "learning_rate": rate,
                "steps": result["step"],
                "precision": options.precision,
                "train_loss": last_losses(place / f"{rate:g}"),
                "validation_loss": result["validation"]["loss"],
                "bits_per_byte": result["validation"]["bits_per_byte"],
                "skipped_steps": result["skipped_steps"],
            }
        )
        print(f"{name} at {rate:g}: validation loss {rows[-1]['validation_loss']:.4f}", file=sys.stderr)
    return rows


def last_losses(run: Path) -> float:
    """The mean training loss of the last 50 steps: that of one batch says little."""
    return statistics.mean([row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"][-50:])


HEADER = ("optimizer", "--find-lr", "best rate", "validation loss", "bits per byte", "at each rate")


def summary(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line for each optimizer, the lowest validation loss first."""
    lines = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        mine = [row for row in rows if row["optimizer"] == name]
        best = min(mine, key=lambda row: row["validation_loss"])
        each = ", ".join(f"{row['learning_rate']:g}: {row['validation_loss']:.3f}" for row in mine)
        lines.append(
            (
                best["validation_loss"],
                (
                    name,
                    f"{best['suggestion']:g}",
                    f"{best['learning_rate']:g}",
                    f"{best['validation_loss']:.4f}",
                    f"{best['bits_per_byte']:.4f}",
                    each,
                ),
            )
        )
    return [line for _, line in sorted(lines)]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, ("---",) * len(HEADER), *summary(rows))]
    steps, precision = rows[0]["steps"], rows[0]["precision"]
    about = f"Validation loss in nats per character after {steps:,} steps in {precision}, one seed; written by profiling/optimizers.py."
    return "\n".join([about, "", *lines, ""])


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    best = {line[0]: float(line[3]) for line in summary(rows)}
    plots.bars(path, "Optimizers on the Shakespeare recipe", list(best), {"best learning rate tried": list(best.values())}, "validation loss, nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the text, such as tinyshakespeare.txt")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--optimizers", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="learning rates to train with, times the suggestion")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    rows = [row for name in options.optimizers for row in measure(name, options)]
    print_table(HEADER, summary(rows))
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)
    if options.write:
        (RESULTS / f"{options.write}.md").write_text(markdown(rows))


if __name__ == "__main__":
    run(main)
