"""How many faults `cllm review` would have shown: single-line faults injected into held-out Python files, against n-grams and chance.

    python profiling/review.py --work /tmp/review                 # trains a small model on the standard library's sources first
    python profiling/review.py --run runs/mine --files held-out/  # a model that is there, and files that it has not seen

Each fault (profiling/faults.py) is put into its file alone, the file is ranked as `cllm review` ranks it, and the fault counts as found where its
line is among the 5 % of the file's lines that come first. N-grams with Kneser-Ney smoothing, counted on the same training tokens, rank by the same
rules, and so does the number of tokens in a line, because long lines hold more faults. What is beside "score" are other ways to rank lines by the
same surprises.
"""

import argparse
import hashlib
import math
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import numpy as np
import report

WORST = 0.05
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__pycache__"}
HELD_OUT = 26  # of 256
RECIPE = ["--vocab-size", "2048", "--embed-dim", "192", "--num-layers", "4", "--num-heads", "4", "--seq-len", "512", "--batch-size", "4",
          "--learning-rate", "0.003"]  # fmt: skip
# How a line's tokens become one number: (surprise, expected surprise) of its tokens, in bits.
RANKINGS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "score": lambda bits, expected: float((bits - expected).max()),
    "peak": lambda bits, expected: float(bits.max()),
    "mean": lambda bits, expected: float(bits.mean()),
    "sum": lambda bits, expected: float(bits.sum()),
    "excess": lambda bits, expected: float((bits - expected).sum()),
}


def corpus(work: Path, most: int | None) -> None:
    """The standard library's sources in two folders, train and held-out; a file's name alone decides where it goes."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"))[:most]:
        name = path.relative_to(library)
        if not LEFT_OUT & set(name.parts):
            side = "held-out" if hashlib.sha256(name.as_posix().encode()).digest()[0] < HELD_OUT else "train"
            (work / side / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, work / side / name)


def trained(work: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """The run and the held-out files in `work`, made where they are not there; a run that was interrupted goes on."""
    if not (work / "train").exists():
        corpus(work, 400 if options.tiny else None)
    small = ["--embed-dim", "32", "--num-layers", "1", "--num-heads", "2", "--seq-len", "64", "--batch-size", "4", "--vocab-size", "512"]
    recipe = small if options.tiny else RECIPE
    command = [sys.executable, "-m", "cllm", "train", work / "train", "--out", work / "run", "--steps", options.steps, *recipe]
    if options.threads:
        command += ["--threads", options.threads]
    if subprocess.run([*map(str, command)], stdout=sys.stderr).returncode:
        sys.exit("the model could not be trained")
    return work / "run", work / "held-out"


def places(tokenizer: Any, tokens: np.ndarray, text: str, bits: np.ndarray, expected: np.ndarray, line: int) -> dict[str, tuple[int, int]]:
    """For each ranking (the place of line number `line` among the lines that `cllm review` ranks, counted from 0, and their number)."""
    from cllm.evaluate.review import place_tokens

    stand = place_tokens(tokenizer, tokens, text, is_python=True)
    stand.is_ranked[0] = False  # the first token of a text is not scored
    bounds = np.searchsorted(stand.line, np.arange(text.count("\n") + 2))
    every = {}
    for number, words in enumerate(text.split("\n")):
        here = bounds[number] + np.flatnonzero(stand.is_ranked[bounds[number] : bounds[number + 1]])
        if words.strip() and len(here):
            every[number] = bits[here], expected[here]
    found = {}
    for name, ranking in RANKINGS.items():
        values = {number: ranking(*parts) for number, parts in every.items()}
        order = sorted(values, key=lambda number: -values[number])
        found[name] = (order.index(line - 1) if line - 1 in values else len(order), len(order))
    return found


def measure(run: Path, files: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    from cllm import runtime
    from cllm.checkpoint.model_file import load
    from cllm.cli.trained_on import run_of
    from cllm.evaluate.baselines import count_ngrams
    from cllm.evaluate.surprise import surprise_of
    from cllm.train.run_folder import own_tokens

    model, tokenizer = load(run)
    stored = run_of(str(run))
    assert tokenizer is not None and stored is not None
    with runtime.progress.stage("counting n-grams"):
        ngrams = count_ngrams(own_tokens(stored).train)
    texts = {str(path): text for path in sorted(files.rglob("*.py")) if len(text := path.read_text("utf-8")) <= options.longest}
    injected = faults.draw(texts, options.faults, options.seed)
    chance = random.Random(options.seed)
    outcomes: list[tuple[str, str, str, bool]] = []  # ranker, ranking, kind, whether it was found
    for name, fault in runtime.progress.track(injected, len(injected), "ranking files with a fault"):
        text = fault.applied(texts[name])
        tokens = np.array(tokenizer.encode(text), dtype=np.int64)
        surprise = surprise_of(model, tokens)
        counted = ngrams.bits(tokens, np.array([0]))
        for ranker, bits, expected in (("model", surprise.bits, surprise.expected), ("n-gram", counted, np.zeros(len(tokens)))):
            for ranking, (place, lines) in places(tokenizer, tokens, text, bits, expected, fault.line).items():
                if ranker == "model" or ranking in ("peak", "mean", "sum"):
                    outcomes.append((ranker, ranking, fault.kind, place < math.ceil(WORST * lines)))
        length, lines = places(tokenizer, tokens, text, np.ones(len(tokens)), np.zeros(len(tokens)), fault.line)["sum"]
        outcomes.append(("length", "tokens", fault.kind, length < math.ceil(WORST * lines)))
        outcomes.append(("random", "", fault.kind, chance.randrange(lines) < math.ceil(WORST * lines)))
    return [row for kind in ("all", *faults.KINDS) for row in summary(outcomes, kind)]


def summary(outcomes: list[tuple[str, str, str, bool]], kind: str) -> list[dict[str, Any]]:
    from cllm.evaluate.shares import Share

    rows = []
    for ranker, ranking in dict.fromkeys(each[:2] for each in outcomes):
        hits = [each[3] for each in outcomes if each[:2] == (ranker, ranking) and kind in ("all", each[2])]
        rows.append(
            {
                "kind": kind,
                "ranker": ranker,
                "by": ranking,
                "found": sum(hits),
                "faults": len(hits),
                "interval": Share(sum(hits), len(hits)).interval(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the corpus and the run; kept, so that the same command goes on")
    parser.add_argument("--run", type=Path, help="a run that is there, instead of a new one")
    parser.add_argument("--files", type=Path, help="with --run: folder of Python files that the run has not seen")
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=30_000, help="characters of the longest file that gets faults")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tiny", action="store_true", help="a model and a corpus for a test of this script")
    report.add_output_options(parser)
    options = parser.parse_args()
    if (options.run is None) != (options.files is None) or options.plot:
        parser.error("--run and --files belong together, and there is nothing to plot")
    from cllm import runtime

    with runtime.use(threads=options.threads), tempfile.TemporaryDirectory() as scratch:
        run, files = (options.run, options.files) if options.run else trained(options.work or Path(scratch), options)
        rows = measure(run, files, options)
    cells = [
        (
            row["kind"],
            f"{row['ranker']} {row['by']}".strip(),
            f"{row['found']} of {row['faults']}",
            *(f"{100 * each:.0f} %" for each in row["interval"] or ()),
        )
        for row in rows
    ]
    report.print_table(("faults", "ranked by", "among the first 5 %", "95 % from", "to"), cells)
    report.finish(options, rows, lambda path: None, options.threads)


if __name__ == "__main__":
    report.run(main)
