"""Keys and values of many sequences in pages, and one step of the model over tokens of any of them.

A sequence has a list of pages (Kwon et al. 2023, PagedAttention, arXiv 2309.06180); token p lies in page p // PAGE, at place p % PAGE. Full pages
may be shared. A step takes tokens of any sequences side by side as one batch of N tokens: newest tokens, drafts, parts of prompts. Every kernel
gives a row the same bits whatever rows lie beside it, so that each token's logits are those that it would have alone.

N tokens, R sequences, M pages of the longest one, W tokens whose logits are wanted, V vocabulary.
"""

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cllm import kernels
from cllm.kernels.paged_attention import PAGE
from cllm.kernels.quantization import quantize_rows
from cllm.model.ngrams import NONE, row_of
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.config.model import ModelConfig

__all__ = ["PAGE", "DeviceTokens", "PageBatch", "PagePool", "Part", "page_bytes", "pages_for"]


PagedLayer = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]  # keys, values, and the scales of both where they are int8


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE)


def page_bytes(config: "ModelConfig", dtype: torch.dtype) -> int:
    """Bytes that one page of numbers of `dtype` takes in all layers together, keys and values; of int8 with their scales."""
    head = config.head_size * dtype.itemsize + (torch.float32.itemsize if dtype == torch.int8 else 0)
    return 2 * config.num_layers * PAGE * config.kv_heads * head


class PagePool:
    """The pages of all layers, and which of them are free. A page is held by whoever took it and by everyone who `hold`s it besides.

    dtype: of keys and values, the model's compute dtype or int8. A row of int8, a head of one token, is written once and depends on itself alone, so
    that it has the same bits whatever came with it.
    """

    def __init__(self, config: "ModelConfig", num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        if num_pages < 1:
            raise UserError(f"a pool needs at least one page, got {num_pages}.")
        shape = (num_pages, PAGE, config.kv_heads, config.head_size)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        # Of the rows of keys and of values in each layer, where they are int8.
        self.scales: list[tuple[Tensor, Tensor]] | None = None
        if dtype == torch.int8:
            keys, values = ([torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in range(config.num_layers)] for _ in range(2))
            self.scales = list(zip(keys, values))
        self.layers: list[PagedLayer] = list(zip(self.keys, self.values, self.scales or repeat(None)))
        self.ngram_tables = config.ngram_tables
        # The token of each place, on the host, where the model looks n-grams up.
        self.tokens = array("q", bytes(8 * num_pages * PAGE)) if config.ngram_tables else None
        self.num_pages = num_pages
        self.device = device
        self.decoder: Any = None  # what the model prepared to decode into these pages, and for which settings
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    def current(self) -> AbstractContextManager[object]:
        """Makes the pool's GPU the current one, which pinned memory and captures go by."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free page, held once. IndexError where there is none."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One holder more."""
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less; without any the page is free."""
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """The first `num_tokens` places of a page into another."""
        for layer in (*self.keys, *self.values, *chain.from_iterable(self.scales or ())):
            layer[target, :num_tokens] = layer[source, :num_tokens]
        if self.tokens is not None:
            begin, there = source * PAGE, target * PAGE
            self.tokens[there : there + num_tokens] = self.tokens[begin : begin + num_tokens]


class Part(NamedTuple):
    """The newest tokens of one sequence in a step."""

    tokens: Sequence[int]
    """At least one; their keys and values are stored."""
    start: int
    """How many tokens of the sequence lie in its pages already; the position of the first new one."""
    pages: Sequence[int]
    """With room for all of them."""
    wanted: int
    """For how many of the last tokens logits are wanted, from 0 on."""


class PageBatch:
    """The parts of one step as tensors on the device of a pool. For `Context` it is the cache: `attend` stores the new keys and sees all."""

    def __init__(self, pool: PagePool, parts: Sequence[Part]) -> None:
        # Plain lists: a step of one token has no time for a dozen calls of a tensor library.
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        owners: list[int] = []
        for number, part in enumerate(parts):
            tokens += part.tokens
            end = part.start + len(part.tokens)
            positions += range(part.start, end)
            slots += [part.pages[place // PAGE] * PAGE + place % PAGE for place in range(part.start, end)]
            wanted += range(len(tokens) - part.wanted, len(tokens))
            owners += [number] * len(part.tokens)
        most = max(pages_for(part.start + len(part.tokens)) for part in parts)
        self.pool = pool
        self._parts, self._owners, self._device = parts, owners, pool.device
        self._pages = [[*part.pages[:most], *([0] * (most - len(part.pages)))] for part in parts]
        self._tokens, self._positions, self._slots, self._wanted = tokens, positions, slots, wanted
        self._before = self._tokens_before() if pool.tokens is not None else []
        self.num_tokens = len(tokens)
        self.wants_all = len(wanted) == len(tokens)

    def lists(self) -> tuple[list[int], list[int], list[int], list[list[int]], list[list[int]]]:
        """Tokens, positions, slots, the pages of each token's sequence, and for each table of n-grams the row of each token, as a decoder takes
        them."""
        pages = [self._pages[owner] for owner in self._owners]
        return self._tokens, self._positions, self._slots, pages, self._ngram_rows()

    def numbers(self) -> tuple[list[list[int]], list[list[int]]]:
        """The pages of each token's sequence, as many for all; then tokens, positions, slots, and for each distance that an n-gram reaches back the
        tokens so far before."""
        return [self._pages[owner] for owner in self._owners], [self._tokens, self._positions, self._slots, *self._before]

    def before(self, tokens: Tensor, distance: int) -> Tensor:
        """Of each of the new tokens, (1, N), the one so many places before it in its sequence."""
        return self._tensor(self._before[distance - 1]).unsqueeze(0)

    def _tokens_before(self) -> list[list[int]]:
        """For each distance that an n-gram reaches back, the token so many places before each new one. All new tokens are stored first."""
        stored = self.pool.tokens
        assert stored is not None
        for slot, token in zip(self._slots, self._tokens):
            stored[slot] = token
        reach = max(length for length, _ in self.pool.ngram_tables) - 1
        found: list[list[int]] = [[] for _ in range(reach)]
        for position, owner in zip(self._positions, self._owners):
            pages = self._pages[owner]
            for distance, tokens in enumerate(found, 1):
                place = position - distance
                tokens.append(stored[pages[place // PAGE] * PAGE + place % PAGE] if place >= 0 else NONE)
        return found

    def _ngram_rows(self) -> list[list[int]]:
        """For each table the row of the n-gram that ends with each new token."""
        return [[row_of(gram, rows) for gram in zip(self._tokens, *self._before[: length - 1])] for length, rows in self.pool.ngram_tables]

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) int64."""
        return self._tensor(self._tokens)

    @cached_property
    def positions(self) -> Tensor:
        """(N,) int64, each in its sequence."""
        return self._tensor(self._positions)

    @cached_property
    def slots(self) -> Tensor:
        """(N,) int64, among all places of the pool."""
        return self._tensor(self._slots)

    @cached_property
    def wanted(self) -> Tensor:
        """(W,) int64, among the N tokens."""
        return self._tensor(self._wanted)

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        made = torch.tensor(values, dtype=dtype)
        return made.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else made.to(self._device)

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pages (R, M) int32, lengths (R,) int64 with the new tokens, and how many these are (R,) int64."""
        counts = [len(part.tokens) for part in self._parts]
        lengths = [part.start + count for part, count in zip(self._parts, counts)]
        return self._tensor(self._pages, torch.int32), self._tensor(lengths), self._tensor(counts)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (1, N, H, D), k and v (1, N, H_kv, D) of the new tokens -> (1, N, H, D) over all tokens of each one's sequence so far."""
        return _attend(self.pool.layers[layer], self.slots, self._table, q, k, v, window)


class DeviceTokens:
    """N tokens at fixed addresses, each a sequence of its own to the kernels. For `Context` it is the cache, as a `PageBatch` is.

    `numbers` (K + M, N) int64 holds tokens, positions, slots, for each distance that an n-gram reaches back the tokens so far before, and the page
    numbers of each token's sequence.
    """

    def __init__(self, layers: Sequence[PagedLayer], num_tokens: int, num_pages: int, num_rows: int) -> None:
        device = layers[0][0].device
        self._layers, self._num_rows, self._num_pages = layers, num_rows, num_pages
        self.numbers = torch.zeros((num_rows + num_pages, num_tokens), dtype=torch.int64, device=device)
        self._ones = torch.ones(num_tokens, dtype=torch.int64, device=device)

    def take(self, pages: list[list[int]], numbers: list[list[int]]) -> None:
        """Copies the numbers of a step to the device, without waiting for the copy to end."""
        missing = self.numbers.shape[1] - len(pages)
        pages = [[*row, *[0] * (self._num_pages - len(row))] for row in (*pages, *pages[-1:] * missing)]
        rows = [[*row, *row[-1:] * missing] for row in numbers]
        there = torch.tensor(rows + [list(column) for column in zip(*pages)], dtype=torch.int64)
        if self.numbers.device.type == "cuda":
            there = there.pin_memory()
        self.numbers.copy_(there, non_blocking=True)

    def positions(self) -> Tensor:
        """(N,) int64. Asked once a step: `attend` looks for every layer's keys where they say."""
        self._pages = self.numbers[self._num_rows :].T.to(torch.int32, memory_format=torch.contiguous_format)
        self._lengths = self.numbers[1] + 1
        return self.numbers[1]

    def before(self, tokens: Tensor, distance: int) -> Tensor:
        """Of each of the tokens, (1, N), the one so many places before it in its sequence."""
        return self.numbers[2 + distance].unsqueeze(0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (1, N, H, D), k and v (1, N, H_kv, D) -> (1, N, H, D) over all tokens of each one's sequence up to itself."""
        table = self._pages, self._lengths, self._ones
        return _attend(self._layers[layer], self.numbers[2], table, q, k, v, window)


def _attend(layer: PagedLayer, slots: Tensor, table: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Stores the new keys and values of a layer, one of each for each of `slots`, and sees all by the table: pages, lengths, queries."""
    keys, values, scales = layer
    for number, (pool, new) in enumerate(((keys, k[0]), (values, v[0]))):
        if scales is not None:
            new, of_rows = quantize_rows(new)
            scales[number].flatten(0, 1).index_copy_(0, slots, of_rows)
        pool.flatten(0, 1).index_copy_(0, slots, new)
    return kernels.paged_attention(q[0], keys, values, *table, window=window, scales=scales)[None]
