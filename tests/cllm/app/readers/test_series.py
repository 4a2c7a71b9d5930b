"""Curves of a run: no row is lost, whatever the file has become, and a look at a file that grows costs what is new."""

import json
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.app.readers.columns import FIELDS, TRAIN, by_arrow, by_python
from cllm.app.readers.envelope import envelope, starts
from cllm.app.readers.rows import RunRows
from cllm.app.readers.series import Shelf, layers, series
from cllm.monitor.metrics import Metrics
from cllm.monitor.records import EvaluationRow, FaultRow, LayersRow, TrainRow
from cllm.report.reading import read_run

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)


def row(step, loss=2.0, **more):
    values = {"learning_rate": 1e-3, "gradient_norm": 1.0, "largest_gradient": 0.1, "num_nonfinite": 0, "updated": True, "tokens": 10 * step}
    return TrainRow(step=step, loss=loss, seconds=float(step), **{**values, **more})


def write(run, *rows):
    with Metrics(run) as metrics:
        for each in rows:
            metrics.write(each)


def read(run):
    rows = RunRows(run / "metrics.jsonl")
    rows.update()
    return rows


# -- envelopes -------------------------------------------------------------------------------------------------------------


@given(st.lists(NUMBERS, max_size=200), st.integers(1, 300))
def test_every_value_lies_in_the_envelope_of_its_bucket(values, buckets):
    array = np.array(values, dtype=np.float64)
    begins = starts(len(array), buckets)
    found = envelope(array, begins)
    assert len(begins) == min(len(values), buckets) and (not len(begins) or begins[0] == 0) and np.all(np.diff(begins) > 0)
    ends = [*begins[1:].tolist(), len(values)]
    seen = 0
    for begin, end, least, largest, mean in zip(begins.tolist(), ends, found.least, found.largest, found.mean):
        part = [each for each in values[begin:end] if math.isfinite(each)]
        seen += end - begin
        if part:
            assert least == min(part) and largest == max(part) and least <= mean <= largest
        else:
            assert math.isnan(least) and math.isnan(largest) and math.isnan(mean)
    assert seen == len(values) and found.nonfinite == sum(not math.isfinite(each) for each in values)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(1, 60))
def test_means_of_buckets_are_means(values, buckets):
    array = np.array(values)
    begins = starts(len(array), buckets)
    means = [np.mean(part) for part in np.split(array, begins[1:])]
    assert np.allclose(envelope(array, begins).mean, means, rtol=1e-9, atol=1e-6)


# -- files -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 30), NUMBERS), max_size=60), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_curves_are_those_of_the_report(tmp_path_factory, losses, points):
    """Rows in any order, with steps that come twice: what counts is what `cllm report` draws."""
    run = tmp_path_factory.mktemp("run")
    write(run, *(row(step, loss) for step, loss in losses))
    expected = read_run(run).curve("loss") if losses else []
    found = series(read(run), points=10_000)
    assert found["rows"] == len(expected) and found["x"] == [step for step, _ in expected]
    assert found["series"]["loss"]["min"] == [loss if math.isfinite(loss) else None for _, loss in expected]
    assert found["series"]["loss"]["nonfinite"] == sum(not math.isfinite(loss) for _, loss in expected)
    few = series(read(run), points=points)
    assert few["rows"] == found["rows"] and len(few["x"]) == min(points, len(expected)) and few["x"][-1:] == found["x"][-1:]
    json.dumps(few, allow_nan=False)


LINE = st.one_of(
    st.binary(max_size=40).filter(lambda line: b"\n" not in line),
    st.sampled_from(
        [b"{", b"[]", b"null", b'{"kind": "train"}', b'{"kind": "train", "step": -1}', b'{"kind": "train", "step": "1"}', b'{"kind": "new"}']
    ),
    st.builds(
        lambda value: json.dumps({"kind": "train", "step": 3, "loss": value}).encode(), st.recursive(st.none() | st.text(max_size=5), st.lists)
    ),
    st.builds(lambda step, loss: json.dumps(row(step, loss).to_dict()).encode(), st.integers(0, 100), NUMBERS),
)


@given(st.lists(LINE, max_size=20), st.binary(max_size=30), st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_read_as_far_as_it_can_be_also_in_pieces(tmp_path_factory, lines, torn, data):
    run = tmp_path_factory.mktemp("run")
    path = run / "metrics.jsonl"
    content = b"".join(line + b"\n" for line in lines) + torn.replace(b"\n", b"")
    path.write_bytes(content)
    whole = read(run)
    pieces = RunRows(path)
    path.write_bytes(b"")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    with open(path, "ab", buffering=0) as file:
        for begin, end in zip([0, *cuts], [*cuts, len(content)]):
            file.write(content[begin:end])
            pieces.update()
    for rows in (whole, pieces):
        json.dumps(series(rows, keys=FIELDS[1:]), allow_nan=False)
        assert rows.num_rows + rows.num_damaged + rows.num_foreign <= len(lines)
    assert np.array_equal(whole.column("loss"), pieces.column("loss"), equal_nan=True)
    assert (whole.num_damaged, whole.num_foreign, whole.num_rows) == (pieces.num_damaged, pieces.num_foreign, pieces.num_rows)


VALUE = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), NUMBERS, st.sampled_from(["nan", "inf", "-inf", "x"]), st.just([1]))


@given(st.lists(st.dictionaries(st.sampled_from([*FIELDS, "other"]), VALUE, max_size=6), min_size=1, max_size=8))
@settings(deadline=None)
def test_both_readers_give_the_same_columns(values):
    """What pyarrow takes at all it takes as Python does; the rest is left to Python."""
    pytest.importorskip("pyarrow", reason="the quick reader, of the extra [data]")
    rows = [{"kind": "train", "step": step, **{name: each for name, each in given.items() if name != "step"}} for step, given in enumerate(values)]
    lines = [json.dumps(each).encode() for each in rows]
    assert all(line.startswith(TRAIN) for line in lines)
    found = by_arrow(lines)
    assert found is None or np.array_equal(found, by_python(rows), equal_nan=True)
    plain = [row(step, 2.5, noise_scale=None if step % 2 else 7.0).to_dict() for step in range(1, 9)]
    assert np.array_equal(by_arrow([json.dumps(each).encode() for each in plain]), by_python(plain), equal_nan=True)


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    write(tmp_path, *(row(step) for step in range(1, 50)))
    rows = read(tmp_path)
    taken = []
    monkeypatch.setattr(rows, "_take", lambda lines, take=rows._take: (taken.append(len([each for each in lines if each])), take(lines)))
    rows.update()
    write(tmp_path, row(50), row(51))
    rows.update()
    assert taken == [2] and rows.column("step").tolist() == list(range(1, 52))


def test_a_torn_last_line_is_read_when_it_is_whole(tmp_path):
    line = json.dumps(row(1).to_dict())
    (tmp_path / "metrics.jsonl").write_text(line[:20])
    rows = read(tmp_path)
    assert rows.num_rows == 0 and rows.num_damaged == 0
    (tmp_path / "metrics.jsonl").open("a").write(line[20:] + "\n")
    rows.update()
    assert rows.num_rows == 1 and rows.num_damaged == 0


def test_a_file_that_was_cut_back_by_a_resumed_run_is_another_file(tmp_path):
    """Also where it has grown beyond its old length again before anybody looks."""
    write(tmp_path, *(row(step, 5.0) for step in range(1, 21)))
    rows = read(tmp_path)
    with Metrics(tmp_path) as metrics:
        metrics.truncate(lambda values: values["step"] <= 10)
    write(tmp_path, *(row(step, 4.0) for step in range(11, 41)))
    rows.update()
    assert rows.column("step").tolist() == list(range(1, 41)) and rows.column("loss").tolist() == [5.0] * 10 + [4.0] * 30


def test_a_file_that_another_program_wrote_anew_in_place_is_seen(tmp_path):
    write(tmp_path, *(row(step, 5.0) for step in range(1, 21)))
    rows = read(tmp_path)
    content = (tmp_path / "metrics.jsonl").read_bytes().replace(b'"loss": 5.0', b'"loss": 4.0') * 2
    with open(tmp_path / "metrics.jsonl", "r+b") as file:
        file.write(content)
    rows.update()
    assert set(rows.column("loss").tolist()) == {4.0}
    os.truncate(tmp_path / "metrics.jsonl", 0)
    rows.update()
    assert rows.num_rows == 0


def test_a_line_without_end_costs_no_more_memory_than_a_few_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("cllm.app.readers.rows._BLOCK", 64)
    monkeypatch.setattr("cllm.app.readers.rows._LONGEST", 200)
    good = json.dumps({"kind": "train", "step": 1})
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{'x' * 5_000}\n{good.replace('1', '2')}\n")
    rows = read(tmp_path)
    assert rows.column("step").tolist() == [1, 2] and rows.num_damaged == 1 and "1 line" in rows.problems[0]


def test_axes_and_ranges(tmp_path):
    write(tmp_path, *(row(step, float(step)) for step in range(1, 101)))
    evaluation = EvaluationRow(step=50, loss=1.0, perplexity=2.7, bits_per_byte=0.5, accuracy=0.1, num_targets=5, best=True, unigram_loss=3.0)
    write(tmp_path, evaluation)
    found = series(read(tmp_path), "tokens", ["loss"], 200, 600, 4)
    assert found["rows"] == 41 and found["x"][-1] == 600 and min(found["series"]["loss"]["min"]) == 20
    (only,) = found["evaluations"]
    assert (only["step"], only["tokens"], only["time"], only["best"], only["unigram_loss"]) == (50, 500, 50, True, 3.0)
    assert series(read(tmp_path), "time", ["loss"], 60, None, 4)["evaluations"] == []
    assert series(read(tmp_path), "time", ["loss"], 61.5, 61.6, 4)["x"] == []


def test_layers_keep_their_peaks(tmp_path):
    norms = {"model.layers.0.a.weight": 3.0, "model.layers.0.b.weight": 4.0, "model.norm.weight": 1.0}
    for step in range(1, 41):
        peak = dict.fromkeys(norms, 9.0) if step == 17 else norms
        write(tmp_path, LayersRow(step=step, gradient_norms=peak, update_ratios={"model.norm.weight": step / 100}))
    found = layers(read(tmp_path), 4)
    assert found["names"] == ["layer 0", "norm"] and found["steps"] == [10, 20, 30, 40]
    assert found["gradient_norms"][1] == [1.0, 9.0, 1.0, 1.0] and found["gradient_norms"][0][0] == 5.0
    assert found["update_ratios"][0] == [None] * 4 and found["update_ratios"][1] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert layers(read(tmp_path / "none"), 4) == {"steps": [], "names": [], "gradient_norms": [], "update_ratios": []}


def test_faults_and_updates_that_were_left_out_are_kept(tmp_path):
    write(tmp_path, row(1), row(2, updated=False), FaultRow(step=2, event="spike", action="warn", text="it jumped", fault_step=2, data=2))
    rows = read(tmp_path)
    assert {(type(each), each.step) for each in rows.events} == {(TrainRow, 2), (FaultRow, 2)}


def test_the_shelf_forgets_runs_that_nobody_looks_at(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, *(row(step) for step in range(1, 2_000)))
    shelf = Shelf(most_bytes=700_000)
    for name in ("a", "b", "c", "a"):
        with shelf.rows(tmp_path / name) as rows:
            assert rows.num_rows == 1_999
    assert list(shelf._kept) == [tmp_path / "c", tmp_path / "a"]
