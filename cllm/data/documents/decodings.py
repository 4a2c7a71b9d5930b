"""What files were decoded from, told to somebody who can see whether it is right: a charset is named with the files that were read in it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cllm.data.documents.charset import DAMAGED, GIVEN, MISFIT, Charset, example
from cllm.runtime.printable import printable

_NAMED = 3  # files of each charset
_PLAIN = ("utf-8", "utf-8-sig")


@dataclass
class _Alike:
    """Files that were decoded alike: how many, the names of the first of them, and a piece of the text of one where the charset is a guess."""

    count: int = 0
    names: list[str] = field(default_factory=list)
    example: str = ""


@dataclass
class Decodings:
    """The charsets of files. Those that are UTF-8 without damage are counted by nobody, because nothing about them can be wrong."""

    certain: dict[str, _Alike] = field(default_factory=dict)
    given: dict[str, _Alike] = field(default_factory=dict)
    guessed: dict[str, _Alike] = field(default_factory=dict)
    damaged: dict[str, _Alike] = field(default_factory=dict)

    def add(self, name: str, path: Path, charset: Charset) -> None:
        """Takes in the file at `path`, which people know by this name."""
        for kind in self._kinds(charset):
            alike = kind.setdefault(charset.codec, _Alike())
            alike.count += 1
            if alike.count <= _NAMED:
                alike.names.append(printable(name))
            if charset.guess and not alike.example:
                alike.example = _example(path, charset)

    def _kinds(self, charset: Charset) -> list[dict[str, _Alike]]:
        kinds = [self.damaged] if charset.how in (DAMAGED, MISFIT) else []
        if charset.codec in _PLAIN:
            return kinds
        return [*kinds, self.guessed if charset.guess else self.given if charset.how in (GIVEN, MISFIT) else self.certain]

    def lines(self, setting: str = "data.encoding", advice: str = "Say data.encoding=NAME.") -> list[str]:
        """A sentence for each charset. setting: where the user names one; advice: how to, where a guess is wrong."""

        def told(kind: dict[str, _Alike], rest: Callable[[_Alike], str]) -> list[str]:
            return [f"decoded {listed(alike.names, alike.count)} from {codec}{rest(alike)}" for codec, alike in sorted(kind.items())]

        def guess(alike: _Alike) -> str:
            shown = f", for example: '{alike.example}'" if alike.example else ""
            return f" (a guess){shown}. Wrong? {advice}"

        return [
            *told(self.certain, lambda alike: ""),
            *told(self.given, lambda alike: f", as {setting} says"),
            *told(self.guessed, guess),
            *(
                f"{listed(alike.names, alike.count)} {'holds' if alike.count == 1 else 'hold'} bytes that are not {codec}, each read as U+FFFD"
                for codec, alike in sorted(self.damaged.items())
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Decodings":
        """What `to_dict` gave."""

        def alike(each: dict[str, Any]) -> _Alike:
            return _Alike(int(each["count"]), [str(name) for name in each["names"]], str(each["example"]))

        return cls(**{kind: {str(codec): alike(each) for codec, each in found.items()} for kind, found in values.items()})


def listed(names: Sequence[str], count: int | None = None) -> str:
    """Files in a sentence: the name of a single one; otherwise how many, and the names of the first. count: where `names` are not all of them."""
    count = len(names) if count is None else count
    if count == 1:
        return names[0]
    return f"{count:,} files ({', '.join(names[:_NAMED])}{', ...' if count > _NAMED else ''})"


def _example(path: Path, charset: Charset) -> str:
    try:
        with open(path, "rb") as file:
            return example(file, charset)
    except OSError:
        return ""
