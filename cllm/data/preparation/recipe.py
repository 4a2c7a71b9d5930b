"""How documents are prepared: everything that can change a byte of the result, and nothing that cannot (the number of workers, where tasks run).

Each stage depends on its own part of the recipe, so a change redoes only the stages behind it. The version of a stage grows when its code gives
other bytes for the same input.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cllm.data.clean.rules import Rules
from cllm.data.preparation.inputs import Source
from cllm.data.preparation.rows import digest_of
from cllm.runtime.errors import UserError

VERSIONS = dict.fromkeys(
    ("extract", "versions", "lines", "evaluation", "score", "clean", "sign", "exact", "near", "forest", "verify", "write"), 1
) | {"extract": 3, "evaluation": 2, "score": 2, "clean": 2, "write": 2}
DIVISION_VERSION = 1
"""Of the stage that tells how large files are read in parts. It is no part of the recipe's digest, because it changes no document."""
LARGE_LOSS = 100
"""Near duplicates that a source has to lose before half of it is worth a question."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class Sizes:
    """How the work and the result are cut. The number of workers is no part of it."""

    piece_bytes: int = 8 << 20
    """Of input files that one task reads; a larger file is a piece of its own, and one of records is read in parts of this size by several."""
    part_chars: int = 16 << 20
    """Of extracted text that one task cleans, about: a large file, or an archive, is read by one task and cleaned by many."""
    piece_files: int = 500
    shard_bytes: int = 64 << 20
    """Of text in a shard of the result, about."""
    partition_rows: int = 8 << 20
    """Rows that a task sorts to find duplicates. It bounds the task's memory: some 60 bytes a row."""
    verify_documents: int = 2000
    """Candidates that a task compares."""


@dataclass(frozen=True)
class Mix:
    """How much of a source is taken. `epochs` 2 takes each document twice, 0.5 one of two; `weight` is its share of the text beside the others'
    weights; `cap` is the most text that is taken, in bytes."""

    epochs: float = 1.0
    weight: float | None = None
    cap: int | None = None


@dataclass(frozen=True)
class Recipe:
    filter: bool = True
    dedup: bool = True
    rules: Mapping[str, Any] = field(default_factory=dict)
    """Rules of `cllm.data.clean` by name, where they are not the default."""
    extraction: Mapping[str, Any] = field(default_factory=dict)
    """Options of `cllm.data.extract` by name, where they are not the default."""
    mixes: Mapping[str, Mix] = field(default_factory=dict)
    """Root of a source -> how much of it is taken."""
    against: Sequence[str] = ()
    """Folders of earlier data sets, whose documents are not taken again."""
    exclude: Sequence[str] = ()
    """Places of text for evaluation, which must not be in the result."""
    like: str = ""
    """A place with examples of good text."""

    sizes: Sizes = Sizes()

    def digest(self) -> str:
        """Equal for recipes that give equal results."""
        passwords = digest_of(self.extraction.get("passwords", ()))
        return digest_of([VERSIONS, dataclasses.asdict(self) | {"extraction": {**self.extraction, "passwords": passwords}}])


def rules_of(changes: Mapping[str, Any], filter: bool) -> Rules:
    """The rules with some changed, and without those on quality where nothing is to be filtered. Raises UserError for a rule that there is not."""
    rules = Rules().changed(changes)
    return rules if filter else rules.without_filters()


def read_mix(given: Mapping[str, Sequence[str]], sources: Sequence[Source]) -> dict[str, Mix]:
    """`--epochs`, `--weight` and `--cap` as {"epochs": ["books=2", ...], ...}: how much is taken of each source. Raises UserError."""
    values: dict[str, dict[str, Any]] = {}
    for kind, texts in given.items():
        for text in texts:
            name, equals, value = text.rpartition("=")
            if not equals or not name:
                raise UserError(
                    f"--{kind} must be SOURCE=VALUE, got {text!r}. Use something like --{kind} books={'500MB' if kind == 'cap' else '2'}."
                )
            matching = [source for source in sources if name.rstrip("/") in (source.name, source.root)]
            if not matching:
                names = ", ".join(source.name for source in sources[:8])
                several = sum(os.path.basename(source.root) == name for source in sources) > 1
                what = f"several sources are called {name!r}, so give the whole path of one" if several else f"there is no source {name!r}"
                raise UserError(f"--{kind} {text}: {what}. The sources are {names}.")
            own = values.setdefault(matching[0].root, {})
            if kind in own:
                raise UserError(f"--{kind} was given twice for {name}. Give it once.")
            own[kind] = _amount(kind, text, value)
    mixes = {root: Mix(**found) for root, found in values.items()}
    weighted = [source for source in sources if source.root in mixes and mixes[source.root].weight is not None]
    if weighted and len(weighted) != len(sources):
        missing = next(source.name for source in sources if source not in weighted)
        raise UserError(f"--weight has to be given for all sources or for none; {missing} has none. Add --weight {missing}=1.")
    return mixes


def _amount(kind: str, text: str, value: str) -> float | int:
    if kind == "cap":
        found = _SIZE.fullmatch(value.strip())
        if found is None or float(found[1]) == 0:
            raise UserError(f"--cap must be an amount of text, got {text!r}. Use something like 500MB.")
        return int(float(found[1]) * _UNITS[found[2].lower()])
    try:
        amount = float(value)
    except ValueError:
        amount = -1.0
    if not 0 < amount <= 1000:
        raise UserError(f"--{kind} must be a number above 0 and at most 1000, got {text!r}. Use a value like 2 or 0.5.")
    return amount


def epochs_of(mixes: Mapping[str, Mix], sizes: Mapping[str, int], caps: Mapping[str, float]) -> dict[str, float]:
    """How often each document of a source is taken, when the sources keep so many bytes of text, and so many times fit into the caps of some.

    With weights the text of the sources stands in their proportion, and is as much as their epochs and caps allow.
    """
    most = {root: mixes.get(root, Mix()) for root in sizes}
    limits = {root: min(mix.epochs, caps.get(root, mix.epochs)) for root, mix in most.items()}
    weights = {root: mix.weight for root, mix in most.items() if mix.weight is not None and sizes[root]}
    if weights:
        scale = min(limits[root] * sizes[root] / weight for root, weight in weights.items())
        return {root: min(limits[root], scale * weights[root] / sizes[root]) if root in weights else limits[root] for root in sizes}
    return limits
