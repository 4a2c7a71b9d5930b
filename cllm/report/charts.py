"""Curves, heat maps and bars as SVG elements, sized so that their text can be read on a phone. Colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cllm.report.markup import Html, element

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34  # margins of the plot
NUM_COLORS = 6
MOST_POINTS = 500  # points of one line; of more, the lowest and the highest of each stretch are drawn
MOST_DOTS = 60
MOST_COLUMNS = 60
MOST_TITLED_CELLS = 3000
_VIRIDIS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))  # readable by the colour-blind

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line through points with rising x. Where y is nan or inf it has a gap and a mark at the top. `color` picks a colour and a dash."""

    name: str
    points: Sequence[Point]
    color: int = 0
    faint: bool = False
    dots: bool = False


def short(value: float) -> str:
    """1234567 -> 1.23M; 0.0003 -> 0.0003; 1e-07 -> 1e-07: at most four digits, for axes and tables."""
    if not math.isfinite(value):
        return str(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= abs(value) < 1e15:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between low and high."""
    span = high - low
    if not (span / count > 0 and math.isfinite(span)):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next((power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count), power * 10)
    if step <= 0 or high + step == high or low + step == low:  # the step is too small to change a float of this size
        return [low, high]
    first, slack = math.floor(low / step), 1e-9 * span  # the quotient is rounded: up to the next whole number where low has many digits
    return [place * step for place in range(first, first + count + 3) if low - slack <= place * step <= high + slack]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, and their multiples by 2 and 5 where there would be fewer than three."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // 6)
    powers = [10.0**power for power in range(first, last + 1, stride) if low <= 10.0**power <= high * 1.0001]
    if len(powers) >= 3:
        return powers
    fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    return [tick for tick in fine if low <= tick <= high * 1.0001] or [low]


class _Scale:
    """Maps values to places in the drawing, linearly or by their logarithm. Values outside are drawn at the edge."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.log = log and low > 0
        # Leaves room for arithmetic with the limits.
        low, high = max(low, 1e-300 if self.log else -1e300), min(high, 1e300)
        if not high > low:
            low, high = (low / 2, high * 2) if self.log else (low - max(abs(low), 1e-9) * 0.1, high + max(abs(high), 1e-9) * 0.1)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        share = (value / 2 - low / 2) / (high / 2 - low / 2)  # halves, because the difference of two floats may exceed the largest one
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` of the points, among them the highest and lowest of each stretch and one that is not finite."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // (most // 2))
    kept: list[Point] = []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        chosen = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])} if finite else set()
        broken = [point for point in stretch if not math.isfinite(point[1])][:1]
        kept += sorted([*chosen, *broken], key=lambda point: point[0])
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of the fiftieth of all points that lies around each point, fewer towards the ends and as many on both sides, so that the line
    does not lag behind. Points that are not finite are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    wide = max(2, len(finite) // 100)
    result = []
    for place in sorted({*range(0, len(finite), max(1, len(finite) // MOST_POINTS)), len(finite) - 1}) if finite else ():
        x, y = finite[place]
        reach = min(wide, place, len(finite) - 1 - place)
        near = [value for _, value in finite[place - reach : place + reach + 1]]
        mean = math.fsum(value / len(near) for value in near)
        result.append((x, mean if math.isfinite(mean) else y))
    return result


def _described(name: str, title: str, description: str, body: Sequence[Html | None], height: float = HEIGHT) -> Html:
    """An SVG with a title and a description for screen readers. `name` makes its ids unique on the page."""
    head = element("title", title, id=f"{name}-title"), element("desc", description, id=f"{name}-desc")
    return element("svg", *head, *body, viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_labelledby=f"{name}-title {name}-desc")


def _label(content: str, x: float, y: float, anchor: str = "middle", class_: str | None = None) -> Html:
    return element("text", content, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def describe(series: Sequence[Series]) -> str:
    """The lines in words: the first, last, lowest and highest value of each."""
    parts = []
    for each in series:
        finite = [(x, y) for x, y in each.points if math.isfinite(y)]
        if each.faint or not finite:
            continue
        (x0, y0), (x1, y1) = finite[0], finite[-1]
        low, high = min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])
        parts.append(
            f"{each.name}: {short(y0)} at {short(x0)}, {short(y1)} at {short(x1)}; lowest {short(low[1])} at {short(low[0])}, "
            f"highest {short(high[1])} at {short(high[0])}."
        )
    return " ".join(parts) or "No finite values."


def line_chart(name: str, title: str, series: Sequence[Series], x_label: str, log: bool = False, marks: Sequence[tuple[float, str]] = ()) -> Html:
    """Lines over one x axis. log: a logarithmic y axis, where all values are positive. marks: (x, words) of vertical lines."""
    finite = [(x, y) for each in series for x, y in each.points if math.isfinite(y) and math.isfinite(x)]
    if not finite:
        finite = [(x, 0.0) for each in series for x, _ in each.points] or [(0.0, 0.0)]
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    across = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = _Scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP, log)
    body: list[Html] = []
    for tick in up.ticks():
        y = up(tick)
        body.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        body.append(_label(short(tick), LEFT - 6, y + 4, "end"))
    for tick in ticks(across.low, across.high, 4):
        x, words = across(tick), short(tick)
        edge = x + 4 * len(words) > WIDTH  # centred, half of it would lie outside the picture
        body.append(_label(words, WIDTH if edge else x, HEIGHT - BOTTOM + 16, "end" if edge else "middle"))
    body.append(_label(x_label, WIDTH - RIGHT, HEIGHT - 3, "end", "quiet"))
    for x, words in marks[:200]:
        place = f"{across(x):.1f}"
        body.append(element("line", element("title", words), x1=place, x2=place, y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"))
    for each in series:
        body += _line(each, across, up)
    return _described(name, title, describe(series), body)


def _line(series: Series, across: _Scale, up: _Scale) -> list[Html]:
    color = f"c{series.color % NUM_COLORS} d{series.color // NUM_COLORS % 3}"
    parts: list[Html] = []
    path, pen = [], "M"
    for x, y in thinned(series.points):
        if not math.isfinite(y):
            pen, place = "M", across(x)
            shape = f"M{place - 4:.1f} {TOP}h8l-4 7z"
            parts.append(element("path", element("title", f"{series.name}: {y} at {short(x)}"), d=shape, class_="bad"))
            continue
        path.append(f"{pen}{across(x):.1f} {up(y):.1f}")
        pen = "L"
    if path:
        parts.insert(0, element("path", d="".join(path), class_=f"line {color}{' faint' if series.faint else ''}"))
    finite = [(x, y) for x, y in series.points if math.isfinite(y)]
    if (series.dots and len(finite) <= MOST_DOTS) or len(finite) == 1:
        for x, y in finite:
            words = element("title", f"{series.name}: {short(y)} at {short(x)}")
            parts.append(element("circle", words, cx=f"{across(x):.1f}", cy=f"{up(y):.1f}", r=3, class_=f"dot {color}"))
    return parts


def _viridis(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1]))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def columns_of(steps: Sequence[int]) -> list[list[int]]:
    """The indices of the steps that share each column of a heat map."""
    size = max(1, -(-len(steps) // MOST_COLUMNS))
    return [list(range(first, min(first + size, len(steps)))) for first in range(0, len(steps), size)]


def heat_map(
    name: str, title: str, rows: Sequence[str], steps: Sequence[int], values: Sequence[Sequence[float | None]], x_label: str = "step"
) -> Html:
    """values[row][step] as colours on a logarithmic scale; a column shows the largest value of its steps. Values that are not finite are marked."""
    columns = columns_of(steps)
    cells = [[_largest([line[place] for place in column]) for column in columns] for line in values]
    positive = [cell for line in cells for cell in line if cell is not None and math.isfinite(cell) and cell > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    scale = _Scale(low, high, 0.0, 1.0, log=True)
    left, bar = 104, 34
    tall = min(18.0, max(7.0, 400 / max(len(rows), 1)))
    wide = (WIDTH - RIGHT - left) / max(len(columns), 1)
    height = TOP + tall * len(rows) + BOTTOM + bar
    titled = len(rows) * len(columns) <= MOST_TITLED_CELLS
    body: list[Html] = []
    every = max(1, math.ceil(10 / tall))  # so many rows share a label, so that labels do not overlap
    for row, (label, line) in enumerate(zip(rows, cells)):
        y = TOP + row * tall
        if row % every == 0:
            body.append(_label(label if len(label) <= 16 else label[:7] + ".." + label[-7:], left - 6, y + tall / 2 + 4, "end", "small"))
        for column, cell in enumerate(line):
            if cell is None:
                continue
            ok = math.isfinite(cell)
            span = columns[column]
            when = f"{steps[span[0]]}" if len(span) == 1 else f"{steps[span[0]]} to {steps[span[-1]]}"
            words = element("title", f"{label}, {x_label} {when}: {short(cell)}") if titled or not ok else None
            box: dict[str, Any] = {"x": f"{left + column * wide:.1f}", "y": f"{y:.1f}", "width": f"{wide + 0.3:.1f}", "height": f"{tall + 0.3:.1f}"}
            fill = (_viridis(scale(cell)) if cell > 0 else _viridis(0.0)) if ok else None
            body.append(element("rect", words, **box, fill=fill, class_=None if ok else "bad"))
    bottom = TOP + tall * len(rows)
    if steps:
        body.append(_label(short(steps[0]), left, bottom + 16, "start"))
        body.append(_label(f"{short(steps[-1])} {x_label}", WIDTH - RIGHT, bottom + 16, "end"))
    for part in range(40):
        box = {"x": f"{left + part * 4:.0f}", "y": f"{bottom + 26:.1f}", "width": 4.3, "height": 10}
        body.append(element("rect", **box, fill=_viridis(part / 39)))
    body.append(_label(short(low), left - 6, bottom + 36, "end"))
    body.append(_label(f"{short(high)} (logarithmic)", left + 166, bottom + 36, "start"))
    highest = max(((cell, label) for label, line in zip(rows, cells) for cell in line if cell is not None and math.isfinite(cell)), default=None)
    broken = sum(cell is not None and not math.isfinite(cell) for line in cells for cell in line)
    said = f"{len(rows)} rows over {len(steps)} steps, from {short(low)} to {short(high)}."
    said += f" The largest is in {highest[1]}." if highest else ""
    said += f" {broken} cells are not finite." if broken else ""
    return _described(name, title, said, body, height)


def _largest(values: Sequence[float | None]) -> float | None:
    """The largest value that is known, or one that is not finite, so that it is seen."""
    known = [value for value in values if value is not None]
    return next((value for value in known if not math.isfinite(value)), max(known, default=None))


def share_bar(name: str, title: str, parts: Sequence[tuple[str, float]]) -> Html:
    """One bar cut into shares of the whole. The page adds its legend."""
    total = sum(value for _, value in parts) or 1.0
    body, x = [], 0.0
    for place, (label, value) in enumerate(parts):
        wide = WIDTH * value / total
        words = element("title", f"{label}: {100 * value / total:.1f} %")
        body.append(element("rect", words, x=f"{x:.1f}", y=0, width=f"{wide:.1f}", height=28, class_=f"fill c{place % NUM_COLORS}"))
        x += wide
    said = ", ".join(f"{label} {100 * value / total:.1f} %" for label, value in parts)
    return _described(name, title, said + ".", body, 28)


def bars(name: str, title: str, rows: Sequence[tuple[str, float]]) -> Html:
    """One bar a row, with its label before it and its value behind."""
    left, tall = 120, 22
    most = max((value for _, value in rows), default=0) or 1
    body: list[Html] = []
    for place, (label, value) in enumerate(rows):
        y, wide = place * tall, (WIDTH - left - 70) * value / most
        body.append(_label(label if len(label) <= 18 else label[:16] + "..", left - 6, y + 15, "end", "small"))
        body.append(
            element("rect", element("title", f"{label}: {value:,.0f}"), x=left, y=y + 3, width=f"{wide:.1f}", height=tall - 6, class_="fill c0")
        )
        body.append(_label(short(value), left + wide + 6, y + 15, "start", "small"))
    return _described(name, title, ", ".join(f"{label} {value:,.0f}" for label, value in rows) + ".", body, tall * max(len(rows), 1))
