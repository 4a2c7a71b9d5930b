"""The scaling law behind `cllm train --hours`: short runs of its recipe over sizes, tokens and texts, a fit, and how far the fit is off.

    python profiling/scaling_law.py python=/usr/lib/python3.11 essays=essays/ --grid python essays --others shakespeare=... german=... --work /tmp/law

The runs are those of `cllm.config.recipe`. They compare losses, not times, so a busy machine does no harm. What is in --work is not run again.

The law is `cllm.config.scaling_law.ScalingLaw`, whose constants are the output of this script. What N counts, and which n-grams measure a text before
any run, is decided by the error that matters: that on a text which the fit did not see.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import plots
from report import RESULTS, add_output_options, finish, print_table, run

from cllm import Model, TrainConfig, runtime
from cllm.config import recipe
from cllm.config.scaling_law import Errors, ScalingLaw
from cllm.data.pipeline import prepare
from cllm.evaluate.baselines import ngram_bits_per_byte
from cllm.evaluate.loss import evaluate_part
from cllm.train.trainer import Trainer

SEQ_LEN = 256
EVALUATION_ROWS = 160  # of the validation split, the same of every run on a text
GRID = ((32, 60e3), (32, 200e3), (32, 500e3), (64, 60e3), (64, 200e3), (64, 500e3), (128, 60e3), (128, 200e3))  # width, tokens
OTHERS = ((64, 200e3), (96, 120e3))
REPEATED = ((64, 300e3), (32, 800e3))  # tokens of a text that has a hundred thousand
RATES = ((64, 0.0025), (64, 0.005), (64, 0.01), (64, 0.02), (128, 0.005), (128, 0.01))  # width, learning rate; over 200,000 tokens
ORDERS = (1, 2, 3, 5)  # of the n-grams that measure a text


# -- runs ------------------------------------------------------------------------------------------------------------------


def measure(name: str, path: str, width: int, tokens: float, work: Path, kind: str, rate: float | None = None) -> dict[str, Any]:
    """One run, or what --work holds of it."""
    batch = recipe.batch_size(tokens, SEQ_LEN)
    rate = recipe.learning_rate(width, tokens) if rate is None else rate
    place = work / f"{name}-{width}-{tokens / 1e3:.0f}k-{batch}-{rate:g}"
    kept = place / "law.json"
    if kept.exists():
        return {**json.loads(kept.read_text()), "kind": kind}
    dataset = prepare(path, work / f"data-{name}")
    steps = round(tokens / (batch * SEQ_LEN))
    config = TrainConfig(
        **recipe.sizes(width), seq_len=SEQ_LEN, batch_size=batch, steps=steps, optimizer=recipe.OPTIMIZER, schedule=recipe.SCHEDULE,
        learning_rate=rate, min_lr=0.0, warmup=recipe.warmup(steps), precision="fp32", restore_best=True, checkpoint_every=10**6, keep=1,
        classes=False, layers_every=0, tensorboard=False,
    )  # fmt: skip
    rows = -(-dataset.tokenizer.vocab_size // 64) * 64
    model = Model(config.model_config(rows), seed=0)
    began = time.perf_counter()
    result = Trainer(model, dataset, config, out=place, tokenizer=dataset.tokenizer).fit()
    seconds = time.perf_counter() - began
    whole = dataset.val.windows(SEQ_LEN, 8, document_mask=True)
    part = whole.part(EVALUATION_ROWS)
    found = evaluate_part(model, part, whole)
    counts = model.config.num_parameters()
    row = {
        "kind": kind,
        "text": name,
        "width": width,
        "parameters": counts,
        "block_parameters": counts - rows * width,
        "vocabulary": rows,
        "tokens": steps * batch * SEQ_LEN,
        "train_tokens": dataset.train.num_tokens,
        "train_bytes": dataset.train.num_bytes,
        "batch_size": batch,
        "learning_rate": rate,
        "bits_per_byte": found.bits_per_byte,
        "loss": found.loss,
        "best_step": result.best_step,
        "steps": steps,
        "text_bits": {str(order): ngram_bits_per_byte(dataset.train, dataset.val, order) for order in ORDERS},
        "seconds": seconds,
    }
    kept.write_text(json.dumps(row))
    print(f"{place.name}: {found.bits_per_byte:.4f} bits per byte, {seconds:.0f} s", file=sys.stderr)
    return row


# -- fit -------------------------------------------------------------------------------------------------------------------

POWERS = tuple(np.arange(0.1, 0.95, 0.05).round(2).tolist())
TEXT_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
REPEATS = (1.0, 2.0, 4.0, 8.0, 16.0)
SUBSETS = tuple(subset for count in (3, 2, 1) for subset in itertools.combinations(range(3), count))
Form = tuple[bool, int]  # of a law: of_blocks and text_order


def fit(rows: Sequence[dict[str, Any]], form: Form) -> tuple[ScalingLaw, float]:
    """The law with the least squared error of the logarithm, and the root mean square of that error. The three factors are at least 0."""
    of_blocks, order = form
    best: tuple[float, ScalingLaw] | None = None
    seen = np.array([row["bits_per_byte"] for row in rows])
    size = np.array([_size(row, of_blocks) for row in rows], dtype=float)
    text = np.array([row["text_bits"][str(order)] for row in rows])
    for repeats, text_power in itertools.product(REPEATS, TEXT_POWERS):
        law = ScalingLaw(of_blocks, order, text_power, 0.0, 0.0, 0.0, 0.0, 0.0, repeats)
        scale = text**text_power / seen  # rows by their own loss: relative errors count
        data = np.array([law.effective(row["tokens"], row["train_tokens"]) for row in rows])
        for size_power, data_power in itertools.product(POWERS, POWERS):
            matrix = np.stack([scale, scale / size**size_power, scale / data**data_power], axis=1)
            factors = _not_negative(matrix)
            error = float(np.mean(np.log(matrix @ factors) ** 2))
            if best is None or error < best[0]:
                floor, size_factor, data_factor = map(float, factors)
                found = {"floor": floor, "size_factor": size_factor, "size_power": size_power, "data_factor": data_factor, "data_power": data_power}
                best = error, replace(law, **found)
    assert best is not None
    return best[1], math.sqrt(best[0])


def _not_negative(matrix: np.ndarray) -> np.ndarray:
    """The factors >= 0 for which matrix @ factors is nearest to 1."""
    best: tuple[float, np.ndarray] | None = None
    for subset in SUBSETS:
        found = np.linalg.lstsq(matrix[:, subset], np.ones(len(matrix)), rcond=None)[0]
        if (found < 0).any():
            continue
        factors = np.zeros(3)
        factors[list(subset)] = found
        error = float(np.sum((matrix @ factors - 1) ** 2))
        if best is None or error < best[0]:
            best = error, factors
        if len(subset) == 3:
            break  # no subset is better
    assert best is not None  # all columns are positive, so that one alone has a positive factor
    return best[1]


def _size(row: dict[str, Any], of_blocks: bool) -> int:
    return int(row["block_parameters" if of_blocks else "parameters"])


def residuals(law: ScalingLaw, rows: Sequence[dict[str, Any]]) -> list[float]:
    """ln of measured over predicted."""
    return [math.log(row["bits_per_byte"] / predicted(law, row)) for row in rows]


def predicted(law: ScalingLaw, row: dict[str, Any]) -> float:
    return law.bits_per_byte(_size(row, law.of_blocks), row["tokens"], row["train_tokens"], row["text_bits"][str(law.text_order)])


def left_out(rows: Sequence[dict[str, Any]], form: Form) -> dict[str, list[float]]:
    """Of each text the residuals under the fit to all others."""
    return {
        name: residuals(fit([row for row in rows if row["text"] != name], form)[0], [row for row in rows if row["text"] == name])
        for name in dict.fromkeys(row["text"] for row in rows)
    }


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(each * each for each in values) / len(values))


def of_texts(found: dict[str, list[float]]) -> float:
    """The error on a text that the fit did not see: each text counts once, however many runs it has."""
    return root_mean_square([root_mean_square(each) for each in found.values()])


def per_doubling(rows: Sequence[dict[str, Any]], form: Form) -> float:
    """How far runs of the most parameters times tokens are off under the fit to those of at most a quarter as much, for each of the two doublings."""
    work = [row["parameters"] * row["tokens"] for row in rows]
    large = [row for row, each in zip(rows, work) if each > max(work) / 4]
    small = [row for row, each in zip(rows, work) if each <= max(work) / 4]
    return root_mean_square(residuals(fit(small, form)[0], large)) / 2


def fitted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The form that serves best on texts that were left out, its constants, and its errors."""
    used = [row for row in rows if row["kind"] != "rates"]
    forms = {form: left_out(used, form) for form in itertools.product((False, True), ORDERS)}
    form = min(forms, key=lambda each: of_texts(forms[each]))
    law, error = fit(used, form)
    work = max(row["parameters"] * row["tokens"] for row in used)
    return {
        "law": asdict(law),
        "errors": asdict(Errors(of_texts(forms[form]), len(forms[form]), per_doubling(used, form), float(work))),
        "runs": len(used),
        "error_of_the_fit": error,
        "left_out": {name: [round(each, 4) for each in values] for name, values in forms[form].items()},
        "forms": {f"{'blocks' if blocks else 'all'}, order {order}": round(of_texts(found), 4) for (blocks, order), found in forms.items()},
    }


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    law = ScalingLaw(**fitted(rows)["law"])
    used = [row for row in rows if row["kind"] != "rates"]
    labels = [f"{row['text']} {row['width']} {row['tokens'] / 1e6:.2g} M" for row in used]
    series = {"measured": [row["bits_per_byte"] for row in used], "fitted": [predicted(law, row) for row in used]}
    plots.bars(path, "Scaling law", labels, series, "bits per byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="NAME=PATH", help="the texts to train on")
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME", help="texts that get all sizes")
    parser.add_argument("--others", nargs="+", default=[], metavar="NAME", help="texts that get two runs each")
    parser.add_argument("--repeated", nargs="+", default=[], metavar="NAME", help="texts so short that they are read many times")
    parser.add_argument("--rates", nargs="+", default=[], metavar="NAME", help="texts on which learning rates are compared")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--rows", type=Path, metavar="FILE.json", help="fit the rows of a file of results again, without any run")
    parser.add_argument("--threads", type=int)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    if options.rows:
        rows = json.loads(options.rows.read_text())["rows"]
    else:
        paths = dict(each.split("=", 1) for each in options.texts)
        with runtime.use(threads=options.threads):
            rows = [measure(name, paths[name], width, 200e3, options.work, "rates", rate) for name in options.rates for width, rate in RATES]
            for kind, names, shapes in (("grid", options.grid, GRID), ("other", options.others, OTHERS), ("repeated", options.repeated, REPEATED)):
                rows += [measure(name, paths[name], width, tokens, options.work, kind) for name in names for width, tokens in shapes]
    print_table(
        ("text", "kind", "width", "parameters", "tokens", "passes", "batch", "rate", "bits per byte"),
        [
            (
                row["text"], row["kind"], str(row["width"]), f"{row['parameters']:,}", f"{row['tokens']:,}",
                f"{row['tokens'] / row['train_tokens']:.1f}", str(row["batch_size"]), f"{row['learning_rate']:g}", f"{row['bits_per_byte']:.4f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    found = fitted(rows) if any(row["kind"] != "rates" for row in rows) else None
    if found is not None:
        print(json.dumps(found, indent=1))
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)
    if options.write:
        path = RESULTS / f"{options.write}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "fit": found}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
