"""Pages of finished and running sequences that others begin with: found by their tokens, given back oldest first.

A tree whose nodes are pages: the children of a page hold what followed it (Zheng et al. 2024, SGLang's RadixAttention, arXiv 2312.07104). Full pages
are shared as they are. Of a page that has more or other tokens at its end, the common beginning is copied. Since a token's keys and values have the
same bits whoever computed them, an answer does not depend on what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cllm.model.pages import PAGE, PagePool

WORTH_COPYING = 8  # tokens: computing fewer is as quick as copying a page
MOST_LOOKED_AT = 64  # children of a page that are compared token by token, the newest first


class Found(NamedTuple):
    """What of a sequence lies in pages already. The caller holds `pages`, all full."""

    pages: list[int]
    beginning_of: int | None
    """A page whose first `num_copied` tokens follow, to be copied before anything else happens."""
    num_copied: int


class _Node:
    __slots__ = ("children", "depth", "page", "parent", "tokens", "used")

    def __init__(self, parent: _Node | None, tokens: tuple[int, ...], page: int) -> None:
        self.parent, self.tokens, self.page = parent, tokens, page
        self.children: dict[tuple[int, ...], _Node] = {}
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.used = 0


class Prefixes:
    """The tree over the pages of one pool; it holds each page once."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = _Node(None, (), -1)
        self._clock = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def find(self, tokens: Sequence[int]) -> Found:
        """The longest beginning of `tokens` that lies in pages."""
        self._clock += 1
        node = self._root
        pages: list[int] = []
        while child := node.children.get(tuple(tokens[len(pages) * PAGE : (len(pages) + 1) * PAGE])):
            if len(child.tokens) < PAGE:
                break
            node = child
            node.used = self._clock
            self._pool.hold(node.page)
            pages.append(node.page)
        rest = tokens[len(pages) * PAGE : (len(pages) + 1) * PAGE]
        best, length = None, WORTH_COPYING - 1
        for _, child in zip(range(MOST_LOOKED_AT), reversed(node.children.values())):
            common = _common(child.tokens, rest)
            if common > length:
                best, length = child, common
        if best is None:
            return Found(pages, None, 0)
        best.used = self._clock
        return Found(pages, best.page, length)

    def add(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """`tokens` lie in `pages`, whose places behind them may still be written to."""
        self._clock += 1
        node = self._root
        for number in range(-(-len(tokens) // PAGE)):
            here = tuple(tokens[number * PAGE : (number + 1) * PAGE])
            child = node.children.get(here)
            if child is None:
                if len(here) < PAGE and any(each.tokens[: len(here)] == here for each in node.children.values()):
                    return
                for shorter in [each for each in node.children.values() if each.tokens == here[: len(each.tokens)]]:
                    self._drop(shorter)  # it ends inside of `here`, so it has no children
                child = node.children[here] = _Node(node, here, pages[number])
                self._pool.hold(child.page)
                self._size += 1
            child.used = self._clock
            node = child

    def num_evictable(self) -> int:
        """Pages that `evict` could free: nobody else holds them, nor any page behind them."""
        return self._size - len(self._needed())

    def evict(self, count: int) -> None:
        """Frees `count` pages, those that were not used for longest, or all that nobody else holds if those are fewer."""
        needed = self._needed()
        # What a page was found for was found through the pages before it, so that none of them is older; of equals the deepest goes first.
        unneeded = sorted((node for node in self._nodes() if node not in needed), key=lambda node: (node.used, -node.depth))
        for node in unneeded[:count]:
            self._drop(node)

    def clear(self) -> None:
        """Gives back every page."""
        for node in list(self._nodes()):
            self._pool.release(node.page)
        self._root.children.clear()
        self._size = 0

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None and not node.children
        del node.parent.children[node.tokens]
        self._pool.release(node.page)
        self._size -= 1

    def _nodes(self) -> Iterator[_Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _needed(self) -> set[_Node]:
        """Nodes whose page somebody else holds, and those on the way to them."""
        found: set[_Node] = set()
        for node in self._nodes():
            if self._pool.holders(node.page) > 1:
                at: _Node | None = node
                while at is not None and at is not self._root and at not in found:
                    found.add(at)
                    at = at.parent
        return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for place, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return place
    return min(len(a), len(b))
