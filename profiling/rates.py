"""Does the learning rate of `cllm train --hours` hold for every width? The loss after equal tokens, over widths and over multiples of its rate.

    python profiling/rates.py novels=novels/ --work /tmp/rates --write rates

Depth, heads and batch follow the width as `--hours` makes them. The best multiple of each width is where a parabola through the lowest loss and its
neighbours, over the logarithm of the rate, is lowest. A rate transfers if that multiple is about the same for all widths.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import plots
from report import add_output_options, finish, print_table, run
from short_runs import PLAINLY, text_of, trained

from cllm import TrainConfig, runtime
from cllm.config import recipe
from cllm.data.pipeline import Dataset

SEQ_LEN = 128


def measure(text: str, dataset: Dataset, width: int, multiple: float, options: argparse.Namespace) -> dict[str, Any]:
    batch_size = recipe.batch_size(options.tokens, SEQ_LEN)
    steps = round(options.tokens / (batch_size * SEQ_LEN))
    rate = multiple * recipe.learning_rate(width, options.tokens)
    config = TrainConfig(
        **recipe.sizes(width), **PLAINLY, seq_len=SEQ_LEN, batch_size=batch_size, steps=steps, optimizer=recipe.OPTIMIZER, schedule=recipe.SCHEDULE,
        learning_rate=rate, min_lr=0.0, warmup=recipe.warmup(steps), precision=options.precision, seed=options.seed,
    )  # fmt: skip
    place = options.work / f"{text}-{width}-{options.tokens}-{rate:.3g}-{options.seed}"
    found = trained(place, dataset, config)
    return {"text": text, "width": width, "tokens": options.tokens, "multiple": multiple, "learning_rate": rate, "seed": options.seed, **found}


def best_multiple(rows: list[dict[str, Any]]) -> float | None:
    """Of the rows of one width, where the loss is lowest between the multiples that were tried; None where it is lowest at an end of them."""
    points = sorted((math.log(row["multiple"]), row["loss"]) for row in rows)
    at = min(range(len(points)), key=lambda each: points[each][1])
    if at in (0, len(points) - 1):
        return None
    (x0, y0), (x1, y1), (x2, y2) = points[at - 1 : at + 2]
    above = (y0 - y1) * (x2 - x1) ** 2 - (y2 - y1) * (x1 - x0) ** 2
    below = (y0 - y1) * (x2 - x1) + (y2 - y1) * (x1 - x0)
    return math.exp(x1 + above / (2 * below))


def draw(path: Path, best: dict[int, float | None]) -> None:
    labels = [f"width {width}" for width in best]
    plots.bars(path, "Best learning rate", labels, {"multiple": list(best.values())}, "multiple of the rate that --hours takes", 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="NAME=PATH[:TOKENIZER]", help="the text to train on")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 384])
    parser.add_argument("--multiples", type=float, nargs="+", default=[0.5, 1, 2, 4], help="of the rate that --hours takes")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    name, dataset = text_of(options.text, options.work)
    with runtime.use(threads=options.threads):
        rows = [measure(name, dataset, width, multiple, options) for width in options.widths for multiple in options.multiples]
    best = {width: best_multiple([row for row in rows if row["width"] == width]) for width in options.widths}
    print_table(
        ("width", "parameters", *(f"{multiple:g} x" for multiple in options.multiples), "best multiple", "best rate"),
        [
            (
                str(width), f"{next(row['parameters'] for row in rows if row['width'] == width):,}",
                *(f"{row['loss']:.4f}" for row in rows if row["width"] == width),
                "beyond" if multiple is None else f"{multiple:.2f}",
                "" if multiple is None else f"{multiple * recipe.learning_rate(width, options.tokens):.4f}",
            )
            for width, multiple in best.items()
        ],
    )  # fmt: skip
    finish(options, rows, lambda path: draw(path, best), threads=options.threads)


if __name__ == "__main__":
    run(main)
