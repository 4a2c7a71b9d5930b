"""Names that come from outside (of files, documents, fields) as they may be shown: nothing in them moves the cursor, colours the terminal, ends
the line, or turns the direction of writing."""

import re

# C0 and C1 controls, the marks that reorder text (as in the "Trojan source" attacks), line and paragraph separators, halves of surrogate pairs
# (Python's stand-ins for bytes of a file name that are not UTF-8), and the invisible ends of the private tag characters.
_MARKS = r"\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\U000e0000-\U000e007f"
_UNSAFE = re.compile(rf"[\x00-\x1f{_MARKS}]")
_UNSAFE_IN_TEXT = re.compile(rf"[\x00-\x08\x0b-\x1f{_MARKS}]")


def printable(name: object) -> str:
    """A name on one line, with each character that could act on a terminal written as an escape: "a\\x1b[31m.txt"."""
    return _UNSAFE.sub(_escape, str(name))


def quoted(name: object) -> str:
    """The same between quotes, for names that may hold blanks."""
    return f"'{printable(name)}'"


def printable_text(text: str) -> str:
    """The same for a message of several lines: line breaks and tabs stay."""
    return _UNSAFE_IN_TEXT.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
