"""From the bytes of a text file to its text: one rule for all readers of text."""

import re

from cllm.data.documents.charset import AUTO, Binary, Charset, decode, labelled
from cllm.data.documents.json_records import clean
from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import Options

_CHARSET = re.compile(r"charset\s*=\s*[\"']?([-\w.:]+)", re.IGNORECASE)


def declared(options: Options, content: bytes) -> str:
    """The codec for a file that is not certainly Unicode: what the server said, unless its bytes tell otherwise, or else the user. `content`: the
    file, or its begin."""
    found = _CHARSET.search(options.content_type)
    return (found and labelled(found[1], content)) or options.encoding or AUTO


def text_of(data: bytes, options: Options) -> tuple[str, str]:
    """The text, its line ends as newlines, and what is to be noted of its charset. Raises Unreadable where the file is empty or no text."""
    found = decode(data, declared(options, data))
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
