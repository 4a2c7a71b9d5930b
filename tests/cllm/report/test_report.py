"""`cllm report`: pages that are whole and safe whatever the run's files hold, and that say what the files say."""

import json
import math
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from command import cllm
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.monitor.environment import record_environment
from cllm.monitor.metrics import Metrics, read_metrics
from cllm.monitor.records import EvaluationRow, FaultRow, LayersRow, MachineRow, Sample, StepResult, StepTiming, TrainRow
from cllm.report import charts, write_report
from cllm.report.layers import layer_name, layer_values
from cllm.report.markup import element
from cllm.report.reading import read_run
from cllm.report.timing import time_split
from cllm.runtime.errors import OutputError, UserError
from cllm.train.trainer import Trainer

VOID = {"meta", "br"}
FIXTURES = Path(__file__).parents[2] / "fixtures"


class Page(HTMLParser):
    """Fails on a tag that does not close, a repeated id, a script, or anything that would be loaded; keeps what is visible."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.said, self.tags, self.figures, self.classes = [], {}, [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == [], self.open
        for labels in self.figures:
            assert len(labels) == 2 and all(self.ids[label] for label in labels)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attributes)
        self.classes += values.get("class", "").split()
        assert len(values) == len(attributes), attributes
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "use", "image", "base", "form", "a"), tag
        for key, value in attributes:
            assert not key.startswith("on") and key not in ("href", "src", "srcset", "action", "style", "xlink:href", "data"), key
            assert "http" not in value and "url(" not in value and "//" not in value, (key, value)
        if tag == "svg" and values.get("aria-hidden") != "true":
            assert values["role"] == "img"
            self.figures.append(values["aria-labelledby"].split())
        if "id" in values:
            assert values["id"] not in self.ids, values["id"]
            self.ids[values["id"]] = tag

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if "style" in self.open:
            assert "@import" not in data and "url(" not in data and "http" not in data
        else:
            self.said.append(data)

    @property
    def text(self):
        return "\n".join(self.said)

    def of_class(self, name):
        return self.classes.count(name)


def page_of(*folders, out=None):
    place, _ = write_report(folders, out)
    return Page(place.read_text("utf-8"))


# -- a run that the trainer wrote ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two starts of a run with everything that can be recorded: one layer without a gradient, and an update that was left out."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("It was 1 of 2, or 3 (of 44)? " * 60)
    dataset = prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.2)
    values = {
        "steps": 8, "seq_len": 16, "batch_size": 2, "eval_every": 4, "checkpoint_every": 4, "precision": "fp32", "threads": 1, "learning_rate": 2e-3,
        "layers_every": 1, "classes": True, "activations": True, "sample_every": 4, "tensorboard": False, "on_nonfinite": "skip", "shuffle": "none",
    }  # fmt: skip
    for last in (5, 8):
        model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=2, num_heads=2, max_seq_len=16))
        with torch.no_grad():
            dict(model.named_parameters())["model.layers.1.self_attn.o_proj.weight"].zero_()  # what is before it gets no gradient in the first steps
        run = Trainer(model, dataset, TrainConfig(**values), out=folder / "run")
        bad, loss, record = run.data.batches.batch(2).tokens, model.loss, run._record

        def poisoned(tokens, *args, bad=bad, loss=loss, **kwargs):
            value = loss(tokens, *args, **kwargs)
            return value * math.nan if not kwargs.get("return_stats") and torch.equal(tokens, bad) else value

        def broken_off(result, record=record, run=run, last=last):
            record(result)
            if run.step == last < 8:
                raise KeyboardInterrupt

        model.loss, run._record = poisoned, broken_off
        try:
            run.fit()
        except KeyboardInterrupt:
            assert last == 5
    return folder / "run"


def test_a_trained_run_is_reported_with_everything_that_was_recorded(trained, tmp_path):
    page = page_of(trained, out=tmp_path / "page.html")
    rows = list(read_metrics(trained / "metrics.jsonl"))
    assert {row["kind"] for row in rows} == {"train", "eval", "layers", "activations", "event"}
    flagged = [name for row in rows if row["kind"] == "layers" for name in row["vanishing"]]
    assert any("layers.1.self_attn" in name for name in flagged) and all(name in page.text for name in flagged)
    assert "Gradients out of line" in page.text and "vanishing" in page.text
    for title in (
        "Loss",
        "Perplexity",
        "Speed",
        "Gradient norm by layer",
        "Update to weight by layer",
        "Gradients by size",
        "Largest activation by block",
    ):
        assert title in page.said, title
    fault = next(row for row in rows if row["kind"] == "event")
    assert fault["text"] in page.text and "nonfinite" in page.said and "skip" in page.said and f"step {fault['step']}: nonfinite" in page.text
    assert page.text.count("update left out") == 0  # the event tells it
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert f"{last['loss']:.4f}" in page.text and "top5 accuracy" in page.text and "8 of 8" in page.text
    assert "Confusion: a row for what was to come" in page.text and "punctuation" in page.text and "recall" in page.said
    assert not page.of_class("problems")
    for part in ("data", "forward", "backward", "optimizer"):
        assert part in page.said
    run = read_run(trained)
    assert run.num_parameters and len(run.environments) == 2 and [sample.step for sample in run.samples] == [4, 8]
    assert all(sample.text and sample.text in page.text for sample in run.samples)


def test_the_source_of_every_setting_is_that_of_the_configuration(trained):
    state = json.loads(max(trained.glob("checkpoints/*/state.json")).read_text())
    found = {each.key: (each.value, each.source) for each in read_run(trained).settings}
    expected = TrainConfig.from_dict(state["config"], state["sources"]).describe()
    assert found == {key: (value, source) for key, value, source, _ in expected if value is not None}
    assert found["optim.learning_rate"] == (2e-3, "argument") and found["optim.beta2"][1] == "default"


def test_sources_of_a_run_without_a_checkpoint_and_of_an_earlier_version_are_known(trained, tmp_path):
    config = TrainConfig.from_layers(flags={"steps": 7, "data.path": "a [b] # c/d"}, sets=["optim.beta2=0.9"])
    begun = {each.key: (each.value, each.source) for each in read_run(make_run(tmp_path / "begun", [], config)).settings}
    assert begun == {key: (value, source) for key, value, source, _ in config.describe() if value is not None}
    for version in ("v1", "v2"):  # the sources are in their checkpoints alone
        old = read_run(FIXTURES / f"checkpoint-{version}" / "run")
        sources = {each.key: each.source for each in old.settings}
        assert sources["train.steps"] == "argument" and sources["train.seed"] == "default" and not old.problems
        assert len(old.rows(TrainRow)) == 6 and len(old.evaluations) == 2 and old.best == (6, pytest.approx(2.3541, abs=1e-4))


# -- rows that are written for a purpose ---------------------------------------------------------------------------------------------


def train_row(step, loss=None, updated=True, tokens=None, **timing):
    result = StepResult(4 / step if loss is None else loss, 1.5, 0.5, 0, 64, 1e-3, updated)
    return TrainRow.of(step, result, 64 * step if tokens is None else tokens, 0.5 * step, StepTiming(**{"tokens_per_second": 256.0, **timing}))


def eval_row(step, loss, **values):
    figures = {"perplexity": math.exp(loss), "bits_per_byte": loss / 2, "accuracy": 0.25, "num_targets": 10, "best": False}
    return EvaluationRow(step=step, loss=loss, **{**figures, **values})


def make_run(folder, rows, config=None, samples=None, tail=b""):
    """A run as the writers of the trainer write it, and `tail` after the last row of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    (folder / "metrics.jsonl").touch()
    with Metrics(folder) as metrics:
        for row in rows:
            metrics.write(row)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(tail)
    if config is not None:
        (folder / "config.toml").write_text(config.to_toml(), "utf-8")
        record_environment(folder, config.sources)
    if samples is not None:
        (folder / "samples.txt").write_bytes(samples.encode("utf-8", "surrogatepass"))
    return folder


USUAL = [*(train_row(step) for step in range(1, 101)), *(eval_row(step, 5 / step) for step in (25, 50, 75, 100))]


def test_a_page_says_what_the_run_came_to(tmp_path):
    config = TrainConfig(steps=100, learning_rate=2e-3)
    samples = "".join(Sample(step=step, text=text).to_text() for step, text in ((50, "once upon"), (100, "a time")))
    page = page_of(make_run(tmp_path / "demo", USUAL, config, samples))
    for words in ("Training run demo", "100 of 100", "0.0500 at step 100", "optim.learning_rate", "0.002", "argument", "once upon", "a time", "0:50"):
        assert words in page.text, words
    assert page.text.index("a time") < page.text.index("once upon")  # the newest first
    assert page.tags.count("figure") >= 8


def test_curves_lie_where_the_numbers_say():
    svg = charts.line_chart("x", "Loss", [charts.Series("loss", [(0, 2.0), (50, 1.0), (100, 0.0)])], "step")
    path = re.search(r'<path d="M([^"]*)"', svg).group(1)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, place.split()) for place in path.split("L"))
    assert (x0, x1, x2) == (charts.LEFT, (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2, charts.WIDTH - charts.RIGHT)
    assert (y0, y2) == (charts.TOP, charts.HEIGHT - charts.BOTTOM) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert "2 at 0, 0 at 100; lowest 0 at 100, highest 2 at 0" in svg
    log = charts.line_chart("x", "Norm", [charts.Series("norm", [(0, 1.0), (1, 10.0), (2, 100.0)])], "step", log=True)
    heights = [float(place.split()[1]) for place in re.search(r'<path d="M([^"]*)"', log).group(1).split("L")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.1)


def test_what_is_not_finite_breaks_the_line_and_is_marked(tmp_path):
    rows = [train_row(step, loss=math.nan if step == 3 else None, updated=step != 3) for step in range(1, 6)]
    page = page_of(make_run(tmp_path / "run", rows))
    assert "update left out" in page.text and "training: nan at 3" in page.text
    svg = charts.line_chart("x", "Loss", [charts.Series("loss", [(1, 1.0), (2, 2.0), (3, math.inf), (4, 1.0), (5, 2.0)])], "step")
    assert re.search(r'<path d="(M[^"]*)" class="line', svg).group(1).count("M") == 2


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=3000))
@settings(max_examples=50)
def test_thinning_keeps_extremes_and_what_is_not_finite(values):
    points = list(enumerate(values))
    kept = charts.thinned(points)
    assert len(kept) <= max(charts.MOST_POINTS * 1.6, 3) and [x for x, _ in kept] == sorted(x for x, _ in kept)
    finite = [y for y in values if math.isfinite(y)]
    if finite:
        left = [y for _, y in kept if math.isfinite(y)]
        assert min(left) == min(finite) and max(left) == max(finite)
    assert (len(finite) == len(values)) == all(math.isfinite(y) for _, y in kept)


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats()), max_size=40), st.booleans())
def test_any_points_give_a_chart_inside_its_frame(points, log):
    points = sorted(points, key=lambda point: point[0])
    svg = str(charts.line_chart("x", "t", [charts.Series("s", points, dots=True)], "step", log))
    Page(svg)
    for name, limit in (("x1", charts.WIDTH), ("x", charts.WIDTH), ("cx", charts.WIDTH), ("y1", charts.HEIGHT), ("cy", charts.HEIGHT)):
        assert all(-1 <= float(value) <= limit + 1 for value in re.findall(rf' {name}="([^"]*)"', svg))
    for path in re.findall(r'<path d="([^"]*)" class="line', svg):
        assert all(math.isfinite(float(value)) for value in re.findall(r"-?[\d.]+|nan|inf", path))


@given(st.floats(-1e300, 1e300), st.floats(0, 1e300))
@example(low=0.0, span=5e-324)
@example(low=1.1500084600933486e16, span=12.0)
def test_ticks_are_few_and_within_the_axis(low, span):
    found = charts.ticks(low, low + span)
    assert 1 <= len(found) <= 8 and all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in found)


# What a damaged, foreign or future metrics.jsonl may hold.
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**400)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["nan", "inf", "-inf", "</script><script>alert(1)</script>", "NaN", ""]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
# Rows of the right fields with one or two that are odd, and rows of odd fields alone.
GOOD = [
    train_row(3, forward_seconds=0.1),
    eval_row(4, 2.0, classes={"word": {"f1": 0.5}}, confusion={"word": {"word": 3}}),
    LayersRow(step=5, gradient_norms={"model.layers.0.w": 1.0, "x<y": math.inf}, update_ratios={"embed": 0.1}, vanishing=("x<y",)),
    FaultRow(step=6, event="spike", action="warn", text="</pre>", fault_step=6, data=5, documents=("a<b>",)),
    MachineRow(step=7, event="slow_disk", action="wait", text="slow", seconds=1.0),
]
NAMES = sorted({name for row in GOOD for name in row.to_dict()} | {"a<b>", "flags"})
ROW = st.builds(
    lambda row, odd: {**row.to_dict(), **odd}, st.sampled_from(GOOD), st.dictionaries(st.sampled_from(NAMES), ODD, max_size=2)
) | st.dictionaries(st.sampled_from(NAMES), ODD, max_size=8)


@given(st.lists(ROW, max_size=12), st.binary(max_size=40), st.text(max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_of_a_run_stops_the_report_or_breaks_the_page(tmp_path, rows, tail, sample):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    run = make_run(tmp_path / "run", [], samples=f"=== step 1\n{sample}\n", tail=lines + tail)
    (run / "environment.jsonl").write_bytes(lines + tail)
    page_of(run)
    page_of(run, make_run(tmp_path / "other", USUAL), out=tmp_path / "comparison.html")


@given(st.text(st.characters(codec=None), max_size=80))
def test_text_and_attributes_come_out_as_they_went_in(content):
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            self.attribute = dict(attributes)["title"]

        def handle_data(self, data):
            self.content = getattr(self, "content", "") + data

    reader = Reader(convert_charrefs=True)
    reader.feed(element("p", content, title=content))
    reader.close()
    allowed = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", content)
    assert getattr(reader, "content", "") == allowed == reader.attribute
    element("p", content).encode("utf-8")


def test_samples_names_settings_and_events_cannot_leave_their_place(tmp_path):
    evil = "</pre></script><script>alert('1')</script><img src=x onerror=alert(2)>&lt;"
    rows = [
        *USUAL,
        FaultRow(step=3, event=evil, action=evil, text=evil, fault_step=3, data=2, documents=(evil,)),
        eval_row(100, 1.0, classes={evil: {evil: 1.0}}),
        LayersRow(step=3, gradient_norms={evil: 1.0}, update_ratios={evil: 1.0}, exploding=(evil,), gradient_histogram={evil: 1}),
    ]
    config = TrainConfig(tokenizer=evil, steps=100)
    page = page_of(make_run(tmp_path / evil.replace("/", "|"), rows, config, Sample(step=1, text=evil).to_text()))
    assert page.text.count(evil) >= 10 and "script" not in page.tags


def test_a_half_written_file_is_read_as_far_as_it_goes(tmp_path):
    whole = json.dumps(train_row(103, loss=0.125).to_dict()).encode()
    tail = b'{"kind": "train", "step": 102, "lo' + b"\n\xff\xfe\x00\n[1, 2]\n" + b"[" * 100_000 + b"\nnull\n"
    tail += b'{"step": 4}\n{"kind": "train", "step": "nan"}\n' + whole.replace(b"0.125", b'"high"') + b"\n"
    tail += b'{"kind": "router", "step": 3}\n' + whole.replace(b"{", b'{"of_a_newer_version": [1], ', 1) + b"\n" + b'{"kind'
    page = page_of(make_run(tmp_path / "run", USUAL, tail=tail))
    assert "9 lines of metrics.jsonl could not be read and were left out" in page.text
    assert "1 rows of metrics.jsonl are of kinds that this version does not know (router)" in page.text
    assert read_run(tmp_path / "run").curve("loss")[-1] == (103.0, 0.125)


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    assert "nothing to draw yet" in page_of(make_run(tmp_path / "run", [])).text
    only_config = tmp_path / "planned"
    only_config.mkdir()
    (only_config / "config.toml").write_text(TrainConfig(steps=5).to_toml())
    assert "0 of 5" in page_of(only_config).text
    (only_config / "config.toml").write_bytes(b"\xff[[[")
    assert "config.toml could not be read" in page_of(only_config).text


def test_the_last_row_of_a_step_counts_and_steps_are_in_order(tmp_path):
    run = read_run(make_run(tmp_path / "run", [train_row(2, loss=9.0), train_row(1, loss=3.0), train_row(2, loss=1.0)]))
    assert run.curve("loss") == [(1.0, 3.0), (2.0, 1.0)]


def layers(step, **norms):
    norms = {name.replace("__", "."): value for name, value in norms.items()}
    return LayersRow(step=step, gradient_norms=norms, update_ratios={name: 0.1 * value for name, value in norms.items()})


def test_gradients_are_gathered_by_layer():
    assert layer_name("model.layers.12.mlp.up_proj.weight") == layer_name("transformer.h.12.attn.c_attn.bias") == "layer 12"
    assert layer_name("model.embed_tokens.weight") == "embed_tokens"
    rows = [layers(5, model__embed_tokens__weight=1.0, model__layers__0__a=3.0, model__layers__0__b=4.0), layers(6)]
    rows.append(layers(7, model__layers__0__a=math.inf, model__layers__1__a=2.0))
    assert layer_values(rows, "gradient_norms") == (
        ["embed_tokens", "layer 0", "layer 1"], [5, 7], [[1.0, None], [5.0, math.inf], [None, 2.0]]
    )  # fmt: skip
    assert layer_values(rows[:1], "update_ratios")[2] == [[0.1], [0.4]]


def test_a_heat_map_has_a_cell_for_each_layer_and_column_and_names_its_extremes(tmp_path):
    rows = [layers(step, **{f"model__layers__{i}__w": 10.0 ** (i - step % 3) for i in range(4)}) for step in range(1, 301)]
    page = page_of(make_run(tmp_path / "run", [*USUAL, *rows]))
    assert "Gradient norm by layer" in page.text and "Gradients by size" not in page.text
    assert "layer 3, step 1 to 5: 1000" in page.text and "4 rows over 300 steps, from 1 to 1000. The largest is in layer 3." in page.text
    assert page.tags.count("rect") == 2 * (4 * 60 + 40) + 2  # cells and legend of two maps, the two parts of the time


def test_time_is_split_by_its_measured_parts_or_else_by_speed():
    rows = [train_row(step, data_seconds=0.1, forward_seconds=0.3, backward_seconds=math.nan) for step in (1, 2)]
    parts, note = time_split(rows)
    assert dict(parts) == {"forward": pytest.approx(0.6), "data": pytest.approx(0.2)} and "added up" in note
    parts, note = time_split([train_row(step) for step in (1, 2, 3, 4)])  # 64 tokens at 256 a second, and half a second from row to row
    assert dict(parts)["training steps"] == pytest.approx(1.0) and sum(seconds for _, seconds in parts) == pytest.approx(2.0)
    parts, note = time_split([train_row(step, data_seconds=0.05) for step in (1, 2, 3, 4)])  # a GPU, on which only the data is measured
    assert dict(parts)["training steps"] == pytest.approx(1.0) and dict(parts)["data"] == pytest.approx(0.2) and "Estimated" in note
    assert sum(seconds for _, seconds in parts) == pytest.approx(2.0)
    assert time_split([])[0] == []


def test_the_machines_part_is_told_beside_the_faults(tmp_path):
    rows = [*USUAL, MachineRow(step=9, event="slow_disk", action="wait", text="the disk is slow: training waited 2.0 s", seconds=2.0)]
    page = page_of(make_run(tmp_path / "run", rows))
    assert "slow disk" in page.said and "training waited 2.0 s" in page.text and "steps that went wrong" not in page.said


def test_several_faults_of_a_step_are_all_told(tmp_path):
    faults = [
        FaultRow(step=4, event=kind, action="rollback", text=f"a {kind}", fault_step=step, data=step)
        for kind, step in (("spike", 7), ("nonfinite", 9))
    ]
    page = page_of(make_run(tmp_path / "run", [*USUAL, *faults, train_row(9, updated=False)]))
    assert "a spike" in page.said and "a nonfinite" in page.said and "update left out" not in page.text


def test_a_comparison_lists_best_losses_and_only_the_settings_that_differ(tmp_path):
    first = make_run(tmp_path / "x" / "run", USUAL, TrainConfig(steps=100, learning_rate=1e-3))
    second = make_run(tmp_path / "y" / "run", [*USUAL, eval_row(90, 0.01)], TrainConfig(steps=100, learning_rate=2e-3, warmup=5))
    page = page_of(first, second)
    assert (first / "comparison.html").exists() and "x/run" in page.text and "y/run" in page.text and "0.0100 (lowest)" in page.text
    differing = page.text.partition("Settings that differ")[2]
    assert "optim.learning_rate" in differing and "optim.warmup" in differing and "not set" in differing and "train.steps" not in differing


def test_runs_with_steps_of_different_sizes_are_laid_over_tokens(tmp_path):
    small = make_run(tmp_path / "small", [train_row(step) for step in range(1, 9)])
    large = make_run(tmp_path / "large", [train_row(step, tokens=640 * step) for step in range(1, 9)])
    assert "tokens" in page_of(small, large).said and "step" not in page_of(small, large).said
    assert "step" in page_of(small, make_run(tmp_path / "twin", [train_row(step) for step in range(1, 9)])).said


def test_a_long_run_with_many_layers_stays_a_small_page(tmp_path):
    names = [f"model.layers.{i}.w" for i in range(48)]
    rows = [*(train_row(step) for step in range(1, 20_001)), *(eval_row(step, 5 / step) for step in range(1, 20_001, 10))]
    rows += [LayersRow(step=step, gradient_norms=dict.fromkeys(names, 1.0), update_ratios={}) for step in range(1, 20_001, 100)]
    rows += [FaultRow(step=step, event="spike", action="warn", text="high", fault_step=step, data=step) for step in range(1, 20_001, 20)]
    place, _ = write_report([make_run(tmp_path / "run", rows)])
    Page(place.read_text("utf-8"))
    assert place.stat().st_size < 2_000_000


def test_mistakes_are_named(tmp_path):
    run = make_run(tmp_path / "run", USUAL)
    with pytest.raises(UserError, match="does not exist"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="twice"):
        write_report([run, tmp_path / "run" / ".." / "run"])
    with pytest.raises(UserError, match="no folder"):
        write_report([run], tmp_path / "a" / "b.html")
    with pytest.raises(UserError, match="no run is named"):
        write_report([])
    place, _ = write_report([run], tmp_path)
    assert place == tmp_path / "report.html"


def test_a_page_that_cannot_be_written_says_where_else_to_write_it(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", USUAL)
    (run / "report.html").write_text("old")
    for number, words in ((30, "Read-only file system"), (13, "Permission denied"), (28, "the disk is full: No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle, number=number: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
            with pytest.raises(OutputError, match=rf"^could not write {run}/report.html.*{words}.* --out\.$") as caught:
                write_report([run])
        assert "checkpoint" not in str(caught.value) and caught.value.exit_status == 1
    assert (run / "report.html").read_text() == "old" and not list(run.glob(".*.tmp"))


def test_the_report_of_a_read_only_run_names_the_option(tmp_path):
    run = make_run(tmp_path / "disk" / "run", USUAL)
    content = {path.name: path.read_bytes() for path in run.iterdir()}
    if os.geteuid() == 0:  # whom permissions do not stop
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", run], capture_output=True).returncode:
            pytest.skip("needs the right to mount a small tmpfs")
        try:
            for name, each in content.items():
                (run / name).write_bytes(each)
            subprocess.run(["mount", "-o", "remount,ro", run], check=True)
            ran = cllm("report", run)
            other = cllm("report", run, "--out", tmp_path / "page.html", "--json")
        finally:
            subprocess.run(["umount", "-l", run], check=True)
    else:
        run.chmod(0o555)
        ran = cllm("report", run)
        other = cllm("report", run, "--out", tmp_path / "page.html", "--json")
        run.chmod(0o755)
    assert ran.status == 1 and "--out" in ran.err and "checkpoint" not in ran.err and len(ran.err.strip().splitlines()) == 1
    assert other.status == 0 and other.json["out"] == str(tmp_path / "page.html")
