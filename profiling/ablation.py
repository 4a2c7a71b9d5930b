"""What each part of the architecture "fast" is worth in the same time: the loss after equal tokens, the cost of a step, the loss at equal cost.

    python profiling/ablation.py shakespeare=tinyshakespeare.txt:char python=lib/ --work /tmp/ablation

The model is that of nanoGPT's Shakespeare recipe for CPUs: 4 layers x 128, 64 tokens, batches of 12; optimizer and schedule are those of `cllm train
--hours`. A loss does not depend on how busy the machine is. The cost of a step is processor time on one thread, contestants in turn, told as a ratio
to the plain model's, so that the machine is left out of it as far as can be. The plain model also trains for more steps: its loss at the cost of a
contestant is read off between its own runs. Runs stay in --work: what is finished there is not trained again.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import plots
import torch
from report import add_output_options, finish, print_table, run
from short_runs import PLAINLY, text_of, trained

from cllm import Model, TrainConfig, TrainStep, runtime
from cllm.config import recipe
from cllm.config.model import ModelConfig
from cllm.data import Batch
from cllm.data.pipeline import Dataset

SIZES = {"embed_dim": 128, "num_layers": 4, "num_heads": 4, "norm": "rms"}
SEQ_LEN, BATCH = 64, 12
PLAIN = "plain"
CONTESTANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "bigrams": {"bigram_rows": 8192},
    "bigrams, trigrams": {"bigram_rows": 8192, "trigram_rows": 8192},
    "QK-norm": {"qk_norm": True},
    "squared ReLU": {"activation": "relu2"},
    "softcap 15": {"softcap": 15.0},
    "QK-norm, bigrams, trigrams": {"qk_norm": True, "bigram_rows": 8192, "trigram_rows": 8192},
}
LONGER = 1.5  # how much longer the plain model trains, too


def config_of(name: str, steps: int, options: argparse.Namespace) -> TrainConfig:
    rate = recipe.learning_rate(SIZES["embed_dim"], steps * BATCH * SEQ_LEN)
    return TrainConfig(
        **SIZES, **CONTESTANTS[name], **PLAINLY, seq_len=SEQ_LEN, batch_size=BATCH, steps=steps, optimizer=recipe.OPTIMIZER, schedule=recipe.SCHEDULE,
        learning_rate=rate, min_lr=0.0, warmup=recipe.warmup(steps), precision=options.precision, seed=options.seed,
    )  # fmt: skip


def contested(text: str, dataset: Dataset, name: str, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    place = options.work / f"{text}-{name.replace(', ', '-').replace(' ', '-')}-{steps}-{options.seed}"
    return {"text": text, "contestant": name, "steps": steps, **trained(place, dataset, config_of(name, steps, options))}


def costs(vocabulary: int, options: argparse.Namespace) -> dict[str, float]:
    """Processor time of a training step on one thread, each contestant's over the plain model's."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(vocabulary, (BATCH, SEQ_LEN), generator=generator) for _ in range(2))
    steps = {}
    for name in options.contestants:
        model = Model(ModelConfig(vocab_size=vocabulary, max_seq_len=SEQ_LEN, **SIZES, **CONTESTANTS[name]))
        steps[name] = TrainStep(model, options.precision, 1e-4, optimizer=recipe.OPTIMIZER)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with runtime.use(threads=1):
        for turn in range(5 + options.rounds):
            for name, step in steps.items():
                began = time.process_time()
                step.run([Batch(tokens, targets)])
                if turn >= 5:  # a step is recorded in the second one and checked in the third
                    seconds[name].append(time.process_time() - began)
    return {name: statistics.median(mine / plain for mine, plain in zip(each, seconds[PLAIN])) for name, each in seconds.items()}


def at_equal_cost(rows: list[dict[str, Any]]) -> None:
    """Gives each row of `steps` steps the plain model's loss at its cost: between the plain runs, linear in the logarithm of their steps."""
    plain = sorted((row["steps"], row["loss"]) for row in rows if row["contestant"] == PLAIN)
    (few, first), (many, last) = plain[0], plain[-1]
    for row in rows:
        share = math.log(row["cost"] * row["steps"] / few) / math.log(many / few)
        row["plain_loss_at_its_cost"] = first + share * (last - first)
        row["gain"] = row["plain_loss_at_its_cost"] - row["loss"]


def measure(source: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    text, dataset = text_of(source, options.work)
    rows = [contested(text, dataset, name, options.steps, options) for name in options.contestants]
    rows.append(contested(text, dataset, PLAIN, round(LONGER * options.steps), options))
    ratios = costs(rows[0]["vocabulary"], options)
    rows = [{**row, "cost": ratios[row["contestant"]], "precision": options.precision, "seed": options.seed} for row in rows]
    at_equal_cost(rows)
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    shown = [row for row in rows if row["contestant"] != PLAIN]
    labels = [f"{row['text']}: {row['contestant']}" for row in shown]
    plots.bars(path, "Ablation", labels, {"gain": [row["gain"] for row in shown]}, "nats per token below the plain model at equal cost", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="NAME=PATH[:TOKENIZER]", help="the texts to train on")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS, help="always with the plain model")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=40, help="steps whose cost is measured")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    options.contestants = list(dict.fromkeys((PLAIN, *options.contestants)))
    with runtime.use(threads=options.threads):
        rows = [row for each in options.texts for row in measure(each, options)]
    print_table(
        ("text", "contestant", "steps", "parameters", "loss", "cost of a step", "plain at that cost", "gain"),
        [
            (
                row["text"], row["contestant"], f"{row['steps']:,}", f"{row['parameters']:,}", f"{row['loss']:.4f}", f"{row['cost']:.3f}",
                f"{row['plain_loss_at_its_cost']:.4f}", f"{row['gain']:+.4f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
