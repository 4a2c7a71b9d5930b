"""From the bytes of a text file to its text: one rule for all readers of text."""

import re

from cllm.data.documents.charset import AUTO, Binary, Charset, check_encoding, decode
from cllm.data.documents.json_records import clean
from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import Options
from cllm.runtime.errors import UserError

_CHARSET = re.compile(r"charset\s*=\s*[\"']?([-\w.:]+)", re.IGNORECASE)


def declared(options: Options) -> str:
    """The codec for a file that is not certainly Unicode: what the server said, or else the user."""
    found = _CHARSET.search(options.content_type)
    if found:
        try:
            return check_encoding(found[1])
        except UserError:
            pass
    return options.encoding or AUTO


def text_of(data: bytes, options: Options) -> tuple[str, str]:
    """The text, its line ends as newlines, and what is to be noted of its charset. Raises Unreadable where the file is empty or no text."""
    found = decode(data, declared(options))
    if isinstance(found, Binary):
        raise Unreadable(refusal(found))
    text = plain(found[0])
    if not text.strip():
        raise Unreadable("empty")
    return text, note_of(found[1])


def refusal(binary: Binary) -> str:
    return f"unknown type ({binary.reason})"


def plain(text: str) -> str:
    """With newlines as the only line ends, and without halves of surrogate pairs."""
    return clean(text.replace("\r\n", "\n").replace("\r", "\n"))


def note_of(charset: Charset) -> str:
    """What somebody who wonders about the letters of a text would like to know."""
    if charset.codec in ("utf-8", "utf-8-sig"):
        return "some bytes are not UTF-8" if charset.errors == "replace" else ""
    return f"decoded from {charset.codec}{' (a guess)' if charset.guess else ''}"
