"""From RunData to one HTML page without scripts, which loads nothing and is light or dark as the reader's system is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm._version import __version__
from cllm.files import Wording, write_file
from cllm.monitor.records import ActivationsRow, EvaluationRow, FinalRow, LayersRow, RoundRow, TrainRow
from cllm.monitor.rounds import MODEL, read_rounds
from cllm.report.charts import Series, heat_map, line_chart, share_bar, short, smoothed
from cllm.report.layers import Table, as_table, layer_values
from cllm.report.markup import Html, element, join, table
from cllm.report.reading import RunData, read_run, read_runs
from cllm.report.rounds import rounds_section
from cllm.report.style import STYLE
from cllm.report.timing import time_split
from cllm.runtime.errors import OutputError, UserError
from cllm.runtime.progress import duration
from cllm.shell import command

# Field of the rows, title, unit, logarithmic. Training is drawn as a line, evaluations as dots.
CURVES = (
    ("loss", "Loss", "nats per token", False),
    ("perplexity", "Perplexity", "", True),
    ("accuracy", "Next-token accuracy", "", False),
    ("bits_per_byte", "Bits per byte", "", False),
    ("learning_rate", "Learning rate", "", False),
    ("gradient_norm", "Gradient norm", "before clipping", True),
    ("tokens_per_second", "Speed", "tokens per second", False),
)
# Fields that are drawn already, or that only count what was done
NOT_OTHER = {"step", "tokens", "seconds", "num_targets", "split_targets", "class_targets", "num_nonfinite", *(key for key, *_ in CURVES)}
REPORT = Wording(OutputError, "another file with --out", "Nothing else was changed.")
SHOWN_SAMPLES = 4
MOST_EVENTS = 200
MOST_EVALUATIONS = 200
MOST_FLAGS = 50


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> tuple[Path, list[RunData]]:
    """Writes the report of one run (default: RUN/report.html) or the comparison of several (default: comparison.html in the first).

    Raises UserError where there is no run or no folder to write into, OutputError where the disk does not take the page.
    """
    if not folders:
        raise UserError(f"no run is named. Give the folder of one, as in {command('report', 'runs/demo')}.")
    rounds = read_rounds(Path(folders[0])) if len(folders) == 1 else []
    # Of a training in rounds, the run is that of the last round that was kept.
    runs = [read_run(Path(folders[0], MODEL) if rounds else folders[0], Path(folders[0]).resolve().name)] if len(folders) == 1 else read_runs(folders)
    default = "report.html" if len(runs) == 1 else "comparison.html"
    place = Path(out) if out is not None else (Path(folders[0]) if rounds else runs[0].folder) / default
    place = place / default if place.is_dir() else place
    if not place.parent.is_dir():
        raise UserError(f"there is no folder {place.parent} to write {place.name} into. Create it, or choose another with --out.")
    write_file(place, (run_page(runs[0], rounds) if len(runs) == 1 else comparison_page(runs)).encode("utf-8"), REPORT)
    return place, runs


def run_page(run: RunData, rounds: Sequence[RoundRow] = ()) -> str:
    """The page of one run, and of the rounds that led to it."""
    sections = [
        _problems([run]),
        rounds_section(rounds),
        _tiles(run),
        _curves([run]),
        _layers(run),
        _time(run),
        _events(run),
        _final(run),
        _evaluations(run),
        _samples(run),
        _configuration(run),
        _environment(run),
    ]
    return whole_page(f"Training run {run.name}", sections)


def comparison_page(runs: Sequence[RunData]) -> str:
    """The page that lays several runs side by side."""
    return whole_page(f"{len(runs)} training runs compared", [_problems(runs), _results(runs), _curves(runs), _differences(runs)])


def whole_page(title: str, sections: Sequence[Html | None], dated: bool = True) -> str:
    """A page of sections. Not dated: the same bytes for the same content."""
    when = f" on {time.strftime('%Y-%m-%d %H:%M')}" if dated else ""
    made = f"Made by cllm {__version__}{when}. This page is whole: it loads nothing and runs nothing."
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Whatever a sample or a name holds, a browser runs and loads nothing.
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    body = element("body", element("main", element("h1", title), *sections), element("footer", element("p", made)))
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def section(title: str, *children: Any) -> Html:
    """A part of a page under its heading."""
    return element("section", element("h2", title), *children)


def _figure(chart: Html, title: str, *notes: Any) -> Html:
    return element("figure", element("h3", title), chart, element("figcaption", *notes) if notes else None)


def _legend(names: Sequence[tuple[str, str]]) -> Html:
    """(name, classes): a swatch in the line's colour and dash before each name."""

    def swatch(classes: str) -> Html:
        line = element("line", x1=1, x2=23, y1=5, y2=5, class_=f"line {classes}")
        return element("svg", line, viewBox="0 0 24 10", class_="swatch", aria_hidden="true")

    return element("ul", *(element("li", swatch(classes), name) for name, classes in names), class_="legend")


def _problems(runs: Sequence[RunData]) -> Html | None:
    lines = [f"{run.name + ': ' if len(runs) > 1 else ''}{problem}" for run in runs for problem in run.problems]
    return element("ul", *(element("li", line) for line in lines), class_="problems", role="note") if lines else None


def _tiles(run: RunData) -> Html:
    """The run in eight numbers."""
    steps, last = run.setting("train.steps"), run.evaluations[-1] if run.evaluations else None
    planned = f" of {steps:,}" if isinstance(steps, int) else ""
    speeds = sorted(value for _, value in run.curve("tokens_per_second") if math.isfinite(value))
    facts: list[tuple[str, str | None]] = [
        ("steps", f"{run.last_step:,}{planned}"),
        ("parameters", _shown(run.num_parameters)),
        ("tokens seen", _shown(run.tokens)),
        ("time", None if run.seconds is None else duration(run.seconds)),
        ("tokens per second, median", short(speeds[len(speeds) // 2]) if speeds else None),
        ("best validation loss", f"{run.best[1]:.4f} at step {run.best[0]:,}" if run.best else None),
        ("perplexity at the end", _shown(last.perplexity) if last else None),
        ("bits per byte at the end", _shown(last.bits_per_byte) if last else None),
        ("steps that went wrong", f"{len(run.faults()):,}" if run.faults() else None),
    ]
    tiles = (element("div", element("dt", name), element("dd", value)) for name, value in facts if value is not None)
    return element("dl", *tiles, class_="tiles")


def _shown(value: float | None) -> str | None:
    """A number for a table: whole ones below ten million in full, others with four digits."""
    if isinstance(value, int) and abs(value) < 10_000_000:
        return f"{value:,}"
    return None if value is None else short(float(value))


# -- curves ----------------------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[RunData]) -> Html:
    scale, x_label = _x_axis(runs)
    figures = [_curve(place, key, title, unit, log, runs, scale, x_label) for place, (key, title, unit, log) in enumerate(CURVES)]
    others = _other_fields(runs[0]) if len(runs) == 1 else []
    more = [_curve(100 + place, key, key.replace("_", " "), "", False, runs, scale, x_label) for place, key in enumerate(others)]
    drawn = [figure for figure in figures if figure is not None]
    if not drawn:
        return section("Curves", element("p", "There is nothing to draw yet."))
    folded = element("details", element("summary", f"{len(more)} further figures"), element("div", *more, class_="grid-of-two")) if more else None
    return section("Curves", element("div", *drawn, class_="grid-of-two"), folded)


def _other_fields(run: RunData) -> list[str]:
    """The further numbers that the rows of updates and evaluations hold."""
    names = {each.name: kind for kind in (EvaluationRow, TrainRow) for each in dataclasses.fields(kind) if each.name not in NOT_OTHER}
    return [name for name, kind in names.items() if run.curve(name, kind)]


def _x_axis(runs: Sequence[RunData]) -> tuple[list[float], str]:
    """What a step of each run is worth on the x axis: a step, or tokens where runs take steps of different sizes."""
    sizes = []
    for run in runs:
        tokens = [(step, value) for step, value in run.curve("tokens") if step > 0 and math.isfinite(value)]
        sizes.append(tokens[-1][1] / tokens[-1][0] if tokens else 0.0)
    if len(runs) == 1 or min(sizes) <= 0 or max(sizes) < 1.01 * min(sizes):
        return [1.0] * len(runs), "step"
    return sizes, "tokens"


def _curve(place: int, key: str, title: str, unit: str, log: bool, runs: Sequence[RunData], scale: Sequence[float], x_label: str) -> Html | None:
    """One chart: of one run its training and validation, of several each in its colour."""
    series: list[Series] = []
    legend: list[tuple[str, str]] = []
    for number, run in enumerate(runs):
        train, validation = run.curve(key), run.curve(key, EvaluationRow)
        if key == "perplexity" and not train:
            train = [(step, math.exp(loss) if loss < 700 else math.inf) for step, loss in smoothed(run.curve("loss"))]
        train, validation = ([(step * scale[number], value) for step, value in points] for points in (train, validation))
        alone = len(runs) == 1
        color, second = (0, 1) if alone else (number, number)
        name = "" if alone else f"{run.name}, "
        if train:
            noisy = key in ("loss", "gradient_norm", "tokens_per_second") and len(train) > 50
            series.append(Series(f"{name}training", train, color, faint=noisy or (not alone and bool(validation))))
            if noisy and (alone or not validation):
                series.append(Series(f"{name}training, smoothed", smoothed(train), color))
            if alone and validation:
                legend.append(("training", f"c{color} d0"))
        if validation:
            series.append(Series(f"{name}validation", validation, second, dots=True))
            if alone and train:
                legend.append(("validation", f"c{second} d0"))
        if not alone and (train or validation):
            legend.append((run.name, f"c{color % 6} d{color // 6 % 3}"))
    if not series:
        return None
    events = runs[0].faults() if len(runs) == 1 and key in ("loss", "gradient_norm") else []
    marks = [(event.step * scale[0], f"step {event.step}: {event.what}") for event in events]
    chart = line_chart(f"chart{place}", title, series, x_label, log, marks)
    both = len(runs) > 1 and any(each.faint for each in series) and any(each.dots for each in series)
    notes = [unit, "faint: training; with dots: validation" if both else "", "dashed: an event" if marks else ""]
    words = "; ".join(note for note in notes if note)
    return _figure(chart, title, _legend(legend) if len(legend) > 1 else None, element("p", words) if words else None)


# -- one run ---------------------------------------------------------------------------------------------------------------------


def _layers(run: RunData) -> Html | None:
    """Heat maps over layers and steps, and the parameters whose gradient was flagged."""
    rows, activations = run.rows(LayersRow), run.rows(ActivationsRow)
    norms, ratios = layer_values(rows, "gradient_norms"), layer_values(rows, "update_ratios")
    maps = [
        (norms, "Gradient norm by layer", "The norm of all gradients of a layer; in each column the largest of its steps."),
        (ratios, "Update to weight by layer", "How far updates moved weights relative to their size; the largest of a layer's parameters."),
        (_by_size(rows), "Gradients by size", "How many of the sampled gradients lie in each power of ten."),
        (_of_blocks(activations, "std"), "Spread of activations by block", "The standard deviation of the residual stream after each block."),
        (_of_blocks(activations, "largest"), "Largest activation by block", "The largest absolute value in the residual stream after each block."),
    ]
    figures = [
        _figure(heat_map(f"heat{place}", title, names, steps, values), title, element("p", note))
        for place, ((names, steps, values), title, note) in enumerate(maps)
        if names
    ]
    flags = [(f"{row.step:,}", name, flag) for row in rows for flag in ("exploding", "vanishing") for name in getattr(row, flag)]
    more = f" (the last {MOST_FLAGS} of {len(flags):,})" if len(flags) > MOST_FLAGS else ""
    flagged = table(("step", "parameter", "gradient"), flags[-MOST_FLAGS:], f"Gradients out of line{more}") if flags else None
    return section("Layers", element("div", *figures, class_="grid-of-two"), flagged) if figures or flags else None


def _of_blocks(rows: Sequence[ActivationsRow], part: str) -> Table:
    """One figure of the activations, by block."""
    return as_table({row.step: {name: each[part] for name, each in row.blocks.items() if part in each} for row in rows})


def _by_size(rows: Sequence[LayersRow]) -> Table:
    """The histograms of gradients, the largest decade first, without the decades that are always empty."""
    histograms = {row.step: row.gradient_histogram or {} for row in rows}
    used = {name for each in histograms.values() for name, count in each.items() if count}
    return as_table({step: {name: float(count) for name, count in reversed(each.items()) if name in used} for step, each in histograms.items()})


def _time(run: RunData) -> Html | None:
    parts, note = time_split(run.rows(TrainRow))
    total = sum(seconds for _, seconds in parts)
    if not total:
        return None
    rows = [(name, duration(seconds) if seconds >= 1 else f"{seconds:.2f} s", f"{100 * seconds / total:.1f} %") for name, seconds in parts]
    legend = _legend([(name, f"c{place % 6} d0") for place, (name, _) in enumerate(parts)])
    chart = share_bar("time", "Where the time went", parts)
    return section("Time", element("figure", chart, element("figcaption", legend)), table(("part", "time", "share"), rows, note, (1, 2)))


def _events(run: RunData) -> Html | None:
    events = run.events()
    if not events:
        return None
    rows = [(f"{event.step:,}", event.what.replace("_", " "), event.action, event.details) for event in events[-MOST_EVENTS:]]
    more = f" (the last {MOST_EVENTS} of {len(events):,})" if len(events) > MOST_EVENTS else ""
    return section(f"Events{more}", table(("step", "what", "done", "details"), rows, "Steps that went wrong, and what the machine did to the run"))


def _final(run: RunData) -> Html | None:
    """Every figure of the last evaluation, of the best one where that is another, and of the weights that the run left where they were evaluated
    on their own; then classes of tokens."""
    if not run.evaluations:
        return section("Final evaluation", element("p", "This run has not been evaluated."))
    last, lowest = run.evaluations[-1], run.best
    best = next((row for row in run.evaluations if lowest and row.step == lowest[0]), last)
    rows: list[EvaluationRow | FinalRow] = [*([last] if best is last else [last, best]), *run.rows(FinalRow)[-1:]]
    notes = [" (best)" if row is best else " (the weights left)" if isinstance(row, FinalRow) else "" for row in rows]
    head = ["figure", *(f"step {row.step:,}{note}" for row, note in zip(rows, notes))]
    names = [name for name, value in last.values().items() if name not in ("step", "best") and isinstance(value, int | float)]
    body = [(name.replace("_", " "), *(_precise(getattr(row, name, None)) for row in rows)) for name in names]
    confusion = "Confusion: a row for what was to come, a column for what the model ranked first"
    tables = [_table_of(last.classes, "Classes of tokens"), _table_of(last.confusion, confusion)]
    return section("Final evaluation", table(head, body, "On the validation split", range(1, len(head))), *tables)


def _precise(value: float | None) -> str:
    """Four decimals of a number that is not a whole one."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 10_000_000:
        return f"{int(value):,}"
    return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e6 else short(value)


def _table_of(figures: Mapping[str, Mapping[str, float | None]] | None, caption: str) -> Html | None:
    """row -> column -> figure as a table."""
    if not figures:
        return None
    columns = list(dict.fromkeys(name for each in figures.values() for name in each))
    rows = [(name, *(_precise(each.get(column)) for column in columns)) for name, each in figures.items()]
    return table(("", *columns), rows, caption, range(1, len(columns) + 1))


def _evaluations(run: RunData) -> Html | None:
    """The numbers behind the dots."""
    if len(run.evaluations) < 2:
        return None
    names = ("loss", "perplexity", "bits_per_byte", "accuracy")
    shown = run.evaluations[-MOST_EVALUATIONS:]
    rows = [(f"{row.step:,}", *(_precise(getattr(row, name)) for name in names), "yes" if row.best else "") for row in shown]
    head = ("step", *(name.replace("_", " ") for name in names), "best so far")
    numbers = table(head, rows, "Evaluations", range(1, len(names) + 1))
    return element("details", element("summary", f"All {len(run.evaluations):,} evaluations"), numbers)


def _samples(run: RunData) -> Html | None:
    if not run.samples:
        return None
    blocks = [join((element("h3", f"step {each.step:,}"), element("pre", each.text or "(nothing)"))) for each in run.samples[::-1]]
    older = blocks[SHOWN_SAMPLES:]
    folded = element("details", element("summary", f"{len(older):,} earlier samples"), *older) if older else None
    return section("Samples", element("p", "What the model wrote while it was trained, the newest first."), *blocks[:SHOWN_SAMPLES], folded)


def _configuration(run: RunData) -> Html | None:
    if not run.settings:
        return None
    rows = [(each.key, _setting(each.value), each.source) for each in run.settings]
    chosen = [row for row in rows if row[2] not in ("default", "")]
    everything = element("details", element("summary", f"All {len(rows):,} settings"), table(("setting", "value", "source"), rows, "All settings"))
    not_default = table(("setting", "value", "source"), chosen, "What is not a default") if chosen else None
    return section("Configuration", not_default, everything)


def _setting(value: Any) -> str:
    """As config.toml has it, without the last digits of a binary fraction."""
    return str(value).lower() if isinstance(value, bool) else f"{value:.10g}" if isinstance(value, float) else str(value)


def _environment(run: RunData) -> Html:
    """One row for each time the run was started or resumed."""
    rows = []
    for start in run.environments:
        machine = "; ".join(f"{each.name}, {each.workers} workers, {each.memory_gib:g} GiB" for each in start.devices)
        rows.append((start.started, machine, start.system, ", ".join(f"{name} {version}" for name, version in start.versions.items())))
    if not rows:
        return section("Machine and versions", element("p", "This run did not record them."))
    return section("Machine and versions", table(("started", "machine", "system", "versions"), rows, "Each start of the run"))


# -- several runs ----------------------------------------------------------------------------------------------------------------


def _results(runs: Sequence[RunData]) -> Html:
    rows = []
    same_tokens = all(run.setting(key) == runs[0].setting(key) for run in runs for key in ("data.tokenizer", "data.vocab_size"))
    best = min((run.best[1] for run in runs if run.best), default=None) if same_tokens else None
    for run in runs:
        last = run.evaluations[-1] if run.evaluations else None
        figures = [_precise(value) for value in (last.loss, last.bits_per_byte, last.accuracy)] if last else ["", "", ""]
        mark = " (lowest)" if run.best and run.best[1] == best else ""
        rows.append((
            run.name, f"{run.best[1]:.4f}{mark}" if run.best else "", f"{run.best[0]:,}" if run.best else "", *figures,
            f"{run.last_step:,}", _shown(run.tokens) or "", "" if run.seconds is None else duration(run.seconds),
            _shown(run.num_parameters) or "", f"{len(run.faults()):,}",
        ))  # fmt: skip
    head = ("run", "best loss", "at step", "last loss", "bits per byte", "accuracy", "steps", "tokens", "time", "parameters", "faults")
    note = "Losses are comparable between runs with the same tokenizer and validation text; bits per byte between tokenizers too."
    return section("Results", table(head, rows, "Best and last validation of each run", range(1, len(head))), element("p", note))


def _differences(runs: Sequence[RunData]) -> Html:
    keys = dict.fromkeys(each.key for run in runs for each in run.settings)
    rows = []
    for key in keys:
        values = [run.setting(key) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((key, *("not set" if value is None else _setting(value) for value in values)))
    if not rows:
        return section("Settings that differ", element("p", "None: all settings are the same."))
    return section("Settings that differ", table(("setting", *(run.name for run in runs)), rows, "Only what is not the same in all runs"))
