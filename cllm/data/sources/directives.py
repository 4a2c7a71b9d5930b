"""What a page asks of robots in its headers and meta tags: not to be kept, not to be followed, not to be learned from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PRODUCT = "cllm"
_FOR_ALL = "robots"
NO_TRAINING = "ai-train=no"
_AGAINST_TRAINING = (NO_TRAINING, "noai", "noml", "tdm-reservation")
_AGAINST = (*_AGAINST_TRAINING, "noindex", "none")
_SIGNAL = re.compile(r"\bai-train\s*=\s*no\b", re.IGNORECASE)
_RULE = re.compile(r"[a-z-]+")
# Other directives of the form "name: value", whose name is no robot's.
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview", "rating")


@dataclass(frozen=True)
class Directives:
    """Both flags are false where nothing was said."""

    noindex: bool = False
    """The page must not be kept: noindex, none, or one of the ways to keep texts out of the training of models (noai, noml, tdm-reservation: 1,
    Content-Signal: ai-train=no)."""
    nofollow: bool = False
    """Its links must not be followed."""
    words: str = ""
    """The directive because of which the page is not kept."""

    @property
    def notraining(self) -> bool:
        """Whether it is models that must not learn from it, whoever else may keep it."""
        return self.words in _AGAINST_TRAINING

    def __or__(self, other: Directives) -> Directives:
        return Directives(self.noindex or other.noindex, self.nofollow or other.nofollow, self.words or other.words)


def forbids_training(signal: str) -> bool:
    """Whether the value of a Content-Signal, as "search=yes, ai-train=no", keeps texts out of the training of models (https://contentsignals.org)."""
    return _SIGNAL.search(signal) is not None


def of_headers(headers: Iterable[tuple[str, str]], signals: bool = True) -> Directives:
    """Of X-Robots-Tag, TDM-Reservation and, with `signals`, Content-Signal in the headers of an answer.

    "cllm: noindex, nofollow" speaks to one robot: its name stands for all rules up to the next name.
    """
    rules: set[str] = set()
    for name, value in headers:
        name = name.lower()
        if name == "tdm-reservation":
            rules |= _reserved(value)
        elif name == "content-signal":
            rules |= {NO_TRAINING} if signals and forbids_training(value) else set()
        elif name == "x-robots-tag":
            robot = _FOR_ALL
            for piece in value.lower().split(","):
                before, colon, after = piece.strip().partition(":")
                if colon and before.strip() not in _WITH_VALUE:
                    robot, piece = before.strip(), after
                if robot in (_FOR_ALL, _PRODUCT):
                    rules |= set(_RULE.findall(piece))
    return _directives(rules)


def of_tags(tags: Iterable[tuple[str, str]]) -> Directives:
    """Of the name and content of each meta tag of a page; the name is that of a robot, or "robots" for all."""
    rules: set[str] = set()
    for name, content in tags:
        if name == "tdm-reservation":
            rules |= _reserved(content)
        elif name in (_FOR_ALL, _PRODUCT):
            rules |= set(_RULE.findall(content.lower()))
    return _directives(rules)


def _reserved(value: str) -> set[str]:
    return {"tdm-reservation"} if value.strip() == "1" else set()


def _directives(rules: set[str]) -> Directives:
    against = next((rule for rule in _AGAINST if rule in rules), "")
    return Directives(bool(against), bool(rules & {"nofollow", "none"}), against)
