"""The rounds of `cllm train DATA --follow`: what is new, what is replayed, what is held out, and whether a round is kept.

    OUT/follow.json             whose text is followed
        rounds.jsonl            a RoundRow for each round that has ended
        rounds/0003/round.json  a round that has begun: its documents, drawn once; the folder appears as a whole
            keys.bin            hashes of its documents, (n,) little-endian uint64, ascending
            text/new.jsonl      the new documents that it learns from; text/replay.jsonl: those of earlier rounds beside them
            held_out/           new documents that no round ever learns from
            run/                its training, a run like any other
        model                   a link to the run of the last round that was kept

A round is begun, trained and judged; each part can be repeated after a crash and then gives the same. What a round has drawn never changes, so
its training resumes exactly, whatever has come to the text since. New text joins text that is replayed because a network that learns only what
is new forgets what is old (Ibrahim et al. 2024, arXiv 2403.08763); the learning rate warms up again for the same reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm.config.follow import FollowSettings
from cllm.data.documents.corpus import Corpus, load_corpus
from cllm.data.documents.scan import Reading
from cllm.data.documents.sides import TRAIN, VAL, SplitPlan, default_val_fraction, plan_split
from cllm.files import RUN, new_folder, write_file
from cllm.monitor.records import RoundRow
from cllm.monitor.rounds import MODEL, ROWS, read_rounds
from cllm.runtime.errors import UserError
from cllm.runtime.printable import printable

if TYPE_CHECKING:
    from cllm.model.model import Model

ABOUT = "follow.json"
_SHOWN_SOURCES = 20


@dataclass(frozen=True)
class Round:
    """A round that has begun. `folder` holds its documents; `held_out` of them, or their ends, are never learnt; `bytes` are."""

    number: int
    folder: Path
    documents: int
    bytes: int
    held_out: int
    replayed_bytes: int
    sources: dict[str, int]

    @property
    def text(self) -> Path:
        return self.folder / "text"

    @property
    def held_out_text(self) -> Path:
        return self.folder / "held_out"

    @property
    def run(self) -> Path:
        return self.folder / "run"


class Rounds:
    """The rounds in a folder. The caller holds the folder's lock."""

    def __init__(self, out: Path, data: str) -> None:
        """Raises UserError where the folder follows other text, CheckpointError where its rows cannot be read."""
        self.out = out
        about = out / ABOUT
        if about.exists():
            there = json.loads(about.read_text("utf-8")).get("data")
            if there != data:
                raise UserError(f"{out} follows {printable(str(there))}, not {printable(data)}. Name another folder with --out.")
        else:
            write_file(about, json.dumps({"data": data}).encode("utf-8"), RUN)
        self.rows = read_rounds(out)
        self.new_bytes = 0  # of text that no round has seen, at the last look
        self.tidy()

    # -- beginning a round ---------------------------------------------------------------------------------------------------

    def begun(self) -> Round | None:
        """The round that has begun and has no row yet; None where there is none."""
        folder = self._folder(len(self.rows) + 1)
        if not (folder / "round.json").exists():
            return None
        return Round(folder=folder, **json.loads((folder / "round.json").read_text("utf-8")))

    def begin(self, source: Path, settings: FollowSettings, reading: Reading, progress: Callable[[str, int, int], None] | None) -> Round | None:
        """Draws the next round from the documents at `source` that no round has seen; None where they are fewer than `round_bytes`."""
        corpus = load_corpus(source, self.out / "sources", [self.out], progress, reading)
        new = self._new(corpus.rows["key"])
        self.new_bytes = int(corpus.rows["bytes"][new].sum())
        if self.new_bytes < settings.round_bytes:
            return None
        number = len(self.rows) + 1
        with new_folder(self._folder(number), RUN) as folder:
            counts = _write_new(_only(corpus, new), folder)
            budget = int(counts["bytes"] * settings.replay / (1 - settings.replay))
            counts["replayed_bytes"] = self._replay(number, budget, folder / "text" / "replay.jsonl")
            (folder / "keys.bin").write_bytes(np.sort(corpus.rows["key"][new]).astype("<u8").tobytes())
            (folder / "round.json").write_text(json.dumps({"number": number, **counts}), "utf-8")
        return self.begun()

    def _new(self, keys: np.ndarray) -> np.ndarray:
        """(num_documents,) bool: the first of each text that no round has seen."""
        seen = [np.fromfile(self._folder(row.round) / "keys.bin", "<u8") for row in self.rows]
        new = ~np.isin(keys, np.concatenate(seen)) if seen else np.ones(len(keys), dtype=bool)
        first = np.zeros(len(keys), dtype=bool)
        first[np.unique(keys, return_index=True)[1]] = True
        return new & first

    def _replay(self, number: int, budget: int, place: Path) -> int:
        """Writes documents of the rounds that were kept, drawn by a hash, until `budget` bytes are reached; returns how many bytes."""
        lines: list[tuple[bytes, Path, int, int]] = []
        for row in self.rows:
            earlier = self._folder(row.round) / "text" / "new.jsonl"
            if row.accepted and earlier.exists():
                with open(earlier, "rb") as file:
                    offset = 0
                    for count, line in enumerate(file):
                        drawn = hashlib.blake2b(f"{number} {row.round} {count}".encode(), digest_size=8).digest()
                        lines.append((drawn, earlier, offset, len(line)))
                        offset += len(line)
        total = 0
        with open(place, "wb") as out:
            for _, earlier, offset, length in sorted(lines):
                if total + length > budget:
                    break
                with open(earlier, "rb") as file:
                    file.seek(offset)
                    out.write(file.read(length))
                total += length
        if not total:
            place.unlink()
        return total

    # -- ending a round ------------------------------------------------------------------------------------------------------

    def previous(self) -> Path | None:
        """The run of the last round that was kept."""
        kept = [row.round for row in self.rows if row.accepted]
        return self._folder(kept[-1]) / "run" if kept else None

    def old_held_out(self) -> list[Path]:
        """The folders of held-out text of the rounds that were kept, the oldest first. None of it was ever learnt from."""
        return [self._folder(row.round) / "held_out" for row in self.rows if row.accepted]

    def end(self, row: RoundRow, keep_text: int) -> None:
        """Records how a round has ended; from then on it is history, and what it no longer needs is removed."""
        self.rows.append(row)
        lines = "".join(json.dumps(each.to_dict()) + "\n" for each in self.rows)
        write_file(self.out / ROWS, lines.encode("utf-8"), RUN)
        self.tidy(keep_text)

    def tidy(self, keep_text: int | None = None) -> None:
        """Removes the runs before the last two that were kept, those that were undone, and replay text beyond `keep_text` bytes, the oldest first."""
        kept = [row.round for row in self.rows if row.accepted]
        for row in self.rows:
            folder = self._folder(row.round)
            if row.round not in kept[-2:]:
                shutil.rmtree(folder / "run", ignore_errors=True)
            if not row.accepted:
                shutil.rmtree(folder / "text", ignore_errors=True)
            (folder / "text" / "replay.jsonl").unlink(missing_ok=True)
        room = keep_text
        for number in reversed(kept):
            text = self._folder(number) / "text" / "new.jsonl"
            if room is not None and text.exists():
                room -= text.stat().st_size
                if room < 0:
                    text.unlink()
        if kept:
            link, beside = self.out / MODEL, self.out / f".{MODEL}"
            target = os.path.join("rounds", f"{kept[-1]:04d}", "run")
            if not link.is_symlink() or os.readlink(link) != target:
                beside.unlink(missing_ok=True)
                beside.symlink_to(target, target_is_directory=True)
                os.replace(beside, link)

    def _folder(self, number: int) -> Path:
        return self.out / "rounds" / f"{number:04d}"


def _only(corpus: Corpus, wanted: np.ndarray) -> tuple[Corpus, np.ndarray]:
    """The files of a corpus that hold wanted documents, and which of their documents are wanted, so that no other file is read again."""
    files, chosen, start = [], [], 0
    for file, info in corpus.files:
        of_file = slice(start, start + len(info.rows))
        if wanted[of_file].any():
            files.append((file, info))
            chosen.append(of_file)
        start += len(info.rows)
    rows = np.concatenate([corpus.rows[each] for each in chosen])
    return Corpus(corpus.root, files, rows, corpus.skipped, 0), np.concatenate([wanted[each] for each in chosen])


def _write_new(chosen: tuple[Corpus, np.ndarray], folder: Path) -> dict[str, Any]:
    """Writes the wanted documents of a corpus to text/new.jsonl and held_out/held_out.jsonl and returns what there is to say of them."""
    corpus, wanted = chosen
    rows = corpus.rows[wanted]
    plan = plan_split(rows, default_val_fraction(int(rows["bytes"].sum())))
    sides = None if plan.sides is None else np.zeros(len(wanted), dtype=np.uint8)
    if sides is not None and plan.sides is not None:
        sides[wanted] = plan.sides
    counts: dict[str, Any] = {"documents": 0, "bytes": 0, "held_out": 0}
    sources: dict[str, int] = {}
    last = -1
    for name in ("text", "held_out"):
        (folder / name).mkdir()
    with open(folder / "text" / "new.jsonl", "wb") as new, open(folder / "held_out" / "held_out.jsonl", "wb") as held_out:
        for index, side, name, text in _segments(corpus, SplitPlan(plan.val_fraction, plan.method, sides)):
            if not wanted[index] or not text.strip():
                continue
            line = json.dumps({"text": text, "name": name}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            (held_out if side == VAL else new).write(line)
            counts["held_out"] += side == VAL
            counts["bytes"] += len(line) if side == TRAIN else 0
            if index != last:  # not the second part of a document that is cut
                last = index
                counts["documents"] += 1
                source = name.partition("/")[0]
                sources[source] = sources.get(source, 0) + 1
    most = sorted(sources.items(), key=lambda each: (-each[1], each[0]))[:_SHOWN_SOURCES]
    return {**counts, "sources": dict(most)}


def _segments(corpus: Corpus, plan: SplitPlan) -> Iterator[tuple[int, int, str, str]]:
    """(number of the document, side, name, text) of each document, or of its two parts where documents are cut by position."""
    for count, segment in enumerate(corpus.segments(plan)):
        yield count if plan.sides is not None else count // 2, segment.side, segment.name, "".join(segment.chunks)


# -- judging ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Mean nats per token of held-out text: of all rounds before, and of this one; nan where there is none."""

    old: float
    new: float


def losses(model: Model, tokenizer: Any, old: list[Path], new: Path, seq_len: int, scratch: Path) -> Losses:
    """What a model makes of held-out text. The tokens of each folder are packed once, in `scratch`."""
    from cllm.data.pipeline import prepare
    from cllm.evaluate.loss import evaluate

    def mean(folders: list[Path]) -> float:
        nats, targets = 0.0, 0
        for folder in folders:
            if (folder / "held_out.jsonl").stat().st_size:
                packed = prepare(folder, scratch / folder.parent.name, tokenizer, val_fraction=0.0, log=lambda line: None)
                if packed.train.windows(seq_len, 8).num_targets:
                    found = evaluate(model, packed.train, seq_len)
                    nats, targets = nats + found.loss * found.num_targets, targets + found.num_targets
        return nats / targets if targets else float("nan")

    return Losses(mean(old), mean([new]))


def verdict(before: Losses | None, after: Losses, tolerance: float) -> tuple[bool, str]:
    """Whether a round is kept, and why in words: new text must have become easier, and old text harder by no more than `tolerance` of its loss.

    before None: the first round, which there is nothing to compare with. A comparison with nan, where nothing is held out, counts as passed.
    """
    if before is None:
        return True, "the first round"
    if after.old > before.old * (1 + tolerance):
        return False, f"old text lost {after.old / before.old - 1:.1%}, more than {tolerance:.1%}"
    if after.new >= before.new:
        return False, "new text did not become easier"
    return True, f"new text {before.new:.3f} -> {after.new:.3f}, old text {before.old:.3f} -> {after.old:.3f} nats per token"
