"""The constants of the scaling law are those of the committed fit, and its errors those that its runs show."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from cllm.config.scaling_law import ERRORS, LAW

FOUND = json.loads((Path(__file__).parents[3] / "profiling" / "results" / "scaling-law.json").read_text())


def test_the_constants_are_those_of_the_fit():
    assert asdict(LAW) == pytest.approx(FOUND["fit"]["law"], rel=1e-3)
    assert asdict(ERRORS) == pytest.approx(FOUND["fit"]["errors"], rel=1e-3)


def test_the_law_predicts_the_runs_as_well_as_the_fit_says():
    rows = [row for row in FOUND["rows"] if row["kind"] != "rates"]
    off = []
    for row in rows:
        size = row["block_parameters"] if LAW.of_blocks else row["parameters"]
        predicted = LAW.bits_per_byte(size, row["tokens"], row["train_tokens"], row["text_bits"][str(LAW.text_order)])
        off.append(math.log(row["bits_per_byte"] / predicted))
    assert math.sqrt(sum(each**2 for each in off) / len(off)) == pytest.approx(FOUND["fit"]["error_of_the_fit"], rel=0.01)
    assert ERRORS.of_texts > FOUND["fit"]["error_of_the_fit"]  # a text that was not seen is harder
    within = sum(abs(each) <= math.log(ERRORS.factor(1.0, ERRORS.most_work)) for each in off)
    assert within >= 0.8 * len(off)
