"""Stage 1: the files of a piece become rows, one for each document and one for each file that gives none, with the reason."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.members import Again, Found, Member, Refused, Watch, members
from cllm.data.extract.options import Options
from cllm.data.extract.parts import Left, Part
from cllm.data.extract.sandbox import Sandbox
from cllm.data.preparation.duplicates import key_of
from cllm.data.preparation.rows import COLUMNS, Row, file_facts, writing
from cllm.data.preparation.versions import Fetched
from cllm.data.preparation.within import tell
from cllm.runtime.printable import printable

_own = threading.local()  # the sandbox of this thread, which reads one file after the other


def divide(place: str, root: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Tells how the parts of a file of records are to be read (see `records.divide`); nothing where it has to be read as a whole."""
    return {"files": {}, "how": sandbox_of(Options.from_dict(options)).divide(path_of(root, name), printable(name))}


def extract(
    place: str,
    piece: int,
    source: str,
    root: str,
    files: list[str],
    refused: dict[str, str],
    options: dict[str, Any],
    part_chars: int,
    part: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes PLACE.parquet; PLACE.fetched, the pages in it that were fetched from the web, see versions.py. Tells in which rows a new part of so many
    characters begins.

    files: names below `root`, which may be a file itself; refused: those of them that need not be tried, and why. part: of the one file, where it is
    divided; then the numbers in the ids are those of rows in this part, and what is to be told behind the last part is in the result (`close`).
    """
    target = Path(place + ".parquet")
    how = Options.from_dict(options)
    sandbox = sandbox_of(how)
    chars = pages = first = 0
    parts = [(0, 0)]  # the first row of each part, and the characters before it
    fetched = Fetched()
    watch, wanted, left = Watch(), Part(**part) if part else None, Left()
    begin = wanted.begin if wanted else 0

    def rows_in(name: str) -> Iterator[tuple[Found | None, Row]]:
        if name in refused:
            return iter([(None, _refusal(name, refused[name]))])
        path = path_of(root, name)
        return rows_of(path, name, how, sandbox, watch) if wanted is None else rows_of_part(path, name, wanted, sandbox, left)

    with writing(target) as rows:
        for name in files:
            before = None
            for member, row in rows_in(name):
                row["id"], row["source"] = f"{piece:08x}{rows.num_rows:08x}", source
                if isinstance(member, Again):
                    fetched.add(member.url, member.date, key_of(row["id"]), key_of(row["id"]), member.same_as)
                    continue
                if isinstance(member, Member) and not row["dropped_because"]:
                    first = first if member is before else key_of(row["id"])
                    fetched.add(member.url, member.date, first, key_of(row["id"]))
                    before = member
                if chars - parts[-1][1] >= part_chars:
                    parts.append((rows.num_rows, chars))
                rows.add(row)
                if len(files) == 1 and not (wanted and wanted.is_groups):  # a large one; of many, none takes long
                    tell(max(0, watch.position - begin, sandbox.position - begin))
                chars += len(row["text"])
                pages += row["kind"] == "html"
    made = {".parquet": file_facts(target), ".fetched": fetched.save(Path(place + ".fetched"))}
    found = {"files": made, "rows": rows.num_rows, "chars": chars, "parts": parts, "pages": pages, "fetched": len(fetched)}
    return found if wanted is None else {**found, "left": left.to_dict()}


def close(place: str, piece: int, source: str, name: str, reason: str) -> dict[str, Any]:
    """Writes PLACE.parquet, the row behind the documents of a file that was read in parts: what could not be read in it."""
    target = Path(place + ".parquet")
    with writing(target) as rows:
        rows.add({**_refusal(printable(name), reason, kind="records"), "id": f"{piece:08x}{0:08x}", "source": source})
    return {"files": {".parquet": file_facts(target)}, "rows": 1, "chars": 0, "parts": [(0, 0)], "pages": 0, "fetched": 0}


def sandbox_of(options: Options) -> Sandbox:
    if getattr(_own, "options", None) != options:
        if hasattr(_own, "sandbox"):
            _own.sandbox.close()
        _own.options, _own.sandbox = options, Sandbox(options)
    sandbox: Sandbox = _own.sandbox
    return sandbox


def path_of(root: str, name: str) -> Path:
    """Where a file of a source is, whose root may be that file."""
    below = Path(root)
    return below / name if below.is_dir() else below


def _refusal(path: str, reason: str, **more: str) -> Row:
    return {**dict.fromkeys(COLUMNS, ""), "path": path, "dropped_because": reason, **more}


def rows_of(path: Path, name: str, options: Options, sandbox: Sandbox, watch: Watch | None = None) -> Iterator[tuple[Found | None, Row]]:
    """The documents of a file or of all that is in it, each with what it was found in. What cannot be read costs itself, and where an archive breaks
    off, what is behind. A page that is stored under another address has a row without anything in it."""
    try:
        for member in members(path, name, options, watch):
            if isinstance(member, Member):
                yield from ((member, row) for row in _documents(member, sandbox))
            else:
                yield member, _refusal(member.name, member.reason) if isinstance(member, Refused) else _refusal("", "")
    except OSError as error:
        yield None, _refusal(name, f"unreadable ({(error.strerror or str(error)).lower()})")


def rows_of_part(path: Path, name: str, part: Part, sandbox: Sandbox, left: Left) -> Iterator[tuple[Found | None, Row]]:
    """The same of a part of a file of records. left: counts what is to be told behind the last part."""
    member = Member(printable(name), "records", path)
    sandbox.told = {}
    count = 0
    try:
        for document in sandbox.documents(path, member.name, member.kind, part=part):
            count += 1
            yield member, _row(document, member, member.name)
    except Unreadable as error:
        yield member, _refusal(member.name, str(error), kind=member.kind)
    except OSError as error:
        yield None, _refusal(name, f"unreadable ({(error.strerror or str(error)).lower()})")
    # Of a part that was not read to its end a row has told; what is missing behind it is not.
    left.update(Left.from_dict(sandbox.told) if sandbox.told else Left(documents=max(1, count)))


def _documents(member: Member, sandbox: Sandbox) -> Iterator[Row]:
    about = {"kind": member.kind, "url": member.url, "date": member.date}
    path = f"{member.name}#{member.part}" if member.part else member.name
    source: Any = member.source  # its stream has the one method of a file that is used
    given = False
    try:
        for document in sandbox.documents(source, member.name, member.kind, member.content_type):
            given = True
            yield _row(document, member, path)
    except Unreadable as error:
        yield _refusal(path, str(error), **about)
    else:
        if not given:
            yield _refusal(path, "empty (no text in it)", **about)


def _row(document: Document, member: Member, path: str) -> Row:
    """A document without text says so, as a file that cannot be read does."""
    return {
        "text": document.text,
        "id": "",
        "url": member.url or document.url,
        "path": f"{path}#{document.part}" if document.part else path,
        "title": document.title,
        "date": document.date or member.date,
        "language": document.language,
        "licence": document.licence,
        "source": "",
        "kind": member.kind,
        "code": document.code,
        "note": document.note,
        "scores": "",
        "dropped_because": "" if document.text.strip() else "empty (no text in it)",
    }
