"""Which module reads which kind of file. A module is loaded when the first file of its kind is read, and only in the child process.

A reader has one of two functions, or both:

    read(data: bytes, name: str, options: Options) -> list[Document]
    stream(file: IO[bytes], name: str, options: Options) -> Iterator[Document]     for files of any size; `file` may not be able to seek

Both raise `Unreadable`.
"""

import importlib
import io
from collections.abc import Iterator
from types import ModuleType
from typing import IO, Any

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.options import Options
from cllm.data.extract.parts import Left, Part
from cllm.runtime.printable import printable_text
from cllm.runtime.quantities import size

_MODULES = {
    "text": "text",
    "code": "code",
    "notebook": "notebook",
    "latex": "latex",
    "subtitles": "subtitles",
    "email": "mail",
    "mbox": "mail",
    "msg": "outlook",
    "rtf": "rtf",
    "records": "records",
    "html": "html",
    "pdf": "pdf",
    "docx": "word",
    "pptx": "slides",
    "xlsx": "sheets",
    "odt": "opendocument",
    "ods": "opendocument",
    "odp": "opendocument",
    "epub": "epub",
    "image": "images",
    "unknown": "unknown",
}
KINDS = frozenset(_MODULES)
STREAMED = frozenset({"text", "records", "mbox"})
"""Kinds whose readers take a stream, so that no file is too large for them."""
ARCHIVES = frozenset({"zip", "tar", "warc"})
COMPRESSED = frozenset({"gz", "xz", "zst", "bz2"})


def documents(file: IO[bytes], kind: str, name: str, options: Options, part: Part | None = None, left: Left | None = None) -> Iterator[Document]:
    """The documents of an open file, in order, or of a part of one of records; left: counts what is to be told at the end of that file.

    Raises Unreadable and nothing else, also after some documents where a file is damaged further on: what a library raises is damage of the file.
    """
    try:
        yield from _documents(file, kind, name, options) if part is None else _load(kind).part(file, part, options, left)
    except (Unreadable, GeneratorExit):
        raise
    except MemoryError:
        raise Unreadable(f"out of memory (more than {size(options.memory_bytes)})") from None
    except RecursionError:
        raise Unreadable("damaged (nested too deeply)") from None
    except Exception as error:
        lines = printable_text(str(error)).strip().splitlines()
        raise Unreadable(f"damaged ({lines[0][:200] if lines else type(error).__name__})") from None


def _documents(file: IO[bytes], kind: str, name: str, options: Options) -> Iterator[Document]:
    module = _load(kind)
    if kind in STREAMED:
        yield from module.stream(file, name, options)
        return
    data = file.read(options.input_bytes + 1)
    if len(data) > options.input_bytes:
        raise Unreadable(f"too large (more than {size(options.input_bytes)})")
    total = 0
    for document in module.read(data, name, options):
        total += len(document.text) if document.text.isascii() else len(document.text.encode("utf-8", "replace"))
        if total > options.text_bytes:
            raise Unreadable(f"too large (more than {size(options.text_bytes)} of text)")
        yield document


def divide(file: IO[bytes], name: str, options: Options) -> dict[str, Any]:
    """How the parts of a file of records are to be read (see `records.divide`); nothing where it has to be read as a whole, which then tells why."""
    try:
        found: dict[str, Any] = _load("records").divide(file, name, options)
        return found
    except Exception:
        return {}


def read(data: bytes, kind: str, name: str, options: Options) -> list[Document]:
    """The documents of a file inside another one: of an attachment."""
    return list(documents(io.BytesIO(data), kind, name, options))


def _load(kind: str) -> ModuleType:
    module = f"{__package__}.{_MODULES[kind]}"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name == module:
            raise Unreadable(f"unknown type (this version of cllm does not read {kind})") from None
        raise Unreadable(f"unknown type ({kind} needs the library {error.name}: pip install 'cllm[data]')") from None
