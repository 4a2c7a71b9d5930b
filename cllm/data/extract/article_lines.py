"""The lines around an article that extractors take for a part of it: headline, author and date, invitations to share, subscribe and read more."""

# ruff: noqa: E501 - patterns of whole lines
import re
from collections.abc import Callable

_WORD = re.compile(r"\w+")
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DAY = rf"(?:\d{{1,2}}(?:st|nd|rd|th)?\.?,?\s+{_MONTH},?\s+(?:19|20)\d\d|{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+(?:19|20)\d\d|(?:19|20)\d\d-\d\d-\d\d|\d{{1,2}}[./]\d{{1,2}}[./](?:19|20)?\d\d)"
_CLOCK = r"(?:\d{1,2}[:.]\d\d(?::\d\d)?\s*(?:[ap]\.?m\.?)?|\d{1,2}\s*[ap]\.?m\.?)"
_STAMP = re.compile(
    rf"(?:(?:first\s+)?(?:published|posted|updated|last updated|last modified|created|date|written|added|on)\b\s*(?:on|at|:)?\s*)*"
    rf"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?,?\s+)?{_DAY}[\s,|\u00b7\u2022\u2013-]*(?:at\s+)?(?:{_CLOCK})?\s*(?:[A-Z]{{2,4}})?\W*"
    rf"(?:(?:\d+\s+min(?:ute)?s?\s+read)|(?:updated|modified)\W*{_DAY}\W*(?:{_CLOCK})?\s*[A-Z]{{0,4}})?\W*",
    re.IGNORECASE,
)
_BYLINE = re.compile(
    r"(?:written |posted |reported |story |words |text |article )?by:?\s+[^\W\d_][\w.'\u2019-]*(?:\s+(?:and\s+|&\s+|de |van |von )?[^\W\d_][\w.'\u2019-]*){0,5}\W*",
    re.IGNORECASE,
)
_FURNITURE = re.compile(
    r"(?:share|tweet|pin it|print|email|e-mail|save|comments?|\d+ comments?|\d+ shares?|advertisement|advertising|ad|sponsored|loading\W*|"
    r"share (?:this|on|via|with)\b.{0,80}|click to (?:share|email|print)\b.{0,80}|like this:?|follow (?:us|me|@).{0,100}|subscribe\b.{0,120}|sign up\b.{0,120}|"
    r"read (?:more|next|also|full (?:story|article))\b.{0,160}|(?:related|more|recommended|popular|latest)(?: (?:articles?|stories|posts?|news|content|topics?|reading|coverage|from .{0,60}))?:?|"
    r"see also:?|you (?:may|might) also (?:like|enjoy)\b.{0,40}|(?:tags?|topics?|categories|category|filed under|labels?|keywords)\s*:.{0,240}|"
    r"(?:photo|image|picture|photograph)s?(?: credits?| courtesy| by| source)?\s*[:/].{0,160}|(?:copyright|\u00a9|\(c\)) .{0,200}|all rights reserved\b.{0,200}|"
    r"\d+ min(?:ute)?s? read|(?:view|leave|post|add|write) (?:a |all |your )?(?:comments?|reply).{0,60}|skip to .{0,40}|back to (?:top|.{0,20})|"
    r"continue reading.{0,80}|story continues below.{0,60}|article continues below.{0,60}|watch:? .{0,20}|video:?|"
    r"(?:next|previous)(?: (?:article|post|story|page))?\W*.{0,10})\W*",
    re.IGNORECASE,
)
_HEAD_LINES, _FOOT_LINES = 6, 8  # so far into the article, seen from its ends
_MARK = re.compile(r"^[#>*\-\s|]+|[*|\s]+$")


def without_surroundings(text: str, titles: list[str]) -> str:
    """An article's text without headline, stamps and invitations at its ends. titles: what the page calls itself.

    Lines in the middle stay as they are, and so does everything where nothing else would be left.
    """
    lines = text.split("\n")
    full = [number for number, line in enumerate(lines) if line.strip()]
    if len(full) < 3:
        return text
    known = {_key(title) for title in titles} - {""}
    dropped: set[int] = set()
    for number in full[:_HEAD_LINES]:
        if _is_headline(lines[number], known) or _matches(lines[number], _STAMP.fullmatch, _BYLINE.fullmatch, _FURNITURE.fullmatch):
            dropped.add(number)
    for number in reversed(full[-_FOOT_LINES:]):
        if _matches(lines[number], _STAMP.fullmatch, _FURNITURE.fullmatch):
            dropped.add(number)
    if len(dropped) == len(full):
        return text
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for number, line in enumerate(lines) if number not in dropped)).strip("\n")


def _is_headline(line: str, known: set[str]) -> bool:
    key = _key(line)
    return bool(key) and key in known


def _matches(line: str, *patterns: Callable[[str], object]) -> bool:
    bare = _MARK.sub("", line)
    return 0 < len(bare) < 260 and any(pattern(bare) for pattern in patterns)


def _key(text: str) -> str:
    return " ".join(_WORD.findall(text)).casefold()
