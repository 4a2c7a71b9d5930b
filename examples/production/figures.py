"""What a run came to, out of its metrics.jsonl: a table, and the curves as a picture where matplotlib is installed (pip install 'cllm[plot]').

python figures.py RUN [CURVES.svg]
"""

import json
import statistics
import sys
from pathlib import Path


def main(run: Path, picture: Path | None = None) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps, evaluations = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    for name, value in figures(run, steps, evaluations).items():
        print(f"| {name} | {value} |")
    if picture is not None:
        draw(steps, evaluations, picture)


def figures(run: Path, steps: list[dict], evaluations: list[dict]) -> dict[str, str]:
    best, last = min(evaluations, key=lambda row: row["loss"]), steps[-1]
    tokens = json.loads(next((run / "data").glob("tokens*/train/index.json")).read_text("utf-8"))["num_tokens"]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in steps if row.get(name) is not None)

    return {
        "training text, tokens": f"{tokens:,}",
        "updates": f"{last['step']:,}",
        "tokens learnt from": f"{last['tokens']:,}, {last['tokens'] / tokens:.1f} passes",
        "seconds of training": f"{last['seconds']:,.0f}",
        "seconds of a pass": f"{last['seconds'] * tokens / last['tokens']:,.0f}",
        "tokens a second (median of the updates)": f"{median('tokens_per_second'):,.0f}",
        "share of the cores in use (median)": f"{100 * median('cpu_share'):.0f} %",
        "memory of the process": f"{max(row['memory_bytes'] for row in steps) / 1e6:,.0f} MB",
        "validation loss, nats a token (best)": f"{best['loss']:.4f} at update {best['step']:,}",
        "perplexity": f"{best['perplexity']:.2f}",
        "bits per byte": f"{best['bits_per_byte']:.3f}",
        "accuracy of the next token": f"{100 * best['accuracy']:.1f} %",
    }


def draw(steps: list[dict], evaluations: list[dict], picture: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'cllm[plot]')", file=sys.stderr)
        return
    matplotlib.use("Agg")  # without a window
    from matplotlib import pyplot

    figure, (losses, rates) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained", height_ratios=(3, 1))
    thinned = steps[:: max(1, len(steps) // 400)]
    losses.plot(
        [row["tokens"] / 1e6 for row in thinned], [row["loss"] for row in thinned], color="#9ab5d6", linewidth=0.8, label="training, single updates"
    )
    at = {row["step"]: row["tokens"] / 1e6 for row in steps}
    known = [row for row in evaluations if row["step"] in at]
    losses.plot([at[row["step"]] for row in known], [row["loss"] for row in known], "o-", color="#c2571a", markersize=3, label="validation")
    losses.set_ylabel("nats per token")
    losses.legend(frameon=False)
    rates.plot([row["tokens"] / 1e6 for row in thinned], [row["learning_rate"] for row in thinned], color="#3d8b4f")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("million tokens learnt from")
    figure.savefig(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(Path, sys.argv[2:3]))
