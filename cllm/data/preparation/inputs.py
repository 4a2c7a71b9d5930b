"""What there is to prepare: the files of all sources, cut into pieces that keep their numbers.

A document's key is (number of its piece, its place in it), 64 bits, and every choice between documents is made by it. So pieces are numbered by the
names of sources and files, never by the order in which a disk lists them, and a list of them is kept:

    .ledger/inputs.jsonl    one line a source, a piece, or the end of a generation

Files that come later get new pieces after all others: a new generation. What was prepared before keeps its keys and its order. Only while the first
generation is not finished may the list be made anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.data.documents.files import FOREIGN_FOLDERS, PREPARED_MARK, VCS_FOLDERS, Skipped, is_prepared
from cllm.data.preparation.cuts import Cut, cut
from cllm.files import DATA, write_file
from cllm.runtime.errors import DataError, UserError

LIST = "inputs.jsonl"
_SAVED_EVERY = 30.0  # seconds


@dataclass
class Source:
    """A place that was named on the command line."""

    root: str
    """As it was given, without what does not matter ("./", a slash at the end)."""
    name: str
    """The last part of the root; the whole root where two sources would be called the same."""
    found: dict[str, os.stat_result] = field(default_factory=dict)
    """Name below the root -> what the system says of the file. A root that is a file has its own name."""
    refused: dict[str, str] = field(default_factory=dict)
    """Name -> why there is nothing to read: a broken link, a device."""
    skipped: Skipped = field(default_factory=Skipped)
    """What is no document by its name alone: hidden files, version control, installed packages."""

    def path(self, name: str) -> Path:
        root = Path(self.root)
        return root / name if root.is_dir() else root


@dataclass
class Piece:
    """Some files of one source, which one task reads."""

    number: int
    source: str
    """The root of its source."""
    files: list[str]
    generation: int


def find_sources(roots: Sequence[str], out: Path) -> list[Source]:
    """The sources, ordered by name, with all their files. `out` is part of none. Raises UserError where there is nothing at a place."""
    cleaned = sorted({os.path.normpath(root) for root in roots})
    names = [os.path.basename(os.path.abspath(root)) or root for root in cleaned]
    sources = [Source(root, name if names.count(name) == 1 else root) for root, name in zip(cleaned, names)]
    for source in sources:
        _walk(source, os.path.realpath(out))
    return sources


def _walk(source: Source, out: str) -> None:
    root = Path(source.root)
    try:
        status = root.stat()
        if stat.S_ISDIR(status.st_mode):
            os.scandir(root).close()
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({(error.strerror or str(error)).lower()})"
        raise UserError(f"{root} {what}. Give a folder, a file, an archive or the folder of a crawl.") from None
    if not stat.S_ISDIR(status.st_mode):
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{root} is neither a file nor a folder. Give a folder, a file, an archive or the folder of a crawl.")
        source.found[root.name] = status
        return
    visited = {(status.st_dev, status.st_ino)}
    pending = [(root, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            source.refused[prefix.rstrip("/")] = f"unreadable folder ({(error.strerror or str(error)).lower()})"
            continue
        names = {entry.name for entry in entries}
        prepared = PREPARED_MARK in names and is_prepared(folder)
        for entry in entries:
            name = prefix + entry.name
            try:
                status = entry.stat()
            except OSError as error:
                source.refused[name] = "broken link" if entry.is_symlink() else f"unreadable ({(error.strerror or str(error)).lower()})"
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if os.path.realpath(entry.path) == out:
                continue
            passed = _passed_over(entry.name, is_folder, names, prepared)
            if passed:
                source.skipped.add(passed, name)
            elif is_folder:
                if (status.st_dev, status.st_ino) in visited:
                    source.skipped.add("link to a folder seen before", name + "/")
                else:
                    visited.add((status.st_dev, status.st_ino))
                    pending.append((Path(entry.path), name + "/"))
            elif not stat.S_ISREG(status.st_mode):
                source.refused[name] = "special file (a pipe, a socket or a device)"
            else:
                source.found[name] = status


def _passed_over(name: str, is_folder: bool, beside: set[str], prepared: bool) -> str:
    """Why an entry of a folder is no document, as its name tells; empty for what may be one."""
    if name.startswith("."):
        return "hidden folder" if is_folder else "hidden file"
    if is_folder and name in VCS_FOLDERS:
        return "version control folder"
    if is_folder and name in FOREIGN_FOLDERS:
        return f"folder of {FOREIGN_FOLDERS[name]}"
    if "crawl.sqlite" in beside and (name.startswith(("crawl.sqlite", "crawl.json"))):
        return "record of a crawl"
    if name.endswith(".warc.gz.open"):
        return "page store that the crawler has not closed yet"
    if prepared and not is_folder and not name.endswith(".parquet"):
        return "report of prepared data"
    return ""


class Inputs:
    """The numbered pieces of all generations."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / LIST
        self.pieces: list[Piece] = []
        self.finished = -1
        """The newest generation that was prepared to its end."""
        self._read()

    def _read(self) -> None:
        try:
            lines = self.place.read_text("utf-8").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
                if "finished" in entry:
                    self.finished = int(entry["finished"])
                else:
                    self.pieces.append(Piece(int(entry["piece"]), entry["source"], list(entry["files"]), int(entry["generation"])))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.place} is damaged. Remove {self.place.parent} and prepare again.") from error
        self.pieces = [piece for piece in self.pieces if piece.generation <= self.finished]

    def update(self, sources: Iterable[Source], piece_bytes: int, piece_files: int) -> None:
        """Files that no finished generation has are cut into new pieces. Files that are gone stay in the list, and are read as nothing."""
        known = {(piece.source, name) for piece in self.pieces for name in piece.files}
        generation = self.finished + 1
        for source in sources:
            sizes = {name: status.st_size for name, status in source.found.items()} | dict.fromkeys(source.refused, 0)
            files: list[str] = []
            room = 0
            for name in sorted(sizes):
                if (source.root, name) in known:
                    continue
                # A large file, which may be an archive of any size, is a piece of its own.
                if files and (room + sizes[name] > piece_bytes or len(files) >= piece_files):
                    self._add(source, files, generation)
                    files, room = [], 0
                files.append(name)
                room += sizes[name]
            if files:
                self._add(source, files, generation)
        self._save()

    def _add(self, source: Source, files: list[str], generation: int) -> None:
        self.pieces.append(Piece(len(self.pieces), source.root, files, generation))

    def finish(self) -> None:
        """Everything in the list was prepared."""
        self.finished = max((piece.generation for piece in self.pieces), default=self.finished)
        self._save()

    def _save(self) -> None:
        lines = [{"piece": p.number, "source": p.source, "files": p.files, "generation": p.generation} for p in self.pieces]
        end = [{"finished": self.finished}] if self.finished >= 0 else []
        content = "".join(json.dumps(line) + "\n" for line in [*lines, *end])
        write_file(self.place, content.encode("utf-8"), DATA)


class Digests:
    """The digest of each input file, or of the parts of a large one, read anew only where its size, its times or its inode have changed."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "digests.json"
        try:
            self._known = dict(json.loads(self.place.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}
        self._used: dict[str, list[Any]] = {}
        self._due = float("inf")

    def of(self, path: Path, status: os.stat_result, read: Callable[[int], None] = lambda num_bytes: None) -> str:
        """Content digest; "unreadable" with the reason where it cannot be read. read: is told of bytes as they are read."""
        known = self._remembered(path, status, 5)
        if known:
            read(status.st_size)
        else:
            known = [_digest(path, read)]
        self._remember(path, status, known)
        return str(known[0])

    def cuts_of(self, path: Path, status: os.stat_result, part_bytes: int, read: Callable[[int], None]) -> list[Cut]:
        """The parts of a file of lines, each with its digest; none where it cannot be read."""
        known = self._remembered(path, status, 6)
        if known and known[0] == part_bytes:
            read(status.st_size)
            cuts = [Cut(*each) for each in known[1]]
        else:
            cuts = cut(path, part_bytes, read)
        if cuts:
            self._remember(path, status, [part_bytes, [dataclasses.astuple(each) for each in cuts]])
        return cuts

    def _remembered(self, path: Path, status: os.stat_result, length: int) -> list[Any]:
        known, stamp = self._known.get(os.path.abspath(path)), _stamp(status)
        return known[4:] if isinstance(known, list) and len(known) == length and known[:4] == stamp else []

    def _remember(self, path: Path, status: os.stat_result, what: list[Any]) -> None:
        self._used[os.path.abspath(path)] = [*_stamp(status), *what]
        if time.monotonic() >= self._due:
            self._save()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is learnt in the block is remembered at its end, and now and then before, so that a program that is killed has not read in vain."""
        self._due = time.monotonic() + _SAVED_EVERY
        try:
            yield
        finally:
            self._save()

    def _save(self) -> None:
        began = time.monotonic()
        write_file(self.place, json.dumps(self._known | self._used).encode("utf-8", "surrogateescape"), DATA)
        self._due = time.monotonic() + max(_SAVED_EVERY, 20 * (time.monotonic() - began))  # which a list of millions of files may take long


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digest(path: Path, read: Callable[[int], None]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                read(len(block))
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()
