"""Plain text of any length. It is cut where separators of documents stand in it, and a document that is too long is cut at the end of a line."""

import codecs
import io
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO

from cllm.data.documents.charset import Binary, detect
from cllm.data.documents.separators import AUTO, MARKERS, NONE, Splitter, recognise
from cllm.data.extract.decoding import declared, note_of, plain, refusal
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.licences import licence_of
from cllm.data.extract.options import Options

_BLOCK = 1 << 20


def stream(file: IO[bytes], name: str, options: Options) -> Iterator[Document]:
    """Documents are numbered where there are several: "document 2"; the parts of a long one as well: "part 3"."""
    head = file.read(options.document_bytes)
    charset = detect(io.BytesIO(head), declared(options, head))
    if isinstance(charset, Binary):
        raise Unreadable(refusal(charset) if head else "empty")
    decoder = codecs.getincrementaldecoder(charset.codec)("replace")
    chunks = _decoded(chain([head], iter(lambda: file.read(_BLOCK), b"")), decoder)
    first = next(chunks, "")
    separator = _separator(first, options)
    whole = chain([first], chunks)
    texts: Iterable[Iterable[str]] = Splitter(separator, options.separator == AUTO).documents(whole) if separator else [whole]
    note, is_empty = note_of(charset), True
    for number, text in enumerate(texts, 1):
        where = f"document {number}" if separator else ""
        for part, piece in _pieces(text, options.document_bytes):
            place = ", ".join(each for each in (where, f"part {part}" if part else "") if each)
            is_empty = False
            yield Document(piece, place, note=note, licence=licence_of(piece))
    if is_empty:
        raise Unreadable("empty")


def _decoded(blocks: Iterable[bytes], decoder: codecs.IncrementalDecoder) -> Iterator[str]:
    """Each chunk ends behind a whole line end."""
    held = ""
    for block in blocks:
        text = held + decoder.decode(block)
        held = "\r" if text.endswith("\r") else ""
        yield plain(text.removesuffix(held)).removeprefix("\ufeff")
    yield plain(held + decoder.decode(b"", final=True))


def _separator(text: str, options: Options) -> str:
    """What documents are cut at, told from the beginning of the text."""
    if options.separator == NONE:
        return ""
    if options.separator != AUTO:
        return options.separator
    return recognise([text]) if any(marker in text for marker in MARKERS) else ""


def _pieces(chunks: Iterable[str], limit: int) -> Iterator[tuple[int, str]]:
    """(number of the part, text): number 0 where the text is not longer than `limit`; cut behind a blank line, or else behind a line."""
    held, number = "", 0
    for chunk in chunks:
        held += chunk
        while len(held) > limit:
            cut = held.rfind("\n\n", limit // 2, limit) + 2
            cut = cut if cut > 1 else held.rfind("\n", limit // 2, limit) + 1 or limit
            number += 1
            yield number, held[:cut]
            held = held[cut:]
    if held.strip():
        yield number + (number > 0), held
