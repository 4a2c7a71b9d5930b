"""The pictures of the profiling scripts. matplotlib is the extra [plot] and is imported only where a picture is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm.runtime.errors import UserError

FORMATS = (".png", ".svg", ".pdf")
COLORS = ("#2563a8", "#c2571a", "#3d8b4f", "#8a4fa3", "#7a7a7a")


def check(path: Path | None) -> None:
    """Before anything is measured: whether a picture can be drawn there at all. Raises UserError."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {path}: a picture ends in {', '.join(FORMATS)}. Use a name like {path.stem or 'plot'}.png.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}. Create it first.")
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('--plot needs matplotlib, which is not installed. Install it: pip install "cllm[plot]"') from error
    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib import pyplot

    return pyplot


def _axes(title: str, width: float, height: float) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=(width, height), layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)


def bars(path: Path, title: str, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], unit: str, line: float | None = None) -> None:
    """Horizontal bars: one group for each label from top to bottom, one bar in it for each series, none for None. `line` marks a value."""
    figure, axes = _axes(title, 9, 1.3 + len(labels) * (0.14 + 0.2 * len(series)))
    thickness = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * thickness for place in range(len(labels))]
        drawn = axes.barh(places, [value or 0.0 for value in values], thickness, label=name, color=COLORS[number % len(COLORS)])
        texts = ["" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values]
        axes.bar_label(drawn, texts, padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # from top to bottom
    axes.margins(x=0.08)
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    if line is not None:
        axes.axvline(line, color="black", linewidth=1, linestyle="--")
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(series), 4), fontsize=9, frameon=False)
    _save(figure, path)


def lines(
    path: Path,
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    ideal: Sequence[tuple[float, float]] = (),
) -> None:
    """One line of (x, y) points for each series over a logarithmic x whose ticks are the points; `ideal` is drawn dashed."""
    figure, axes = _axes(title, 8, 4.5)
    for number, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points), marker="o", markersize=4, label=name, color=COLORS[number % len(COLORS)])
    if ideal:
        axes.plot(*zip(*ideal), linestyle="--", linewidth=1, color="black", label="ideal")
    ticks = sorted({point[0] for points in series.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False)
    _save(figure, path)
