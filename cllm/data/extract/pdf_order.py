"""The lines of a page in the order of reading: columns one after the other, by cutting the page at its gutters (XY-cut, Nagy and Seth 1984)."""

from itertools import pairwise

from cllm.data.extract.pdf_lines import Line

_FEWEST = 5  # lines in a column
_GUTTER = 0.9  # width, in sizes of the font
_NARROWEST = 0.55  # of its column, that the lines of running text fill; cells of a table fill less
_DEEPEST = 12


def in_reading_order(lines: list[Line]) -> list[Line]:
    """The lines of a page from top to bottom, column by column; pieces of one line are joined."""
    return _cut(lines, 0)


def _cut(lines: list[Line], depth: int) -> list[Line]:
    if depth < _DEEPEST and len(lines) >= 2 * _FEWEST:
        if sides := _columns(lines):
            return [line for side in sides for line in _cut(side, depth + 1)]
        if bands := _bands(lines):
            return [line for band in bands for line in _cut(band, depth + 1)]
    return _rows(lines)


def _columns(lines: list[Line]) -> list[list[Line]] | None:
    """The left and the right part of a region through whose whole height a gutter runs, where both are running text."""
    size = _middle([line.size for line in lines])
    best: tuple[float, float] | None = None
    reach = float("-inf")
    for line in sorted(lines, key=lambda line: line.left):
        if reach > float("-inf") and line.left - reach > _GUTTER * size and (best is None or line.left - reach > best[0]):
            best = (line.left - reach, (line.left + reach) / 2)
        reach = max(reach, line.right)
    if best is None:
        return None
    sides = [[line for line in lines if line.right <= best[1]], [line for line in lines if line.right > best[1]]]
    return sides if all(_is_running(side) for side in sides) else None


def _is_running(side: list[Line]) -> bool:
    if len(side) < _FEWEST:
        return False
    width = max(line.right for line in side) - min(line.left for line in side)
    return width > 0 and _middle([line.right - line.left for line in side]) >= _NARROWEST * width and _middle([len(line.text) for line in side]) >= 20


def _bands(lines: list[Line]) -> list[list[Line]] | None:
    """A region cut where a line runs across a gutter of the lines around it: a title or a figure's caption over two columns."""
    left, right = min(line.left for line in lines), max(line.right for line in lines)
    wide = [line for line in lines if line.left < (left + right) / 2 - (right - left) / 20 and line.right > (left + right) / 2 + (right - left) / 20]
    if not wide or len(wide) == len(lines) or len(lines) - len(wide) < 2 * _FEWEST:
        return None
    ordered = sorted(lines, key=lambda line: -line.base)
    bands: list[list[Line]] = []
    was_wide: bool | None = None
    wide_lines = {id(line) for line in wide}
    for line in ordered:
        is_wide = id(line) in wide_lines
        if is_wide != was_wide:
            bands.append([])
        bands[-1].append(line)
        was_wide = is_wide
    # Only worth it where what is between the wide lines is columns; otherwise lines of any length are one text.
    if not any(len(band) >= 2 * _FEWEST and _columns(band) for band in bands):
        return None
    return bands


def _rows(lines: list[Line]) -> list[Line]:
    """Lines from top to bottom, those on one baseline joined from left to right; a wide gap is kept as a tab."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: (-line.base, line.left)):
        if rows and abs(rows[-1][0].base - line.base) < 0.4 * min(rows[-1][0].size, line.size):
            rows[-1].append(line)
        else:
            rows.append([line])
    joined = []
    for row in rows:
        row.sort(key=lambda line: line.left)
        first = row[0]
        text = first.text
        for before, line in pairwise(row):
            text += ("\t" if line.left - before.right > 1.5 * line.size else " " if line.left - before.right > 0.1 * line.size else "") + line.text
        joined.append(Line(text, first.left, row[-1].right, first.base, first.size, all(line.fixed for line in row), all(line.bold for line in row)))
    return joined


def _middle(values: list[float] | list[int]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
