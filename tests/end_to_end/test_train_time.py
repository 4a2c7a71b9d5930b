"""`cllm train --minutes`: chosen, told, trained, continued, and refused where it cannot be."""

import importlib
import json
import math
from pathlib import Path

from command import cllm

PROFILING = Path(__file__).parents[2] / "profiling"

PLAIN = ("--threads", 2, "--set", "log.tensorboard=false", "--json")
FAST = ("--architecture", "fast")  # of any size
TEXT = "the quick brown fox jumps over the lazy dog number {} and comes back to sleep for {} hours\n"


def test_a_fifth_of_a_minute_from_text_to_model(tmp_path, monkeypatch):
    (tmp_path / "fox.txt").write_text("".join(TEXT.format(number, number % 24) for number in range(3000)))
    minutes, ran = 0.2, None
    while ran is None or "leaves too little" in ran.err:  # on a machine that takes so long to get ready
        minutes *= 1 if ran is None else 3
        ran = cllm("train", "fox.txt", "--minutes", minutes, *FAST, *PLAIN, cwd=tmp_path)
    assert ran.status == 0, ran.err
    found = ran.json
    rows = [json.loads(line) for line in (tmp_path / "runs" / "fox" / "metrics.jsonl").read_text().splitlines()]
    losses = {}  # of evaluations over as many tokens: the last one may be of the whole validation text
    for row in rows:
        if row["kind"] == "eval":
            losses.setdefault(row["num_targets"], []).append(row["loss"])
    assert found["step"] >= 1 and found["best_loss"] in map(min, losses.values())
    assert found["validation"]["loss"] <= min(losses.get(found["validation"]["num_targets"], [math.inf])) * (1 + 1e-6)
    assert "in 8 of 10 cases" in ran.err and "tokens/s" in ran.err and "muon" in ran.err and "the lowest predicted loss of" in ran.err
    assert (found["sample"] is not None) == ("A sample, starting from nothing" in ran.err)
    monkeypatch.syspath_prepend(PROFILING)
    promise = importlib.import_module("time_promise").figures(found, ran.err)
    assert promise["low"] < promise["predicted"] < promise["high"] and promise["tokens"] == found["tokens"] and promise["planned_tokens"] > 0
    config = (tmp_path / "runs" / "fox" / "config.toml").read_text()
    assert f"minutes = {minutes}" in config and "pace = " in config and "wsd" in config
    assert "looked up by n-grams" in ran.err and "--to cllm --out runs/fox.cllm" in ran.err and "--to hf" not in ran.err
    again = cllm("train", "fox.txt", "--minutes", minutes, *FAST, *PLAIN, cwd=tmp_path)
    assert again.status == 0 and again.json["step"] == found["step"] and "is finished" in again.err and "--minutes MORE" in again.err
    other = cllm("train", "fox.txt", "--minutes", minutes + 1, *FAST, *PLAIN, cwd=tmp_path)
    assert other.status == 2 and "minutes" in json.loads(other.out)["error"]


def test_what_cannot_be_is_refused_before_any_work(tmp_path):
    (tmp_path / "fox.txt").write_text(TEXT.format(1, 2) * 100)
    for words, told in (
        (("--minutes", 1, "--steps", 10), "steps and minutes exclude each other"),
        (("--minutes", 1, "--hours", 1), "hours and minutes exclude each other"),
        (("--minutes", 1, "--follow"), "are for one training"),
        (("--hours", "soon"), "hours must be a number"),
    ):
        ran = cllm("train", tmp_path / "fox.txt", *words, cwd=tmp_path)
        assert ran.status == 2 and told in ran.err, ran.err
    assert not (tmp_path / "runs").exists()
    ran = cllm("train", "fox.txt", "--minutes", 0.0001, cwd=tmp_path)
    assert ran.status == 2 and "leaves too little" in ran.err and "--minutes" in ran.err
