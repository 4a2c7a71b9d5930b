"""Files that arrive in a request's body: streamed to the disk within limits, under names that are made here.

What a client calls its file is a hint for people. Letters and digits of it are kept, never a path, and nothing that is there is overwritten.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cllm.files import reason
from cllm.runtime.errors import OutputError
from cllm.serve.errors import Refused
from cllm.serve.safety import ClientGone

MOST_BYTES = 64 << 30
KEPT_FREE = 1 << 30  # bytes of the disk that an upload leaves to others
IDLE_SECONDS = 60.0  # in which something has to arrive
# What `cllm train` and `cllm prepare` read, and models.
_KINDS = """
    .txt .md .rst .tex .html .htm .xhtml .xml .json .jsonl .ndjson .csv .tsv .parquet .pdf .docx .pptx .xlsx .odt .ods .odp .epub .rtf .eml .mbox .msg
    .srt .vtt .ipynb .zip .tar .gz .tgz .bz2 .xz .zst .warc .py .js .ts .c .h .cpp .hpp .rs .go .java .kt .rb .php .sh .sql .css .toml .yaml .yml .ini
    .log .cllm
"""
SUFFIXES = frozenset(_KINDS.split())
_LONGEST = 80  # characters of a name
_DOUBLE = frozenset({".gz", ".bz2", ".xz", ".zst"})

Receive = Callable[[], Awaitable[Any]]


def safe_name(given: str) -> str:
    """A name for a file of this client's name: letters, digits and . _ - alone. Raises Refused for a suffix that is not on the list."""
    base = unicodedata.normalize("NFC", given[-1_000:]).replace("\\", "/").rpartition("/")[2]
    stem, suffix = os.path.splitext(base.lower())
    inner = os.path.splitext(stem)[1] if suffix in _DOUBLE else ""
    if suffix not in SUFFIXES or (inner and inner not in SUFFIXES):
        shown = suffix if re.fullmatch(r"\.[a-z0-9]{1,20}", suffix) else "this name"
        words = f"files with {shown} are not taken. Taken are text, documents, archives and models: {', '.join(sorted(SUFFIXES))}."
        raise Refused(400, words, param="name", code="unsupported_type")
    return f"{plain_name(base[: len(base) - len(suffix) - len(inner)]) or 'file'}{inner}{suffix}"


def plain_name(given: str) -> str:
    """Letters and digits of a name, and . _ - between them; it may be empty."""
    kept = "".join(each if each.isalnum() or each in "_-." or unicodedata.category(each) in ("Mn", "Mc") else "-" for each in given)
    return re.sub(r"-{2,}|\.{2,}", "-", kept).strip("-._")[:_LONGEST].encode("utf-8", "ignore")[:150].decode("utf-8", "ignore")


async def receive_file(
    receive: Receive, into: Path, name: str, workplace: Path, announced: int | None, check: Callable[[Path], None] = lambda place: None
) -> tuple[Path, int]:
    """Streams a body into a new file `name` in the folder `into`, or one of nearly that name where there is such a file; its place and bytes.

    workplace: where it lies until it is whole. announced: its Content-Length. check: may raise for a whole file that is not what it should be.
    Raises Refused: 413, 507 where the disk has no room, 408; ClientGone; OutputError where it cannot be written.
    """
    beside = workplace / f"{secrets.token_hex(8)}.part"
    count = 0
    try:
        check_room(workplace, announced or 0)
        with open(beside, "xb") as file:
            while True:
                message = await _next(receive)
                content = message.get("body", b"")
                count += len(content)
                if count > MOST_BYTES:
                    raise Refused(413, f"a file may have at most {MOST_BYTES:,} bytes.", code="request_too_large", headers={"Connection": "close"})
                await asyncio.to_thread(file.write, content)
                if count % (256 << 20) < len(content):
                    check_room(workplace, 0)
                if not message.get("more_body", False):
                    break
        if announced is not None and count != announced:
            raise ClientGone
        if not count:
            raise Refused(400, "the file is empty.", code="invalid_value")
        await asyncio.to_thread(check, beside)
        return await asyncio.to_thread(_place, beside, into, name), count
    except OSError as error:
        raise OutputError(f"the file could not be written ({reason(error)}).") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


async def _next(receive: Receive) -> Any:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            message = await receive()
    except TimeoutError:
        raise Refused(408, f"nothing arrived for {IDLE_SECONDS:.0f} seconds.", code="request_timeout") from None
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message


def check_room(place: Path, needed: int) -> None:
    """Raises Refused (413, 507) where a disk has no room for so many bytes."""
    free = shutil.disk_usage(place).free
    if needed > MOST_BYTES:
        raise Refused(413, f"a file may have at most {MOST_BYTES:,} bytes.", code="request_too_large", headers={"Connection": "close"})
    if free - needed < KEPT_FREE:
        words = f"the disk has {free:,} bytes free, and {KEPT_FREE:,} of them stay free. Free some space first."
        raise Refused(507, words, code="disk_full", headers={"Connection": "close"})


def _place(beside: Path, into: Path, name: str) -> Path:
    """Gives a whole file its name, or the next one that is free. A link is made, which replaces nothing."""
    into.mkdir(parents=True, exist_ok=True)
    stem, dot, rest = name.partition(".")
    number = 1
    while True:
        place = into / (name if number == 1 else f"{stem}-{number}{dot}{rest}")
        try:
            os.link(beside, place)
            return place
        except FileExistsError:
            number += 1
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV):
                raise
            return _copied(beside, place)  # a file system without links


def _copied(beside: Path, place: Path) -> Path:
    with open(beside, "rb") as source, open(place, "xb") as target:
        shutil.copyfileobj(source, target)
    return place
