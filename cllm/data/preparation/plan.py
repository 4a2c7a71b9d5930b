"""`cllm prepare`: from sources to shards, as stages of tasks over finished files.

    list -> extract -> versions -> lines -> clean -> exact, near -> forest -> verify -> write -> manifest

Each stage is a list of idempotent tasks (see ledger.py); what they work on is in files, and this program only makes the plan: which tasks there are,
and which files each reads. A document's text is in the files of `extract`, `clean` and the result, and nowhere else.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cllm.data.clean.lines import COUNT
from cllm.data.clean.near import BANDS
from cllm.data.documents.files import Skipped
from cllm.data.preparation import duplicates, manifest, shards, tally, versions
from cllm.data.preparation.inputs import Digests, Inputs, Piece, Source, find_sources
from cllm.data.preparation.ledger import Done, Ledger, Runner, Task, tree
from cllm.data.preparation.manifest import Prepared, Shard, open_prepared
from cllm.data.preparation.reading import Read, Reading, without_secrets
from cllm.data.preparation.recipe import LARGE_LOSS, VERSIONS, Recipe, epochs_of, rules_of
from cllm.data.preparation.rows import arrow, digest_of
from cllm.files import DATA, write_file
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.mapped_file import mapped

Ask = Callable[[str], bool]
_ROOM = "cllm.data.preparation"
_LINE_BYTES = COUNT.itemsize


@dataclass
class _Reference:
    """A shard of an earlier data set, whose documents win against all of this one."""

    path: Path
    name: str
    signed: Done


@dataclass(frozen=True)
class _Part:
    """Rows `first` to `last` of a piece, which one task cleans."""

    piece: Piece
    number: int
    """Of its task: that of the piece, and of those behind its first part another."""
    read: Read
    first: int
    last: int
    chars: int


class Preparation:
    """One run over one folder of results."""

    def __init__(self, sources: Sequence[Source], out: Path, recipe: Recipe, runner: Runner, ask: Ask) -> None:
        """ask: a question that a large loss raises; True to go on."""
        self.sources = {source.root: source for source in sources}
        self.out, self.recipe, self.runner, self.ask = out, recipe, runner, ask
        self.ledger = Ledger(out)
        self.inputs = Inputs(self.ledger.folder)
        self.pieces: list[Piece] = []
        self.reads: list[Read] = []
        self.parts: list[_Part] = []
        self.evaluation: Done | None = None
        self.score: Done | None = None
        self.epochs: dict[str, float] = {}

    def run(self) -> Prepared:
        """Raises DataError where there is nothing to prepare, and where a loss was asked about and is not wanted."""
        arrow()
        self._check()
        self.inputs.update(self.sources.values(), self.recipe.sizes.piece_bytes, self.recipe.sizes.piece_files)
        self.pieces = [piece for piece in self.inputs.pieces if piece.source in self.sources]
        if not self.pieces:
            raise DataError(f"there are no files in {', '.join(self.sources)}. Give a folder with documents.")
        self.evaluation = self._evaluation()
        self.reads = Reading(self.sources, self.recipe, self.ledger, self.runner).run(self.pieces)
        self.parts = _parts_of(self.reads)
        cleaned = self._clean()
        references = self._references()
        pairs = self._duplicates(cleaned, references)
        written = self._write(cleaned, pairs, references)
        prepared = manifest.finish(self.out, [shard for shard, _ in written], self._summary(written))
        self.inputs.finish()
        self._tidy(prepared)
        return prepared

    def _check(self) -> None:
        """UserError for a rule or a source that there is not, DataError for data sets that are none, before anything that takes time."""
        for source in self.sources.values():
            rules_of(self._changes(source), self.recipe.filter)
        for name in self.recipe.rules:
            root = name.rpartition(":")[0]
            if root and root not in {each for source in self.sources.values() for each in (source.name, source.root)}:
                names = ", ".join(source.name for source in self.sources.values())
                raise UserError(f"--rule {name}: there is no source {root!r}. The sources are {names}.")
        if self.recipe.against and not self.recipe.dedup:
            raise UserError(
                "--against has no effect with --no-dedup: its documents count as seen in the search for duplicates. Leave one of them out."
            )
        for folder in self.recipe.against:
            open_prepared(Path(folder))
        for option, places in (("--exclude", self.recipe.exclude), ("--like", self._like)):
            for each in find_sources(places, self.out):
                if not each.found:
                    raise UserError(f"{option} {each.root}: there are no files in it. Give a folder with documents, or a file.")

    # -- texts -------------------------------------------------------------------------------------------------------------------

    def _versions(self) -> np.ndarray:
        """The documents that a newer version of their page has replaced; also written to the file of them."""
        fetched = [
            read.done
            for read in self.reads
            if read.done.result["fetched"] and rules_of(self._changes(self.sources[read.piece.source]), self.recipe.filter).newest_version
        ]
        found = (
            self._partitions("versions", "Finding older versions of pages", "versions:outdated", fetched, ".fetched", "fetched") if fetched else []
        )
        rows = versions.replaced([done.path(".outdated") for done in found], [done.path(".copies") for done in found])
        duplicates.save(self._replaced, rows)
        return rows

    @property
    def _replaced(self) -> Path:
        return self.ledger.folder / "replaced.rows"

    def _clean(self) -> list[Done]:
        older = self._versions()
        self.score = self._score()
        lines, evaluation, score = self._boilerplate(older), self.evaluation, self.score
        tasks = []
        for part in self.parts:
            piece, begin, done = part.piece, part.read.first, part.read.done
            changes, counted = self._changes(self.sources[piece.source]), lines[piece.generation] if done.result["pages"] else []
            arguments = {
                "inputs": [done.path(".parquet")], "piece": piece.number, "begin": begin, "first": part.first, "last": part.last, "changes": changes,
                "filter": self.recipe.filter, "sign": self.recipe.dedup, "replaced": str(self._replaced),
                "lines": [each.path(".lines") for each in counted], "evaluation": _place(evaluation), "score": _place(score),
            }  # fmt: skip
            beside = [each.digest if each else "" for each in (evaluation, score)]
            rules = rules_of(changes, self.recipe.filter).digest()
            own = versions.of_piece(older, piece.number).tolist()
            rows = [done.files[".parquet"], part.first, part.last, *([begin] if begin else [])]
            depends = [rows, own, rules, self.recipe.dedup, [each.digest for each in counted], beside]
            tasks.append(Task(part.number, arguments, depends, 1 + part.chars))
        cleaned = self._stage("clean", "Cleaning and filtering", "cleaning:clean", tasks, "bytes")
        self.ledger.tidy("clean", {task.number for task in tasks})
        return cleaned

    def _boilerplate(self, older: np.ndarray) -> dict[int, list[Done]]:
        """For each generation the counted lines of all pages up to it, in parts, so that pages that come later change nothing that was prepared."""
        own = [(read.piece, read.done) for read in self.reads if read.done.result["pages"]]
        tasks = []
        for piece, done in own:
            arguments = {"inputs": [done.path(".parquet")], "piece": piece.number, "replaced": str(self._replaced)}
            depends = [done.files[".parquet"], versions.of_piece(older, piece.number)["key"].tolist()]
            tasks.append(Task(piece.number, arguments, depends, 1 + done.result["chars"]))
        counted = self._stage("lines", "Counting the lines of pages", "boilerplate:count", tasks, "bytes")
        rules = [rules_of(self._changes(source), self.recipe.filter) for source in self.sources.values()]
        least = min((each.boilerplate_min_pages for each in rules if each.boilerplate_min_pages is not None), default=0)
        found: dict[int, list[Done]] = {}
        for generation in sorted({piece.generation for piece, _ in own}) if least else []:
            here = [done for (piece, _), done in zip(own, counted) if piece.generation <= generation]
            parts = self._parts(sum(done.files[".lines"][0] for done in here) // _LINE_BYTES)
            inputs, depends = [done.path(".lines") for done in here], [done.digest for done in here]
            merges = [
                Task(part, {"part": part, "parts": parts, "inputs": inputs, "least": least}, [part, parts, depends, least]) for part in range(parts)
            ]
            name, label = f"sites-{generation}", "Finding lines that pages repeat"
            found[generation] = self.ledger.stage(name, label, f"{_ROOM}.boilerplate:merge", VERSIONS["lines"], merges, self.runner)
        return {piece.generation: found.get(piece.generation, []) for piece in self.pieces}

    def _evaluation(self) -> Done | None:
        """The runs of words of the text for evaluation."""
        if not self.recipe.exclude:
            return None
        inputs, contents = self._files(self.recipe.exclude)
        options = dict(self.recipe.extraction)
        task = Task(0, {"inputs": inputs, "options": options}, [contents, without_secrets(options)])
        return self._stage("evaluation", "Reading text for evaluation", "examples:evaluation", [task])[0]

    def _score(self) -> Done | None:
        """The score of quality that the user's examples teach."""
        if not self.recipe.like:
            return None
        like, contents = self._files(self._like)
        options = dict(self.recipe.extraction)
        pieces = [[read.done.path(".parquet") for read in reads] for _, reads in itertools.groupby(self.reads, lambda read: read.piece.number)]
        task = Task(
            0, {"like": like, "inputs": pieces, "options": options}, [contents, without_secrets(options), [read.done.digest for read in self.reads]]
        )
        return self._stage("score", "Learning from the examples", "examples:score", [task])[0]

    @property
    def _like(self) -> list[str]:
        return [self.recipe.like] if self.recipe.like else []

    def _files(self, places: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
        """All files at these places as [root, name], and what a task that reads them depends on."""
        digests = Digests(self.ledger.folder)
        found = [(source, name, status) for source in find_sources(places, self.out) for name, status in sorted(source.found.items())]
        with digests.kept():
            contents = [[name, digests.of(source.path(name), status)] for source, name, status in found]
        return [[source.root, name] for source, name, _ in found], contents

    def _changes_for_all(self) -> dict[str, Any]:
        return {name: value for name, value in self.recipe.rules.items() if ":" not in name}

    def _changes(self, source: Source) -> dict[str, Any]:
        """The rules that are not the default for a source: those given for it come before those given for all."""
        own = self._changes_for_all()
        for name, value in self.recipe.rules.items():
            root, colon, rule = name.rpartition(":")
            if colon and root in (source.name, source.root):
                own[rule] = value
        return own

    # -- duplicates --------------------------------------------------------------------------------------------------------------

    def _references(self) -> list[_Reference]:
        """The kept documents of earlier data sets, signed."""
        found = [
            (prepared, path) for folder in self.recipe.against for prepared in [open_prepared(Path(folder))] for path in prepared.paths(kept=True)
        ]
        contents = {prepared.folder / shard.name: shard.content for prepared, _ in found for shard in prepared.shards}
        tasks = [
            Task(number, {"inputs": [str(path)], "number": number}, contents[path], path.stat().st_size) for number, (_, path) in enumerate(found)
        ]
        signed = self._stage("sign", "Reading earlier data sets", "cleaning:sign", tasks, "bytes")
        return [_Reference(path, str(path), done) for (_, path), done in zip(found, signed)]

    def _duplicates(self, cleaned: list[Done], references: list[_Reference]) -> Path:
        """The file of all duplicates, by key."""
        place = self.ledger.folder / "duplicates.pairs"
        if not self.recipe.dedup:
            duplicates.save(place, np.empty(0, duplicates.PAIR))
            return place
        signed = [reference.signed for reference in references] + cleaned
        copies = self._partitions("exact", "Finding equal texts", "duplicates:exact", signed, ".exact", "signed")

        def merge(level: int, groups: list[tuple[int, list[Done]]]) -> list[Done]:
            tasks = [Task(number, {"inputs": [each.path(".forest") for each in group]}, [each.digest for each in group]) for number, group in groups]
            name, label = f"forest-{level}", f"Joining similar texts, round {level}"
            return self.ledger.stage(name, label, f"{_ROOM}.duplicates:merge_forests", VERSIONS["forest"], tasks, self.runner)

        verified: list[Done] = []
        threshold = rules_of(self._changes_for_all(), self.recipe.filter).near_threshold
        if threshold is not None:
            near = self._partitions("near", "Finding similar texts", "duplicates:near", signed, ".bands", "signed", BANDS)
            forest = tree(merge, near)
            verified = self._verify(forest, copies, cleaned, references, threshold) if forest is not None else []
        pairs = duplicates.merged([each.path(".pairs") for each in [*copies, *verified]])
        duplicates.save(place, pairs)
        self._check_losses(cleaned, pairs)
        return place

    def _partitions(self, name: str, label: str, function: str, done: list[Done], ending: str, counted: str, rows_each: int = 1) -> list[Done]:
        """A stage of tasks that each read one range of the rows of all these files. counted: the result that says how many rows there are."""
        parts = self._parts(sum(each.result[counted] for each in done) * rows_each)
        inputs, depends = [each.path(ending) for each in done], [each.files[ending] for each in done]
        tasks = [Task(part, {"part": part, "parts": parts, "inputs": inputs}, [part, parts, depends]) for part in range(parts)]
        return self._stage(name, label, function, tasks)

    def _parts(self, rows: int) -> int:
        """Into how many parts so many rows are cut."""
        return max(1, -(-rows // self.recipe.sizes.partition_rows))

    def _verify(self, forest: Done, copies: list[Done], cleaned: list[Done], references: list[_Reference], threshold: float) -> list[Done]:
        members = mapped(forest.path(".forest"), np.dtype("<u8")).reshape(-1, 2)
        files = {number: [(0, str(each.path), each.signed.digest)] for number, each in enumerate(references)}
        for part, done in zip(self.parts, cleaned):
            files.setdefault(1 << 31 | part.piece.number, []).append((part.first, done.path(".parquet"), done.digest))
        texts = self.ledger.folder / "texts.json"
        where = {number: [(first, path) for first, path, _ in parts] for number, parts in files.items()}
        write_file(texts, json.dumps(where).encode(), DATA)
        tasks = []
        for number, (first, last) in enumerate(duplicates.ranges(members, self.recipe.sizes.verify_documents)):
            own = np.array(members[first:last])
            touched = np.unique(own >> np.uint64(32)).tolist()
            arguments = {
                "forest": forest.path(".forest"), "first": first, "last": last, "copies": [each.path(".pairs") for each in copies],
                "texts": str(texts), "threshold": threshold,
            }  # fmt: skip
            depends = [own.tobytes().hex() if len(own) < 8 else digest_of(own.tolist()), [each.digest for each in copies]]
            tasks.append(Task(number, arguments, [*depends, [[digest for *_, digest in files[each]] for each in touched], threshold], last - first))
        found = self._stage("verify", "Comparing similar texts", "duplicates:verify", tasks, "documents")
        self.ledger.tidy("verify", set(range(len(tasks))))
        return found

    def _check_losses(self, cleaned: list[Done], pairs: np.ndarray) -> None:
        """Asks where a source would lose more than half of its documents as near duplicates: that is a mistake more often than it is meant."""
        near = pairs[pairs["similarity"] != duplicates.EXACT]
        lost, had = dict.fromkeys(self.sources, 0), dict.fromkeys(self.sources, 0)
        for part, done in zip(self.parts, cleaned):
            had[part.piece.source] += done.result["signed"]
            lost[part.piece.source] += len(shards.pairs_in(near, part.piece.number, part.first, part.last))
        for root, count in lost.items():
            if count >= LARGE_LOSS and 2 * count > had[root]:
                question = (
                    f"{self.sources[root].name} would lose {count:,} of its {had[root]:,} documents as near duplicates of others "
                    f"({100 * count / had[root]:.0f} %)"
                )
                if not self.ask(question):
                    raise DataError(
                        f"{question}. Look at what repeats in it; to drop them say --allow-loss, to keep them --no-dedup. What was done is kept."
                    )

    # -- the result --------------------------------------------------------------------------------------------------------------

    def _write(self, cleaned: list[Done], pairs: Path, references: list[_Reference]) -> list[tuple[Shard, dict[str, Any]]]:
        duplicate = mapped(str(pairs), duplicates.PAIR)
        sizes: list[np.ndarray] = []  # bytes of each document; -1 - bytes of one that is dropped
        totals = dict.fromkeys(self.sources, 0)
        for part, done in zip(self.parts, cleaned):
            lengths = np.fromfile(done.path(".lengths"), np.int32)
            own = shards.pairs_in(duplicate, part.piece.number, part.first, part.last)
            rows = (own["key"] & np.uint64(0xFFFFFFFF)).astype(np.int64) - part.first
            lengths[rows] = -1 - lengths[rows]
            sizes.append(lengths)
            totals[part.piece.source] += int(lengths[lengths > 0].sum(dtype=np.int64))
        caps = {root: shards.epochs_within(mix.cap, self._kept_of(root, sizes)) for root, mix in self.recipe.mixes.items() if mix.cap is not None}
        epochs = self.epochs = epochs_of(self.recipe.mixes, totals, caps)
        tasks: list[Task] = []
        numbers, shard_bytes = {True: 0, False: 0}, self.recipe.sizes.shard_bytes
        for generation in range(max(piece.generation for piece in self.pieces) + 1):
            both: dict[bool, list[tuple[shards.Segment, int]]] = {True: [], False: []}
            for number, (part, lengths) in enumerate(zip(self.parts, sizes)):
                if part.piece.generation != generation:
                    continue
                times = np.where(lengths >= 0, shards.take_of(shards.keys_of(part.piece.number, part.first, part.last), epochs[part.piece.source]), 0)
                all_sizes = np.where(lengths >= 0, lengths, -1 - lengths).astype(np.int64)
                kept, dropped = shards.plan(number, part.first, all_sizes, times, max(1, shard_bytes // 4))
                both[True] += kept
                both[False] += dropped
            for kept_ones, segments in both.items():
                for group in shards.groups(segments, shard_bytes):
                    name = f"{shards.KEPT if kept_ones else shards.DROPPED}/{numbers[kept_ones]:06d}.parquet"
                    tasks.append(self._shard(name, len(tasks), group, kept_ones, cleaned, pairs, duplicate, epochs, references))
                    numbers[kept_ones] += 1

        def intact(task: Task, done: Done) -> bool:
            place = Path(task.arguments["out"])
            return place.is_file() and place.stat().st_size == done.result["out"][0]

        written = self._stage("write", "Writing shards", "shards:write", tasks, "rows", intact=intact)
        self.ledger.tidy("write", set(range(len(tasks))))
        found = []
        for task, done in zip(tasks, written):
            name = str(Path(task.arguments["out"]).relative_to(self.out))
            size, digest = done.result["out"]
            found.append((Shard(name, done.result["rows"], size, digest, done.result["content"]), done.result["tally"]))
        return sorted(found, key=lambda each: (not each[0].is_kept, each[0].name))

    def _kept_of(self, root: str, sizes: Sequence[np.ndarray]) -> Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]:
        """A function that gives (keys, bytes) of the documents of a source that are kept, in parts. sizes: of all parts, as in `_write`."""

        def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for part, lengths in zip(self.parts, sizes):
                if part.piece.source == root:
                    kept = lengths >= 0
                    yield shards.keys_of(part.piece.number, part.first, part.last)[kept], lengths[kept].astype(np.int64)

        return parts

    def _shard(
        self,
        name: str,
        number: int,
        group: list[shards.Segment],
        kept: bool,
        cleaned: list[Done],
        pairs: Path,
        duplicate: np.ndarray,
        epochs: Mapping[str, float],
        references: list[_Reference],
    ) -> Task:
        parts = [self.parts[segment.part] for segment in group]
        sources = [self.sources[part.piece.source] for part in parts]
        rows = [[part.piece.number, part.first, each.first, each.last] for each, part in zip(group, parts)]
        own_epochs = {source.name: epochs[source.root] for source in sources}
        arguments = {
            "out": str(self.out / name),
            "segments": [[cleaned[each.part].path(".parquet"), *where] for each, where in zip(group, rows)],
            "pairs": str(pairs),
            "epochs": own_epochs,
            "reasons": {name: f"not drawn ({name} is taken {share:.4g} times)" for name, share in own_epochs.items()},
            "earlier": [each.name for each in references],
            "kept": kept,
        }
        own_pairs = [shards.pairs_in(duplicate, piece, first, last).tolist() for piece, _, first, last in rows]
        inputs = [[cleaned[each.part].files[".parquet"], *where] for each, where in zip(group, rows)]
        depends = [name, inputs, digest_of(own_pairs), own_epochs, arguments["earlier"], kept]
        return Task(number, arguments, depends, sum(each.last - each.first for each in group))

    def _summary(self, written: list[tuple[Shard, dict[str, Any]]]) -> dict[str, Any]:
        whole = tally.total([counts for _, counts in written])
        skipped = Skipped()
        for source in self.sources.values():
            skipped.update(source.skipped)
        return {
            "recipe": self.recipe.digest(),
            "sources": {source.name: source.root for source in self.sources.values()},
            "documents": sum(counts["documents"] for counts in whole["sources"].values()),
            "kept": sum(counts["kept"] for counts in whole["sources"].values()),
            "kept_chars": sum(counts["kept_chars"] for counts in whole["sources"].values()),
            "written_chars": sum(counts["written_chars"] for counts in whole["sources"].values()),
            "shards": sum(shard.is_kept for shard, _ in written),
            "taken": {self.sources[root].name: times for root, times in self.epochs.items()},
            "files": sum(len(source.found) + len(source.refused) for source in self.sources.values()),
            "not_looked_at": skipped.to_dict(),
            "evaluation": _beside(self.evaluation, self.recipe.exclude),
            "examples": _beside(self.score, self._like),
            "tally": whole,
        }

    def _tidy(self, prepared: Prepared) -> None:
        """Shards of an earlier run that are part of the result no longer."""
        known = {prepared.folder / shard.name for shard in prepared.shards}
        for kind in (shards.KEPT, shards.DROPPED):
            for place in sorted((self.out / kind).glob("*.parquet")):
                if place not in known:
                    place.unlink()

    def _stage(self, name: str, label: str, function: str, tasks: list[Task], unit: str = "", **more: Any) -> list[Done]:
        return self.ledger.stage(name, label, f"{_ROOM}.{function}", VERSIONS[name], tasks, self.runner, unit, **more)


def prepare(roots: Sequence[str], out: Path, recipe: Recipe, runner: Runner, ask: Ask = lambda question: False) -> Prepared:
    """Prepares sources into a folder, or goes on with it. Raises UserError for sources that are not there, DataError as `Preparation.run`.

    ask: is asked whether to go on where a source would lose more than half of its documents as near duplicates.
    """
    sources = find_sources(roots, out)
    if any(source.path("").resolve() == out.resolve() for source in sources):
        raise UserError(f"--out {out} is one of the sources. Choose another folder with --out.")
    preparation = Ledger(out)
    with preparation.held():
        return Preparation(sources, out, recipe, runner, ask).run()


def _parts_of(reads: Sequence[Read]) -> list[_Part]:
    """What one task each cleans. There is one part even of a piece without documents."""
    found = []
    for piece_number, own in itertools.groupby(reads, lambda read: read.piece.number):
        numbers = itertools.count()
        for read in own:
            begins = [*read.done.result["parts"], [read.done.result["rows"], read.done.result["chars"]]]
            found += [
                _Part(read.piece, next(numbers) << 32 | piece_number, read, read.first + first, read.first + last, end - begin)
                for (first, begin), (last, end) in itertools.pairwise(begins)
            ]
    return found


def _beside(done: Done | None, places: Sequence[str]) -> dict[str, Any] | None:
    """What was read beside the documents, for the summary: the places, how many texts there were, and which files gave none."""
    return None if done is None else {"places": list(places), **done.result}


def _place(done: Done | None) -> list[str]:
    """Where a task's files are, and their digest."""
    return [] if done is None else [done.place, done.digest]
