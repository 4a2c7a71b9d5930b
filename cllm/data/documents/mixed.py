"""The codecs "utf-8+NAME" of text that has lines in UTF-8 and lines in the charset NAME, because it was put together from several sources or typed on
with another program. Python finds them by their names once this module is loaded.
"""

import codecs
import functools
import re
from typing import Any

_LETTER = re.compile(rb"[\xc2-\xf4][\x80-\xbf]")


def mixed_with(codec: str) -> str:
    """The name of the codec for UTF-8 and this charset, which has one byte a character."""
    return f"utf-8+{codec}"


@functools.cache
def _find(name: str) -> codecs.CodecInfo | None:
    found = re.fullmatch(r"utf_8_(cp\w+|iso\w+|koi8_\w|mac_\w+)", name)  # Python asks with "_" for every other sign
    if not found:
        return None
    narrow = codecs.lookup(found[1]).name

    class Decoder(codecs.BufferedIncrementalDecoder):
        def _buffer_decode(self, input: Any, errors: str, final: bool) -> tuple[str, int]:
            end = len(input) if final else max(input.rfind(b"\n"), input.rfind(b"\r")) + 1
            return "".join(_line(line, narrow) for line in input[:end].splitlines(keepends=True)), end

    def decode(input: Any, errors: str = "strict") -> tuple[str, int]:
        return "".join(_line(line, narrow) for line in bytes(input).splitlines(keepends=True)), len(input)

    utf8 = codecs.lookup("utf-8")
    return codecs.CodecInfo(utf8.encode, decode, incrementalencoder=utf8.incrementalencoder, incrementaldecoder=Decoder, name=mixed_with(narrow))


def _line(line: bytes, narrow: str) -> str:
    """Two letters of another charset may happen to be UTF-8, and UTF-8 may be damaged: what more of the line is decides."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        damaged = line.decode("utf-8", "replace")
        return damaged if len(_LETTER.findall(line)) > damaged.count("\ufffd") else line.decode(narrow, "replace")


codecs.register(_find)
