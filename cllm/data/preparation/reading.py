"""Stage 1 of the plan: which tasks read the files, and which rows of a piece each of them has read.

A task reads a piece. A piece that is one large file of records is read by several, each a part of it: whole lines, or row groups of Parquet. What
decides how its records are read is told of the whole file before, and what is to be said of the whole file is added up behind its last part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cllm.data.extract.parts import Left, Part
from cllm.data.preparation.cuts import Cut, form_of, parts_of_groups, parts_of_lines
from cllm.data.preparation.inputs import Digests, Piece, Source
from cllm.data.preparation.ledger import Done, Ledger, Runner, Task
from cllm.data.preparation.recipe import DIVISION_VERSION, VERSIONS, Recipe
from cllm.data.preparation.rows import digest_of
from cllm.runtime.progress import Progress
from cllm.runtime.quantities import size

_ROOM = "cllm.data.preparation.extraction"
_LABEL = "Reading documents"
_PIECE = 0xFFFFFFFF  # the bits of a task's number that are the number of its piece


@dataclass(frozen=True)
class Read:
    """What one task has extracted: a piece, or a part of a large file, whose rows are those of the piece from `first` on."""

    piece: Piece
    first: int
    done: Done


@dataclass(frozen=True)
class _Large:
    """A file of records that may be read in parts. `cuts`: of its lines; none of Parquet."""

    task: Task
    """Reads the whole."""
    digest: str
    cuts: Sequence[Cut]


@dataclass(frozen=True)
class _Share:
    """What one task reads of a large file, what its content is known by, and how many bytes it has."""

    part: Part
    digest: str
    bytes: int


class Reading:
    """Reads all pieces of some sources."""

    def __init__(self, sources: Mapping[str, Source], recipe: Recipe, ledger: Ledger, runner: Runner) -> None:
        self._sources, self._ledger, self._runner = sources, ledger, runner
        self._options, self._sizes = dict(recipe.extraction), recipe.sizes

    def run(self, pieces: Sequence[Piece]) -> list[Read]:
        """In the order of documents."""
        whole, large = self._look(pieces)
        shares = self._shares(large)
        tasks: list[Task] = []
        for number, task in whole.items():
            tasks += [_of_share(task, place, share) for place, share in enumerate(shares.get(number, []))] or [task]
        by_piece: dict[int, list[Done]] = {piece.number: [] for piece in pieces}
        for task, done in zip(tasks, self._stage("extract", tasks)):
            by_piece[task.number & _PIECE].append(done)
        ends = [end for number in shares for end in _end(whole[number], by_piece[number])]
        for task, done in zip(ends, self._stage("close", ends)):
            by_piece[task.number & _PIECE].append(done)
        self._ledger.tidy("extract", {task.number for task in [*tasks, *ends]}, lambda number: number & _PIECE in by_piece)
        reads = []
        for piece in pieces:
            first = 0
            for done in by_piece[piece.number]:
                reads.append(Read(piece, first, done))
                first += done.result["rows"]
        return reads

    def _look(self, pieces: Sequence[Piece]) -> tuple[dict[int, Task], dict[int, _Large]]:
        """By the number of its piece, a task that reads all of it, and the large files. Reads all files to tell whether they have changed."""
        total, seen = sum(status.st_size for source in self._sources.values() for status in source.found.values()), 0
        digests, part_chars = Digests(self._ledger.folder), self._sizes.part_chars
        whole: dict[int, Task] = {}
        large: dict[int, _Large] = {}
        with digests.kept(), Progress(total, "Looking at the files", unit="bytes") as bar:

            def read(num_bytes: int) -> None:
                nonlocal seen
                seen += num_bytes
                bar.update(seen, f"{size(seen)} of {size(total)}")

            for piece in pieces:
                source = self._sources[piece.source]
                there = [name for name in piece.files if name in source.found or name in source.refused]
                refused = {name: source.refused[name] for name in there if name in source.refused}
                found = {name: source.found[name] for name in there if name in source.found}
                weight = sum(status.st_size for status in found.values())
                form = form_of(source.path(there[0]), there[0]) if len(there) == 1 and found and weight > self._sizes.piece_bytes else ""
                cuts: list[Cut] = []
                if form == "lines":
                    cuts = digests.cuts_of(source.path(there[0]), found[there[0]], self._sizes.piece_bytes, read)
                contents = {name: digests.of(source.path(name), status, read) for name, status in found.items() if not cuts}
                if cuts:
                    contents[there[0]] = digest_of([each.digest for each in cuts])
                arguments = {
                    "piece": piece.number, "source": source.name, "root": source.root, "files": there, "refused": refused, "options": self._options,
                    "part_chars": part_chars,
                }  # fmt: skip
                files = [[name, contents[name] if name in found else refused[name]] for name in there]
                depends = [source.name, files, without_secrets(self._options), part_chars]
                whole[piece.number] = Task(piece.number, arguments, depends, 1 + weight)
                if form == "groups" or len(cuts) > 1:
                    large[piece.number] = _Large(whole[piece.number], contents[there[0]], cuts)
        return whole, large

    def _shares(self, large: Mapping[int, _Large]) -> dict[int, list[_Share]]:
        """How large files are read in parts, by the numbers of their pieces. One that can only be read as a whole is missing."""
        tasks = []
        for number, file in large.items():
            (name,) = file.task.arguments["files"]
            arguments = {"root": file.task.arguments["root"], "name": name, "options": self._options}
            tasks.append(Task(number, arguments, [name, file.digest, without_secrets(self._options)]))
        label, function = "Looking into large files", f"{_ROOM}:divide"
        found = self._ledger.stage("division", label, function, DIVISION_VERSION, tasks, self._runner, "files")
        shares: dict[int, list[_Share]] = {}
        for (number, file), done in zip(large.items(), found):
            how = done.result["how"]
            if file.cuts:
                shares[number] = [_Share(part, each.digest, part.end - part.begin) for part, each in zip(parts_of_lines(how, file.cuts), file.cuts)]
            else:
                shares[number] = [_Share(part, file.digest, num_bytes) for part, num_bytes in parts_of_groups(how, self._sizes.piece_bytes)]
        return {number: own for number, own in shares.items() if own}

    def _stage(self, function: str, tasks: Sequence[Task]) -> list[Done]:
        return self._ledger.stage("extract", _LABEL, f"{_ROOM}:{function}", VERSIONS["extract"], tasks, self._runner, "bytes")


def _of_share(whole: Task, place: int, share: _Share) -> Task:
    """The task that reads a part of a file. It depends on the bytes of the part and not on where they stand, but for the number of the first line."""
    part = share.part.to_dict()
    where = [share.part.begin, share.part.end] if share.part.is_groups else [share.part.line]
    source, _, *how = whole.depends_on
    depends = [source, *whole.arguments["files"], share.digest, where, part["how"], *how]
    return Task(place << 32 | whole.number, {**whole.arguments, "part": part}, depends, 1 + share.bytes)


def _end(whole: Task, parts: Sequence[Done]) -> list[Task]:
    """The task that tells what was left out of a file behind its documents, where something was."""
    left = Left()
    for done in parts:
        left.update(Left.from_dict(done.result["left"]))
    (name,) = whole.arguments["files"]
    arguments = {"piece": whole.number, "source": whole.arguments["source"], "name": name, "reason": left.reason}
    return [Task(len(parts) << 32 | whole.number, arguments, list(arguments.values()))] if left.reason else []


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a ledger may remember them: of passwords only the digest."""
    return {name: digest_of(value) if name == "passwords" else value for name, value in options.items()}
