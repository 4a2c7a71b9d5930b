"""`cllm report`: pages that are whole and safe whatever the run's files hold, and that say what the files say."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cllm.config.train import TrainConfig
from cllm.report import charts, write_report
from cllm.report.layers import layer_name, layer_values
from cllm.report.markup import element
from cllm.report.reading import number, read_run
from cllm.report.timing import time_split
from cllm.runtime.errors import UserError

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Fails on a tag that does not close, a repeated id, a script, or anything that would be loaded; keeps what is visible."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.said, self.tags, self.figures = [], {}, [], [], []
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


def page_of(*folders, out=None):
    place, _ = write_report(folders, out)
    return Page(place.read_text("utf-8"))


def train_row(step, **values):
    return {
        "kind": "train", "step": step, "loss": 4 / step, "learning_rate": 1e-3, "gradient_norm": 1.5, "updated": True, "tokens": 64 * step,
        "seconds": 0.5 * step, "tokens_per_second": 256.0, **values,
    }  # fmt: skip


def eval_row(step, loss, **values):
    return {"kind": "eval", "step": step, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2, "accuracy": 0.25, **values}


def make_run(folder, rows, config=None, samples=None, tail=b""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + tail)
    if config is not None:
        (folder / "config.toml").write_text(config.to_toml(), "utf-8")
    if samples is not None:
        (folder / "samples.txt").write_bytes(samples.encode("utf-8", "surrogatepass"))
    return folder


USUAL = [*(train_row(step) for step in range(1, 101)), *(eval_row(step, 5 / step) for step in (25, 50, 75, 100))]


def test_a_page_says_what_the_run_came_to(tmp_path):
    config = TrainConfig(steps=100, learning_rate=2e-3)
    page = page_of(make_run(tmp_path / "demo", USUAL, config, "=== step 50\nonce upon\n\n=== step 100\na time\n\n"))
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
    rows = [train_row(step, **({"loss": "nan", "updated": False} if step == 3 else {})) for step in range(1, 6)]
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
FIELD = st.sampled_from([
    "loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds", "tokens", "updated", "perplexity", "accuracy", "bits_per_byte",
    "gradient_norms", "update_ratios", "data_seconds", "time_split", "event", "documents", "confusion", "a<b>", "best", "step", "kind",
])  # fmt: skip
KIND = st.sampled_from(["train", "eval", "layers", "event"])
ROW = st.builds(lambda kind, step, row: {"kind": kind, "step": step, **row}, KIND, st.integers(0, 9), st.dictionaries(FIELD, ODD, max_size=8))
NORMS = st.builds(
    lambda step, norms: {"kind": "layers", "step": step, "gradient_norms": norms, "update_ratios": norms},
    st.integers(0, 500), st.dictionaries(st.sampled_from([f"model.layers.{i}.w.weight" for i in range(5)] + ["x<y", "embed"]), ODD, max_size=5),
)  # fmt: skip


@given(st.lists(ROW | NORMS, max_size=12), st.binary(max_size=40), st.text(max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_of_a_run_stops_the_report_or_breaks_the_page(tmp_path, rows, tail, sample):
    run = make_run(tmp_path / "run", rows, samples=f"=== step 1\n{sample}\n", tail=tail)
    (run / "environment.jsonl").write_bytes(tail)
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
    rows = [*USUAL, {"kind": "event", "step": 3, "event": evil, evil: evil}, {**eval_row(100, 1.0), evil: evil, "classes": {evil: {evil: evil}}}]
    page = page_of(make_run(tmp_path / evil.replace("/", "|"), rows, TrainConfig(tokenizer=evil, steps=100), f"=== step 1\n{evil}\n\n"))
    assert page.text.count(evil) >= 6 and "script" not in page.tags


def test_a_half_written_file_is_read_as_far_as_it_goes(tmp_path):
    tail = b'{"kind": "train", "step": 102, "lo' + b"\n\xff\xfe\x00\n[1, 2]\n" + b"[" * 100_000 + b"\nnull\n"
    tail += b'{"step": 4}\n{"kind": "train", "step": "nan"}\n{"kind'
    page = page_of(make_run(tmp_path / "run", USUAL, tail=tail))
    assert "6 lines of metrics.jsonl could not be read" in page.text and "2 rows of metrics.jsonl without a kind and a step" in page.text
    assert "100" in page.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    assert "nothing to draw yet" in page_of(make_run(tmp_path / "run", [])).text
    only_config = tmp_path / "planned"
    only_config.mkdir()
    (only_config / "config.toml").write_text(TrainConfig(steps=5).to_toml())
    assert "0 of 5" in page_of(only_config).text
    (only_config / "config.toml").write_bytes(b"\xff[[[")
    assert "config.toml could not be read" in page_of(only_config).text


def test_the_source_of_every_setting_is_read_back(tmp_path):
    config = TrainConfig.from_layers(flags={"steps": 7, "data.path": "a [b] # c/d"}, sets=["optim.beta2=0.9"])
    run = read_run(make_run(tmp_path / "run", [], config))
    assert {key: (value, source) for key, value, source in run.settings} == {
        key: (value, source) for key, value, source, _ in config.describe() if value is not None
    }


def test_numbers_are_read_as_metrics_writes_them():
    assert number("nan") != number("nan") and number("-inf") == -math.inf and number(3) == 3.0 and number(10**400) == math.inf
    assert number(True) is None and number("3") is None and number(None) is None and number([]) is None


def test_the_last_row_of_a_step_counts_and_steps_are_in_order(tmp_path):
    run = read_run(make_run(tmp_path / "run", [train_row(2, loss=9.0), train_row(1, loss=3.0), train_row(2, loss=1.0)]))
    assert run.curve("loss") == [(1.0, 3.0), (2.0, 1.0)]


def test_gradients_are_gathered_by_layer():
    assert layer_name("model.layers.12.mlp.up_proj.weight") == layer_name("transformer.h.12.attn.c_attn.bias") == "layer 12"
    assert layer_name("model.embed_tokens.weight") == "embed_tokens"
    rows = [
        {"step": 5, "gradient_norms": {"model.embed_tokens.weight": 1.0, "model.layers.0.a": 3.0, "model.layers.0.b": 4.0}},
        {"step": 6},
        {"step": 7, "gradient_norms": {"model.layers.0.a": "inf", "model.layers.1.a": 2.0}},
    ]
    assert layer_values(rows, "gradient_norms") == (
        ["embed_tokens", "layer 0", "layer 1"], [5, 7], [[1.0, None], [5.0, math.inf], [None, 2.0]]
    )  # fmt: skip
    assert layer_values([{"step": 1, "update_ratios": {"h.0.a": 0.1, "h.0.b": 0.3}}], "update_ratios")[2] == [[0.3]]


def test_a_heat_map_has_a_cell_for_each_layer_and_column_and_names_its_extremes(tmp_path):
    norms = [{f"model.layers.{i}.w": 10.0 ** (i - step % 3) for i in range(4)} for step in range(1, 301)]
    rows = [{"kind": "layers", "step": step, "gradient_norms": each} for step, each in enumerate(norms, 1)]
    page = page_of(make_run(tmp_path / "run", [*USUAL, *rows]))
    assert "Gradient norm by layer" in page.text and "Update to weight" not in page.text
    assert "layer 3, step 1 to 5: 1000" in page.text and "4 rows over 300 steps, from 1 to 1000. The largest is in layer 3." in page.text
    rows[7]["flags"] = {"layer 2": "exploding"}
    assert "exploding" in page_of(make_run(tmp_path / "flagged", rows)).text and "exploding" not in page.text
    assert page.tags.count("rect") == 4 * 60 + 40 + 2  # cells, legend, the two parts of the time


def test_time_is_split_by_named_parts_or_else_by_speed():
    rows = [train_row(step, data_seconds=0.1, eta_seconds=9.0, time_split={"forward": 0.3, "backward": "nan"}) for step in (1, 2)]
    parts, _ = time_split(rows)
    assert dict(parts) == {"forward": pytest.approx(0.6), "data": pytest.approx(0.2)}
    parts, _ = time_split([train_row(step) for step in (1, 2, 3, 4)])  # 64 tokens at 256 a second, and half a second from row to row
    assert dict(parts)["training steps"] == pytest.approx(1.0) and sum(seconds for _, seconds in parts) == pytest.approx(2.0)
    assert time_split([])[0] == []


def test_figures_of_several_kinds_become_tables(tmp_path):
    classes = {"word": {"f1": 0.75}, "number": {"f1": 0.125, "recall": "nan"}}
    last = eval_row(200, 2.0, macro_f1=0.5, classes=classes, confusion=[[8, 1], [2, 16]])
    page = page_of(make_run(tmp_path / "run", [*USUAL, last]))
    for words in ("macro f1", "0.5000", "classes", "word", "0.7500", "0.1250", "confusion: a row for what was to come", "16", "recall"):
        assert words in page.text, words


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
    rows += [{"kind": "layers", "step": step, "gradient_norms": dict.fromkeys(names, 1.0)} for step in range(1, 20_001, 100)]
    rows += [{"kind": "event", "step": step, "event": "skip"} for step in range(1, 20_001, 20)]
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
