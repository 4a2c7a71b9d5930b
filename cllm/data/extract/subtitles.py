"""Subtitles (SubRip, WebVTT) as running text: what is said, without times, numbers and the marks of a place on the screen."""

import html
import re

from cllm.data.extract.decoding import text_of
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.options import Options

_TIME = re.compile(r"(?:(\d+):)?(\d\d?):(\d\d)[.,](\d{1,3})[ \t]*-->[ \t]*(?:(\d+):)?(\d\d?):(\d\d)[.,](\d{1,3})")
_TAG = re.compile(r"<[^<>\n]{0,200}>|\{\\[^{}\n]{0,200}\}")
_SPEAKER = re.compile(r"<v(?:\.[^ >]*)? +([^>\n]{1,100})>")
_LANGUAGE = re.compile(r"^(?:Language|lang)[:=] *([A-Za-z]{2})\b", re.MULTILINE)
_PAUSE = 4.0  # seconds of silence after which a new paragraph begins


def read(data: bytes, name: str, options: Options) -> list[Document]:
    text, note = text_of(data, options)
    paragraphs: list[list[str]] = []
    shown: list[str] = []  # lines of the cue before: a caption that rolls shows them again
    last_end = 0.0
    for start, end, lines in _cues(text):
        new = lines[_repeated(shown, lines) :]
        if not new:
            shown, last_end = lines, end
            continue
        is_break = not paragraphs or start - last_end > _PAUSE
        for line in new:
            if is_break or line.startswith(("- ", "\u2013 ", "-", ">>")):
                paragraphs.append([])
            paragraphs[-1].append(line)
            is_break = False
        shown, last_end = lines, end
    if not paragraphs:
        raise Unreadable("empty (no subtitle with text)" if "-->" in text else "damaged (no times of subtitles)")
    head = text.partition("\n\n")[0]
    language = _LANGUAGE.search(head) if text.startswith("WEBVTT") else None
    whole = "\n\n".join(" ".join(lines) for lines in paragraphs) + "\n"
    return [Document(whole, language=language[1].lower() if language else "", note=note)]


def _cues(text: str) -> list[tuple[float, float, list[str]]]:
    """(start and end in seconds, lines) of each subtitle, in order."""
    found = list(_TIME.finditer(text))
    cues = []
    for number, time in enumerate(found):
        begin = text.find("\n", time.end())
        stop = found[number + 1].start() if number + 1 < len(found) else len(text)
        block = text[begin + 1 : stop] if 0 <= begin < stop else ""
        lines = block.split("\n\n")[0].split("\n")  # the number or name of the next cue stands behind a blank line
        kept = [line for line in map(_plain, lines) if line]
        cues.append((_seconds(time.groups()[:4]), _seconds(time.groups()[4:]), kept))
    return cues


def _plain(line: str) -> str:
    line = _SPEAKER.sub(lambda speaker: f"{speaker[1]}: ", line)
    return " ".join(html.unescape(_TAG.sub("", line)).split())


def _repeated(before: list[str], lines: list[str]) -> int:
    """How many of the first lines were the last ones shown before."""
    return next((count for count in range(min(len(before), len(lines)), 0, -1) if before[-count:] == lines[:count]), 0)


def _seconds(time: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, rest = time
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0) + float(f"0.{rest}")
