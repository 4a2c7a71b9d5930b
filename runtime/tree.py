"""The fixed reduction tree: what makes a sum independent of the number of workers.

A sum over n parts is taken in groups of twelve neighbours, then of twelve group sums, level by level up to one root: the hierarchy of one root
and twelve children each that workers once formed here, now a rule of arithmetic. The grouping depends on n alone. Whoever computes the parts,
in whatever order and with however many workers, the additions are the same and so are the bits.
"""

from collections.abc import Sequence
from typing import Any

FANOUT = 12


def levels(n: int, fanout: int = FANOUT) -> list[int]:
    """Number of nodes per level, leaves first: levels(150) == [150, 13, 2, 1]."""
    if n < 0 or fanout < 2:
        raise ValueError(f"a tree needs n >= 0 leaves and fanout >= 2, got {n} and {fanout}")
    counts = [n]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // fanout))
    return counts


def describe(n: int, fanout: int = FANOUT) -> str:
    """The tree over n parts from its root down: "1 <- 2 <- 13 <- 150"."""
    return " <- ".join(f"{count:,}" for count in reversed(levels(n, fanout)))


def sum(parts: Sequence[Any], fanout: int = FANOUT) -> Any:
    """The sum of numbers, arrays or tensors of one shape in tree order; the parts stay as they are.

    Raises ValueError for no parts at all: an empty sum has no shape.
    """
    if not parts:
        raise ValueError("tree.sum needs at least one part")
    nodes = list(parts)
    while len(nodes) > 1:
        grouped = []
        for start in range(0, len(nodes), fanout):
            total = nodes[start]
            for node in nodes[start + 1 : start + fanout]:
                total = total + node
            grouped.append(total)
        nodes = grouped
    return nodes[0]
