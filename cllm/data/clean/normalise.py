"""One form for what means the same: charset errors, Unicode forms, invisible characters and white space.

A text that is normal already comes back as it is, and normalising twice changes nothing more.
"""

import functools
import re
import unicodedata
from collections.abc import Callable

from cllm.data.clean.rules import Rules
from cllm.runtime.errors import DataError

# UTF-8 that was read as Latin-1 or Windows-1252 shows as a letter of C2..F4 and a character of 80..BF; the same for Cyrillic read as Windows-1251.
_SIGNS = "\u2013\u2014\u2018-\u201a\u201c-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122"  # in both charsets of Windows
_CP1252 = _SIGNS + "\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc"
_CP1251 = _SIGNS + "\u0401-\u040f\u0451-\u045f\u0490\u0491\u2116\x80-\xbf"
_MOJIBAKE = re.compile(f"[\xc2-\xf4][\x80-\xbf{_CP1252}]|[\u0420\u0421\u0432][{_CP1251}]")
_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# Control characters but tab and newline; soft hyphens, zero-width spaces and byte order marks, which do not show; directions of writing, which can
# make a line look other than it is; code points that are no characters. Joiners stay: Persian, the scripts of India and emoji are spelt with them.
_INVISIBLE = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
_DIRECTIONS = "\u200e\u200f\u202a-\u202e\u2066-\u2069"
_HALVES, _ENDS, _WIDE = "\ud800-\udfff", "\r\x0b\x0c\x85\u2028\u2029", "\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
_CONTROL = re.compile(f"[{_INVISIBLE}{_DIRECTIONS}]+")
_SURROGATE = re.compile(f"[{_HALVES}]")
_LINE_ENDS = re.compile(f"\r\n?|[{_ENDS}]")
_SPACES = re.compile(f"[{_WIDE}]")
_UNUSUAL = re.compile(f"[{_INVISIBLE}{_DIRECTIONS}{_HALVES}{_ENDS}{_WIDE}]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_ORDINARY = bytes(range(32, 127)) + b"\t\n"


def normalise(text: str, is_code: bool, rules: Rules) -> tuple[str, dict[str, int]]:
    """The text in its normal form, and how often each rule changed something (rules that changed nothing are left out).

    In code only line ends, control characters and blank ends of lines are touched: what stands in it may be meant. Raises DataError where ftfy is
    missing and a line looks as if it was read in a wrong charset.
    """
    counts: dict[str, int] = {}

    def apply(rule: str, change: Callable[[str], tuple[str, int]]) -> None:
        nonlocal text
        text, times = change(text)
        if times:
            counts[rule] = counts.get(rule, 0) + times

    plain = text.isascii()
    if not plain and not is_code:
        if rules.mojibake:
            apply("mojibake", _repaired)
        if rules.unicode_form and not unicodedata.is_normalized("NFC", text):
            text, counts["unicode_form"] = unicodedata.normalize("NFC", text), 1
    # Most texts hold nothing unusual, which one look tells.
    if text.encode().translate(None, _ORDINARY) if plain else _UNUSUAL.search(text):
        apply("surrogates", functools.partial(_SURROGATE.subn, "\ufffd"))  # half a character, which no file can hold
        if rules.white_space:
            apply("white_space", functools.partial(_LINE_ENDS.subn, "\n"))
            if not is_code:
                apply("white_space", functools.partial(_SPACES.subn, " "))
        if rules.control_characters:
            apply("control_characters", functools.partial(_COLOURS.subn, ""))
            apply("control_characters", functools.partial(_CONTROL.subn, ""))
    if rules.white_space:
        if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
            apply("white_space", functools.partial(_TRAILING.subn, ""))
        if "\n\n\n" in text and not is_code:
            apply("white_space", functools.partial(_BLANK_LINES.subn, "\n\n"))
        text = _without_blank_ends(text)
    return text, counts


def _without_blank_ends(text: str) -> str:
    """The text without blank lines before and after it; the first line keeps its indentation."""
    text = text.rstrip()
    if text[:1].isspace():
        start = len(text) - len(text.lstrip())
        text = text[text.rfind("\n", 0, start) + 1 :]
    return text


def _repaired(text: str) -> tuple[str, int]:
    """Lines that were read in a wrong charset, read in the right one; and how many they were."""
    if not _MOJIBAKE.search(text):
        return text, 0
    try:
        import ftfy
    except ImportError:
        raise DataError("repairing text of a wrong charset needs ftfy, which is not installed. Install it with: pip install 'cllm[data]'") from None
    lines = text.split("\n")
    changed = 0
    for i, line in enumerate(lines):
        if _MOJIBAKE.search(line):
            right = ftfy.fix_encoding(line)
            if right != line and "\n" not in right:
                lines[i] = right
                changed += 1
    return "\n".join(lines), changed
