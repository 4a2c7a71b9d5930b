"""What is to be read in a file: itself, or the members of the archive that it is. Archives are streams; nothing is unpacked to the disk.

    for member in members(path, name, options):
        if isinstance(member, Refused): ...                      # member.name, member.reason
        elif isinstance(member, Again): ...                      # member.url, member.same_as
        else: sandbox.documents(member.source, member.name, member.kind, member.content_type)

Names of members only name: "a.zip/b/c.pdf" is told to people, and no file of such a name is ever opened.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from cllm.data.documents.files import FOREIGN_FOLDERS, VCS_FOLDERS
from cllm.data.extract import tars, warcs
from cllm.data.extract.compressed import Budget, Exhausted, Readable, unpacked
from cllm.data.extract.document import Unreadable
from cllm.data.extract.kinds import HEAD_BYTES, extension_of, kind_of, kind_of_members
from cllm.data.extract.options import MEGABYTE, Options
from cllm.data.extract.readers import ARCHIVES, COMPRESSED, STREAMED
from cllm.data.extract.zips import Zip
from cllm.runtime.printable import printable
from cllm.runtime.quantities import size

_HELD_BYTES = 8 * MEGABYTE  # of a member that can be read as a stream
_NAMES = 1000  # members from which a document that is packed as a zip archive is told
_TAR_ENDINGS = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
_COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lzma", ".z")


class Head:
    """A stream whose first bytes were looked at."""

    def __init__(self, head: bytes, rest: Readable):
        self._head = head
        self._rest = rest

    def read(self, count: int = -1, /) -> bytes:
        if count < 0:
            return self._head + b"".join(iter(lambda: self._rest.read(MEGABYTE), b""))
        if self._head:
            part, self._head = self._head[:count], self._head[count:]
            return part
        return self._rest.read(count)


@dataclass(frozen=True)
class Member:
    """Something that a reader takes. `source`: its content, a file of the disk, or a stream that ends when the next member is asked for."""

    name: str
    kind: str
    source: bytes | Path | Head
    part: str = ""
    """Which record of a WARC file."""
    url: str = ""
    date: str = ""
    """When it was fetched."""
    content_type: str = ""


class Again(NamedTuple):
    """A page that had the bytes of another one when it was fetched, and is stored there alone."""

    url: str
    date: str
    same_as: str


class Refused(NamedTuple):
    """Something that no reader can take, and why, in the words of `Unreadable`."""

    name: str
    reason: str


Found = Member | Refused | Again


class Watch:
    """How far a file of the disk has been read."""

    position = 0


class _Watched(io.FileIO):
    def __init__(self, path: Path, watch: Watch):
        super().__init__(path)
        self._watch = watch

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        self._watch.position = self.tell()
        return count


def members(path: Path, name: str = "", options: Options = Options(), watch: Watch | None = None) -> Iterator[Found]:
    """All that is in a file, in its order. name: what people call it; its path where nothing is given; watch: tells how far an archive has been read
    here. Raises OSError where the file cannot be opened."""
    name = printable(name or path.as_posix())
    with io.BufferedReader(_Watched(path, watch or Watch())) as file:
        head = file.read(HEAD_BYTES)
        if not head:
            yield Refused(name, "empty")
            return
        walk = _Walk(options, Budget(path.stat().st_size, options))
        kind = kind_of(name, head)
        try:
            if kind == "zip":
                yield from walk.zip(file, name, 1, path)
            elif kind in ARCHIVES | COMPRESSED:
                yield from walk.stream(Head(head, file), name, name, 0)
            else:
                yield Member(name, kind, path)
        except Unreadable as error:
            yield Refused(name, str(error))


class _Walk:
    """Through one file of the disk, whose archives share a budget. depth: how many archives are around; layers: of compression."""

    def __init__(self, options: Options, budget: Budget):
        self._options = options
        self._budget = budget

    def stream(self, stream: Readable, name: str, called: str, depth: int, layers: int = 0) -> Iterator[Found]:
        """What is in a stream. called: its name, without the endings of what was unpacked already. Raises Unreadable where it cannot be read on."""
        head = stream.read(HEAD_BYTES)
        if not head:
            raise Unreadable("empty")
        kind = kind_of(called, head)
        joined = Head(head, stream)
        if kind in COMPRESSED:
            if layers >= self._options.depth:
                raise Unreadable("nested too deeply (compressed again and again)")
            yield from self.stream(unpacked(joined, kind, self._budget), name, _without_ending(called), depth, layers + 1)
        elif kind in ARCHIVES:
            if depth >= self._options.depth:
                raise Unreadable(f"nested too deeply (archives in archives are read to a depth of {self._options.depth})")
            if kind == "tar":
                yield from self._tar(joined, name, depth + 1)
            elif kind == "warc":
                yield from self._warc(joined, name)
            else:
                yield from self.zip(io.BytesIO(self._whole(joined)), name, depth + 1)
        else:
            yield from self._single(joined, name, kind, depth)

    def zip(self, file: IO[bytes], name: str, depth: int, path: Path | None = None) -> Iterator[Found]:
        """What is in a zip archive, or the document that is packed as one. path: where the archive is a file of the disk."""
        archive = Zip(file, self._budget, self._options)
        kind = _kind_of_zip(archive)
        if kind != "zip":
            file.seek(0)
            yield Member(name, kind, path if path is not None else file.read())
            return
        for entry in archive:
            inner = f"{name}/{printable(entry.name)}"
            if entry.is_folder:
                continue
            problem = "link (not followed)" if entry.is_link else _left_out(entry.name)
            if problem:
                yield Refused(inner, problem)
                continue
            try:
                yield from self.stream(archive.open(entry), inner, inner, depth)
            except Exhausted:
                raise
            except Unreadable as error:
                yield Refused(inner, str(error))

    def _tar(self, stream: Readable, name: str, depth: int) -> Iterator[Found]:
        for entry in tars.entries(stream, self._options):
            inner = f"{name}/{printable(entry.name)}"
            problem = entry.problem or _left_out(entry.name)
            if problem:
                yield Refused(inner, problem)
                continue
            try:
                yield from self.stream(entry.content, inner, inner, depth)
            except Exhausted:
                raise
            except Unreadable as error:
                if entry.content.failed:  # the archive itself cannot be read on
                    raise
                yield Refused(inner, str(error))

    def _warc(self, stream: Readable, name: str) -> Iterator[Found]:
        for page in warcs.pages(stream, self._options, self._budget):
            if page.problem:
                yield Refused(f"{name} {page.part}", page.problem)
                continue
            if page.same_as:
                yield Again(page.url, page.date, page.same_as)
                continue
            kind = kind_of(urlsplit(page.url).path or "/", page.body[:HEAD_BYTES])
            yield Member(name, kind, page.body, page.part, page.url, page.date, page.content_type)

    def _single(self, stream: Head, name: str, kind: str, depth: int) -> Iterator[Found]:
        """A file that is no archive. What can be read as a stream is not held. Of a compressed text that ends in the middle, what came is kept;
        members of an archive are whole or refused."""
        limit = _HELD_BYTES if kind in STREAMED else self._options.input_bytes
        held: list[bytes] = []
        count = 0
        failure: Unreadable | None = None
        try:
            while count <= limit and (piece := stream.read(MEGABYTE)):
                held.append(piece)
                count += len(piece)
        except Unreadable as error:
            if kind not in STREAMED or not held or depth > 0:
                raise
            failure = error
        if count > limit and kind not in STREAMED:
            raise Unreadable(f"too large (more than {size(limit)})")
        content = b"".join(held)
        yield Member(name, kind, Head(content, stream) if count > limit else content)
        if failure is not None:
            raise failure

    def _whole(self, stream: Head) -> bytes:
        """An archive inside an archive that has to be sought in."""
        content = stream.read(self._options.input_bytes + 1)
        parts = [content]
        count = len(content)
        while content and count <= self._options.input_bytes:
            content = stream.read(MEGABYTE)
            parts.append(content)
            count += len(content)
        if count > self._options.input_bytes:
            raise Unreadable(f"too large (an archive of more than {size(self._options.input_bytes)} inside another one)")
        return b"".join(parts)


def _kind_of_zip(archive: Zip) -> str:
    """What the first members say; documents have their marks at the beginning."""
    names: list[str] = []
    first = b""
    try:
        for entry in islice(archive, _NAMES):
            if not names and entry.name == "mimetype":
                first = archive.open(entry).read(100)
            names.append(entry.name)
    except Unreadable:  # told when its members are read
        pass
    return kind_of_members(names, first)


def _left_out(name: str) -> str:
    """Why a member is none that people wrote for others to read, as with files in folders; empty for all others."""
    for folder in name.split("/")[:-1]:
        if folder in VCS_FOLDERS or folder in (".git", ".hg", ".svn"):
            return "version control"
        if folder in FOREIGN_FOLDERS:
            return FOREIGN_FOLDERS[folder]
        if folder == "__MACOSX" or (folder.startswith(".") and folder not in (".", "..")):
            return "hidden"
    return "hidden" if name.rpartition("/")[2].startswith(".") else ""


def _without_ending(name: str) -> str:
    extension = extension_of(name)
    if extension in _TAR_ENDINGS:
        return name[: -len(extension)] + ".tar"
    return name[: -len(extension)] if extension in _COMPRESSED_ENDINGS else name
