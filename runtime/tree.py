"""The fixed reduction tree: what makes a sum independent of the number of workers.

A sum over n parts is taken in groups of twelve neighbours, then of twelve group sums, level by level up to one root: the hierarchy of one root
and twelve children each that workers once formed here, now a rule of arithmetic. The grouping depends on n alone. Whoever computes the parts,
in whatever order and with however many workers, the additions are the same and so are the bits.
"""

import operator
from collections.abc import Callable, Sequence
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


class Binary:
    """The tree of fan-out 2 over leaves that come one after the other: `sum(parts, fanout=2)` while only 2 log2(n) values are kept.

    A stack of finished subtrees, as the digits of a binary counter. A worker that holds leaves a to b keeps the complete subtrees among them;
    pushed in order of their leaves onto one stack, the nodes of all workers make the sum of the whole tree, whoever held which.
    """

    def __init__(self, add: Callable[[Any, Any], Any] = operator.add) -> None:
        self._add = add
        self.nodes: list[tuple[int, int, Any]] = []  # (level, index within the level, sum), from left to right

    def push(self, index: int, value: Any, level: int = 0) -> None:
        """The next leaf, or the next subtree of 2**level leaves: node `index` of its level."""
        while index % 2 and self.nodes and self.nodes[-1][:2] == (level, index - 1):
            value = self._add(self.nodes.pop()[2], value)
            index, level = index // 2, level + 1
        self.nodes.append((level, index, value))

    def total(self) -> Any:
        """The sum of all leaves from leaf 0 on. A node without a right neighbour rises to the next level as it is."""
        if not self.nodes:
            raise ValueError("tree.Binary needs at least one leaf")
        total = self.nodes[-1][2]
        for _, _, value in reversed(self.nodes[:-1]):
            total = self._add(value, total)
        return total


def subtrees(first: int, last: int) -> list[tuple[int, int]]:
    """The complete subtrees (level, index) that leaves first to last - 1 of a binary tree make up, from left to right."""
    walked = Binary(lambda left, right: None)
    for leaf in range(first, last):
        walked.push(leaf, None)
    return [(level, index) for level, index, _ in walked.nodes]
