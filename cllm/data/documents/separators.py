"""Several documents in one text: where one ends and the next begins.

Many data sets are one file in which a marker such as <|endoftext|> stands between documents. A text that speaks of the marker must not be cut, so
an occurrence counts only where it stands as a separator does: on a line of its own, or between the end of one text and the beginning of another; and
a file is cut at all only when nearly every occurrence in it does. A separator that the user gave is cut at wherever it stands.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cllm.runtime.errors import UserError

AUTO, NONE = "auto", "none"  # values of data.separator beside a text

# The end of a text in the vocabularies of GPT-2, Llama 3 and DeepSeek: no other text contains them but one about language models.
_SURE = ("<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
# These mean other things inside a line, in HTML for example.
_ALONE = ("</s>", "<eos>", "<EOS>", "[EOS]", "<|eos|>", "<eod>", "<EOD>", "[EOD]", "<|eod|>", "<|endofdoc|>", "<|end_of_document|>")
MARKERS = (*_SURE, *_ALONE)
_SENTENCE_BEGIN = "<s>"  # where there are these as well, </s> ends a sentence

_EXAMPLES = 20  # more markers in blocks of code than these are no examples: some document has a block that is not closed
_CONTEXT = 80  # characters before and after a marker that decide what it is
_ENDS = frozenset(".!?\u2026\"'\u201d\u2019\u00bb)]}*_\u3002\uff01\uff1f\u300d\u300f\u0964\u061f")  # with which a text may end
_QUOTES = frozenset("\"'")
_PROGRAM = frozenset("`([{<,;=+")  # neighbours that make a marker an example, or part of a program
_BLANK = " \t"
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[ntrf\\])")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "\\": "\\"}
_AFTER_CUT = re.compile(r"[ \t]*(?:\n(?:[ \t]*\n)*)?")


def parse(setting: str) -> str:
    """The value of data.separator: "auto", "none", or the text to cut at, with \\n and the like understood."""
    if setting in (AUTO, NONE):
        return setting
    text = _ESCAPE.sub(lambda found: _ESCAPED.get(found[1]) or chr(int(found[1][1:], 16)), setting)
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as line ends are in every text that is read
    if not text:
        raise UserError('separator must not be empty. Use "none" to cut no text, "auto" to cut at <|endoftext|>, or a text such as "\\n\\n\\n".')
    return text


class _Found(NamedTuple):
    """A marker, and the text before and after it: at most _CONTEXT characters, fewer only at the beginning and the end."""

    marker: str
    before: str
    after: str

    @property
    def is_alone(self) -> bool:
        """On a line of its own."""
        return not self.before.rpartition("\n")[2].strip(_BLANK) and not self.after.partition("\n")[0].strip(_BLANK)

    @property
    def is_announced(self) -> bool:
        """Whether the text before it introduces it with a colon, as a description of the marker does."""
        return self.before.rstrip().endswith(":")

    @property
    def separates(self) -> bool:
        """Whether it stands where a text ends or begins."""
        if self.is_alone:
            return True
        if self.marker in _ALONE:
            return False
        left, right = self.before[-1:], self.after[:1]
        if left in _PROGRAM or right in _PROGRAM or (left in _QUOTES and right in _QUOTES and not self._closes_speech()):
            return False
        ends_line, begins_line = not self.after.partition("\n")[0].strip(_BLANK), not self.before.rpartition("\n")[2].strip(_BLANK)
        glued_left, glued_right = left.isalnum() or left in _ENDS, right.isalnum()
        if (glued_left and glued_right) or (glued_left and ends_line) or (begins_line and glued_right):
            return True
        text, following = self.before.rstrip(), self.after.lstrip()
        return (begins_line or text[-1:] in _ENDS) and (not following or not (following[0].islower() or following[0] in _PROGRAM))

    def _closes_speech(self) -> bool:
        """Whether the quote before ends what somebody says; otherwise the marker itself is quoted."""
        return self.before[-2:-1].isalnum() or self.before[-2:-1] in _ENDS

    @property
    def is_last(self) -> bool:
        return len(self.after) < _CONTEXT and not self.after.strip()


def _events(chunks: Iterable[str], pattern: re.Pattern[str], longest: int) -> Iterator[str | _Found]:
    """The text between the markers in pieces, and the markers, in order; the same however the text is cut into chunks."""
    held, before = "", ""
    waiting = longest + _CONTEXT
    ended = False
    source = iter(chunks)
    while not ended:
        chunk = next(source, None)
        ended = chunk is None
        held += chunk or ""
        place = 0
        while True:
            found = pattern.search(held, place)
            if found is None or (not ended and found.start() > len(held) - waiting):
                break
            text = held[place : found.start()]
            if text:
                yield text
            before = (before + text)[-_CONTEXT:]
            yield _Found(found[0], before, held[found.end() : found.end() + _CONTEXT])
            before = (before + found[0])[-_CONTEXT:]
            place = found.end()
        keep = len(held) if ended else max(place, len(held) - waiting)
        text, held = held[place:keep], held[keep:]
        if text:
            yield text
            before = (before + text)[-_CONTEXT:]


def _pattern(markers: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))


_ANY_MARKER = _pattern((*MARKERS, _SENTENCE_BEGIN))


def recognise(chunks: Iterable[str]) -> str:
    """The marker that separates documents in a text; "" where none does.

    It is one that nearly always stands as a separator, and, where it occurs only a few times, mostly outside of blocks of code.
    """
    total: dict[str, int] = {}
    quoted: dict[str, int] = {}
    alone: dict[str, int] = {}
    between: dict[str, int] = {}
    last: dict[str, bool] = {}
    fence = _Fence()
    for event in _events(chunks, _ANY_MARKER, max(map(len, MARKERS))):
        if isinstance(event, str):
            fence.pass_text(event)
            continue
        total[event.marker] = total.get(event.marker, 0) + 1
        if fence.is_open:
            quoted[event.marker] = quoted.get(event.marker, 0) + 1
        if event.separates and not event.is_announced:
            kind = alone if event.is_alone else between
            kind[event.marker] = kind.get(event.marker, 0) + 1
            last[event.marker] = event.is_last
    for marker in sorted(total, key=lambda each: (-total[each], each)):
        ones, others = alone.get(marker, 0), between.get(marker, 0)
        if 10 * (ones + others) < 9 * total[marker] or marker == _SENTENCE_BEGIN or (marker == "</s>" and _SENTENCE_BEGIN in total):
            continue
        if total[marker] <= _EXAMPLES and 2 * quoted.get(marker, 0) >= total[marker]:
            continue
        if ones or others > 1 or (others and last[marker]):
            return marker
    return ""


class _Fence:
    """Whether the text that passed ends inside a block of code between lines of three backticks, where markers are examples."""

    def __init__(self) -> None:
        self.is_open = False
        self._tail = "\n"

    def pass_text(self, text: str) -> None:
        joined = self._tail + text
        self.is_open ^= bool(joined.count("\n```") % 2)
        self._tail = joined[-3:]


def passing(chunks: Iterable[str], wanted: tuple[str, ...], seen: list[bool]) -> Iterator[str]:
    """The chunks as they are; appends to `seen` when one of the wanted texts was in them, across their ends as well."""
    tail = ""
    longest = max(map(len, wanted), default=1) - 1
    for chunk in chunks:
        if wanted and not seen:
            joined = tail + chunk
            if any(each in joined for each in wanted):
                seen.append(True)
            tail = joined[max(0, len(joined) - longest) :]
        yield chunk


@dataclass(frozen=True)
class Splitter:
    """Cuts a text into its documents. `guarded`: only where the separator stands as one (see `recognise`), not wherever it occurs.

    The line that a separator stands on goes with it, and so do blank lines around it: a document ends with at most one newline before a cut and
    begins with the first line of its text after one.
    """

    separator: str
    guarded: bool

    def documents(self, chunks: Iterable[str]) -> Iterator[Iterator[str]]:
        """Each document that is not blank, as chunks that must be taken before the next document is."""
        events = self._cuts(_events(chunks, _pattern([self.separator]), len(self.separator)))
        is_first = True
        while True:
            lead = ""
            for event in events:
                if event is None:
                    break  # nothing but blanks before this cut
                lead += event
                if lead.strip():
                    break
            else:
                return
            was_first, is_first = is_first, False
            if lead.strip():
                if not was_first:
                    found = _AFTER_CUT.match(lead)
                    assert found is not None
                    lead = lead[found.end() :]
                yield self._one(lead, events)

    def _one(self, lead: str, events: Iterator[str | None]) -> Iterator[str]:
        held = ""  # blanks that may stand before a cut
        text: str | None = lead
        while text is not None:
            visible = text.rstrip(" \t\n")
            if visible:
                yield held + visible
                held = ""
            held += text[len(visible) :]
            text = next(events, "")
            if text == "":  # the end of the text, which is no cut
                if held:
                    yield held
                return
        if "\n" in held:
            yield "\n"

    def _cuts(self, events: Iterator[str | _Found]) -> Iterator[str | None]:
        """Text, and None where it is cut."""
        for event in events:
            if isinstance(event, str):
                yield event
            elif not self.guarded or event.separates:
                yield None
            else:
                yield event.marker
