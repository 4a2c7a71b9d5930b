"""The rules on text by name, with their thresholds: what a recipe writes down and a person can change or switch off, for each source apart.

    Rules()                                                      the defaults
    Rules().changed({"gopher_min_words": 20, "mojibake": "off"})

A threshold of None is off. The published thresholds were found on pages of the web; where ours differ, the rule says why.

Sources: Gopher (Rae et al. 2021, arXiv 2112.11446, table A1 and section A.1.1), C4 (Raffel et al. 2020, JMLR 21:140, section 2.2), FineWeb (Penedo et
al. 2024, arXiv 2406.17557, section 3.6), Codex (Chen et al. 2021, arXiv 2107.03374, section 3.1), StarCoder (Li et al. 2023, arXiv 2305.06161).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cllm.runtime.errors import UserError
from cllm.runtime.printable import printable

_OFF = ("off", "no", "false", "none")
_ON = ("on", "yes", "true")


@dataclass(frozen=True)
class Rules:
    """Every rule and its threshold. "Share" is a number from 0 to 1."""

    # Normalising. Each is counted where it changed something.
    mojibake: bool = True
    """Text that was read in a wrong charset is read again in the right one (ftfy); prose only."""
    unicode_form: bool = True
    """Letters and their accents are composed (NFC); prose only."""
    control_characters: bool = True
    """Control characters, invisible characters and terminal colours are removed."""
    white_space: bool = True
    """Line ends are "\\n", other spaces are " ", nothing stands after the end of a line, at most one blank line follows another text."""

    # Lines that stand on many pages of a site, or are about the site.
    boilerplate_min_pages: int | None = 5
    """A line that stands on at least so many pages of a site ..."""
    boilerplate_share: float | None = 0.3
    """... and on this share of its pages is taken out of all of them."""
    c4_policy_lines: bool = True
    """Lines about cookies, terms of use and a browser without JavaScript are taken out of pages of the web (C4; there every line with the word
    "JavaScript" goes, with which documentation would lose its subject)."""

    # Language.
    languages: tuple[str, ...] = ()
    """Only these languages are kept (codes of two letters); none named: all. Code has no language."""
    min_language_probability: float | None = 0.5
    """Where languages are chosen, a document must be in one of them with this probability."""

    # Any text.
    max_damaged: float | None = 0.01
    """Share of characters that could not be read (U+FFFD)."""
    gopher_min_words: int | None = 50
    gopher_max_words: int | None = None
    """Off: Gopher drops what has more than 100,000 words, and so every book."""
    gopher_min_word_length: float | None = 3.0
    """Characters in the mean word; not for scripts without spaces between words."""
    gopher_max_word_length: float | None = 10.0
    gopher_max_symbols: float | None = 0.1
    """Number signs, and ellipses, per word. The signs before a heading do not count."""
    gopher_max_bullet_lines: float | None = 0.9
    gopher_max_ellipsis_lines: float | None = 0.3
    gopher_min_letter_words: float | None = 0.8
    """Share of words with a letter in them."""
    gopher_min_stop_words: int | None = 2
    """Different words out of the eight commonest of the language, where they are known for it."""
    gopher_max_duplicate_lines: float | None = 0.3
    gopher_max_duplicate_paragraphs: float | None = 0.3
    gopher_max_duplicate_line_characters: float | None = 0.2
    gopher_max_duplicate_paragraph_characters: float | None = 0.2
    gopher_max_top_ngrams: tuple[float, ...] | None = (0.20, 0.18, 0.16)
    """Share of characters in the commonest 2, 3 and 4 words in a row."""
    gopher_max_duplicate_ngrams: tuple[float, ...] | None = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Share of characters in repeated 5, 6, 7, 8, 9 and 10 words in a row. Long texts are judged in pieces of 10,000 words, since the share grows
    with the length of a text."""
    c4_min_sentences: int | None = 5
    c4_lorem_ipsum: bool = True
    """Texts with "lorem ipsum" are dropped."""
    c4_max_brace_lines: float | None = 0.1
    """Share of lines with a curly bracket. C4 drops a page at the first one, and so all documentation of programs."""
    fineweb_min_stop_lines: float | None = 0.12
    """Share of lines that end like a sentence. A line that goes on in the next one has no end of its own."""
    fineweb_max_short_lines: float | None = 0.67
    """Share of lines of at most 30 characters."""
    fineweb_max_duplicate_line_characters: float | None = 0.1
    """The threshold of the paper; the program that made FineWeb takes 0.01."""
    fineweb_max_lines_per_word: float | None = 0.3

    # Source code, which none of the rules above but `max_damaged` concerns.
    code_max_line_length: int | None = 1000
    """Characters in the longest line (Codex)."""
    code_max_mean_line_length: float | None = 100.0
    code_min_letters: float | None = 0.25
    """Share of letters (StarCoder)."""

    # Personal data.
    personal_data: bool = False
    """E-mail addresses, telephone numbers and IP addresses are replaced by what they are: "[email]", "[phone]", "[ip]"."""
    secrets: str = "mask"
    """What happens to keys and passwords of programs, which are always counted: "mask" replaces them by "[secret]", "keep" leaves them."""
    private_keys: bool = True
    """Documents with a private key are dropped."""

    # Duplicates.
    newest_version: bool = True
    """Of a page that was fetched several times, as by a crawl that goes on, only the newest version is kept."""
    near_threshold: float | None = 0.8
    """A document is dropped when its Jaccard similarity with one that is kept is at least this (word 5-grams)."""
    max_evaluation_overlap: float | None = 0.0
    """Share of 13 words in a row that also stand in text for evaluation; a document with more is dropped. 0: the first one drops it (GPT-3)."""
    min_quality: float | None = 0.5
    """Score below which a document is dropped, where examples of good text were given."""

    def changed(self, settings: Mapping[str, Any]) -> Rules:
        """These rules with some changed, given as values or as a person writes them ("off", "0.2", "en,fi").

        Raises UserError for an unknown name or a value of another kind.
        """
        return dataclasses.replace(self, **{_known(name): _value(name, value, getattr(Rules, name)) for name, value in settings.items()})

    def without_filters(self) -> Rules:
        """These rules with everything off that drops a document for what its text is like."""
        filters = {name: None for name in _FIELDS if name.startswith(("gopher_", "fineweb_", "c4_m", "code_", "max_damaged"))}
        return dataclasses.replace(self, **filters, c4_lorem_ipsum=False)  # type: ignore[arg-type]

    def digest(self) -> str:
        """16 hexadecimal digits that are equal for equal rules, on any machine."""
        return hashlib.blake2b(json.dumps(dataclasses.asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()


_FIELDS: dict[str, str] = {field.name: str(field.type) for field in dataclasses.fields(Rules)}


def _known(name: str) -> str:
    if name not in _FIELDS:
        near = difflib.get_close_matches(name, _FIELDS, 1)
        hint = f" Did you mean {near[0]}?" if near else f" The rules are: {', '.join(_FIELDS)}."
        raise UserError(f"there is no rule {printable(name)}.{hint}")
    return name


def _value(name: str, value: Any, default: Any) -> Any:
    """The value of a rule from what was given for it."""
    kind = _FIELDS[name]
    text = value.strip() if isinstance(value, str) else value
    lower = text.lower() if isinstance(text, str) else text
    if kind == "bool":
        if lower in (*_ON, True):
            return True
        if lower in (*_OFF, False):
            return False
        raise UserError(f"{name} is on or off, got {printable(str(value))}.")
    if kind == "str":
        if lower in ("mask", "keep"):
            return lower
        raise UserError(f'{name} is "mask" or "keep", got {printable(str(value))}.')
    if kind == "tuple[str, ...]":
        return tuple(each.strip().lower() for each in text.split(",") if each.strip()) if isinstance(text, str) else tuple(text)
    if "None" in kind and (text is None or lower in _OFF):
        return None
    whole = kind.startswith("int")
    try:
        if kind.startswith("tuple"):
            numbers = tuple(float(each) for each in (text.split(",") if isinstance(text, str) else text))
            if len(numbers) != len(default):
                raise UserError(f"{name} takes {len(default)} numbers with commas between them, got {len(numbers)}.")
            return numbers
        number = int(text) if whole else float(text)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        wanted = "a whole number" if whole else f"{len(default)} numbers with commas between them" if kind.startswith("tuple") else "a number"
        raise UserError(f'{name} is {wanted} or "off", got {printable(str(value))}.') from None
    if not 0 <= number < float("inf"):
        raise UserError(f"{name} must not be negative or infinite, got {printable(str(value))}.")
    return number
