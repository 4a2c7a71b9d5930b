"""Whether a document is worth training on, by the rules of Gopher, C4 and FineWeb, and why not.

The rules and their sources are those of `Rules`. They know the language: the stop words of English say nothing about Finnish, Chinese has no spaces
between words, and Thai no full stops.
"""
# ruff: noqa: RUF001 - letters of other alphabets are meant

import functools
from typing import Any

import numpy as np

from cllm.data.clean import words as parts
from cllm.data.clean.measures import measure, word_hashes
from cllm.data.clean.rules import Rules
from cllm.data.clean.words import Words

# The eight of English are Gopher's; the others are the commonest short words of their languages, found in any page of prose.
STOP_WORDS = {
    "en": "the be to of and that have with",
    "de": "der die und in den von zu das mit sich auf für ist nicht ein eine",
    "fr": "de la le et les des en un du une que est pour qui dans",
    "es": "de la que el en y a los se del las un por con una",
    "it": "di e il la che in a per un è del non con sono una",
    "pt": "de a o que e do da em um para com não uma os no",
    "nl": "de van het een en in is dat op te zijn met voor niet",
    "sv": "och i att det som en på är av för med till den har inte",
    "da": "og i at det en den til er som på de med af for ikke",
    "no": "og i det på som er en til å av for at med de ikke",
    "nb": "og i det på som er en til å av for at med de ikke",
    "fi": "ja on ei että se oli hän mutta joka kun niin ovat myös tai",
    "pl": "i w na z się nie do to że jest o po jak od za",
    "cs": "a se v na je že o s z do i to k ve pro",
    "ru": "и в не на что с по как это а к из у за от",
    "uk": "і в на не що з до та як у за від це про є",
    "tr": "ve bir bu da de için ile olarak çok daha gibi en olan ne",
    "id": "yang dan di dengan untuk dari ini pada tidak dalam itu adalah ke akan",
}
_WITHOUT_STOPS = frozenset({"th", "lo", "km", "my", "bo", "dz"})  # languages whose sentences end by a space

SCORES = (
    "words", "sentences", "word_length", "letter_words", "stop_words", "bullet_lines", "ellipsis_lines", "stop_lines", "short_lines",
    "brace_lines", "lines_per_word", "duplicate_lines", "duplicate_line_characters", "duplicate_paragraphs", "duplicate_paragraph_characters",
    "top_2", "top_3", "top_4", "duplicate_5", "duplicate_6", "duplicate_7", "duplicate_8", "duplicate_9", "duplicate_10",
)  # fmt: skip


def judge(text: str, language: str, is_code: bool, rules: Rules, words: Words | None = None) -> tuple[str, dict[str, float]]:
    """Why a normalised text is dropped ("" where it is kept), and what was measured in it.

    `language`: a code of two letters, or "" or "unknown" where it is not known. `words`: those of the text, where they were cut already.
    A reason begins with the name of its rule: "gopher_min_words: 31 words, fewer than 50".
    """
    words = parts.split(text) if words is None else words
    counts = words.counts
    if not counts[parts.INK]:
        return "empty: no text", {}
    found = measure(words, _stop_words(language))
    scores: dict[str, float] = {"words": words.word_count, "sentences": int(counts[parts.SENTENCES])}
    scores |= {name: round(getattr(found, name), 4) for name in SCORES[2:]}

    def share(name: str, value: float, what: str, least: bool = False) -> str:
        bound = getattr(rules, name)
        if bound is None or (value >= bound if least else value <= bound):
            return ""
        return f"{name}: {_percent(value)} {what}, {'less' if least else 'more'} than {_percent(bound)}"

    def number(name: str, value: float, what: str, least: bool = False) -> str:
        bound = getattr(rules, name)
        if bound is None or (value >= bound if least else value <= bound):
            return ""
        return f"{name}: {value:,.4g} {what}, {'fewer' if least else 'more'} than {bound:,.4g}"

    damaged = share("max_damaged", counts[parts.DAMAGED] / counts[parts.INK], "of the characters could not be read")
    if is_code:
        reason = (
            damaged
            or number("code_max_line_length", found.longest_line, "characters in a line")
            or number("code_max_mean_line_length", found.mean_line, "characters in the mean line")
            or share("code_min_letters", counts[parts.LETTERS] / counts[parts.CHARACTERS], "letters", least=True)
        )
        return reason, scores

    num_words = max(words.word_count, 1)
    spaced = 2 * words.ideographs <= len(words.hashes)
    has_stops = language not in _WITHOUT_STOPS
    reason = (
        damaged
        or number("gopher_min_words", words.word_count, "words", least=True)
        or number("gopher_max_words", words.word_count, "words")
        or (spaced and number("gopher_min_word_length", found.word_length, "characters in the mean word", least=True))
        or (spaced and number("gopher_max_word_length", found.word_length, "characters in the mean word"))
        or number("gopher_max_symbols", counts[parts.NUMBER_SIGNS] / num_words, "number signs per word")
        or number("gopher_max_symbols", counts[parts.ELLIPSES] / num_words, "ellipses per word")
        or share("gopher_max_bullet_lines", found.bullet_lines, "of the lines begin with a bullet")
        or share("gopher_max_ellipsis_lines", found.ellipsis_lines, "of the lines end with an ellipsis")
        or share("gopher_min_letter_words", found.letter_words, "of the words have a letter", least=True)
        or (language in STOP_WORDS and number("gopher_min_stop_words", found.stop_words, f"stop words of {language}", least=True))
        or share("gopher_max_duplicate_paragraphs", found.duplicate_paragraphs, "of the paragraphs are repeated")
        or share("gopher_max_duplicate_paragraph_characters", found.duplicate_paragraph_characters, "of the text is repeated paragraphs")
        or share("gopher_max_duplicate_lines", found.duplicate_lines, "of the lines are repeated")
        or share("gopher_max_duplicate_line_characters", found.duplicate_line_characters, "of the text is repeated lines")
        or _ngrams("gopher_max_top_ngrams", found[15:18], 2, "of the text is one phrase of {} words", rules)
        or _ngrams("gopher_max_duplicate_ngrams", found[18:24], 5, "of the text is repeated phrases of {} words", rules)
        or (has_stops and number("c4_min_sentences", counts[parts.SENTENCES], "sentences", least=True))
        or (rules.c4_lorem_ipsum and "lorem ipsum" in text.lower() and 'c4_lorem_ipsum: holds "lorem ipsum"')
        or share("c4_max_brace_lines", found.brace_lines, "of the lines hold a curly bracket")
        or (has_stops and share("fineweb_min_stop_lines", found.stop_lines, "of the lines end like a sentence", least=True))
        or share("fineweb_max_short_lines", found.short_lines, "of the lines are short")
        or share("fineweb_max_duplicate_line_characters", found.duplicate_line_characters, "of the text is repeated lines")
        or number("fineweb_max_lines_per_word", found.lines_per_word, "lines per word")
    )
    return reason or "", scores


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _ngrams(name: str, values: Any, first: int, what: str, rules: Rules) -> str:
    for n, value, bound in zip(range(first, first + len(values)), values, getattr(rules, name) or ()):
        if value > bound:
            return f"{name}: {_percent(value)} {what.format(n)}, more than {_percent(bound)}"
    return ""


@functools.cache
def _stop_words(language: str) -> np.ndarray:
    return word_hashes(*STOP_WORDS.get(language, "").split())
