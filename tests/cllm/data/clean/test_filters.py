"""What the filters drop and keep, each rule by a document that breaks this rule alone."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.clean import measures
from cllm.data.clean.filters import SCORES, judge
from cllm.data.clean.measures import Measures, measure
from cllm.data.clean.rules import Rules
from cllm.data.clean.words import split
from cllm.runtime.errors import UserError

from .texts import ENGLISH, PROSE

RULES = Rules()


def lines_of(num, seed=0, words=12, end="."):
    """Lines of different words, so that nothing is repeated."""
    draw = random.Random(seed)
    make = lambda: "".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(3, 8)))  # noqa: E731
    return [" ".join(["the", "and", *(make() for _ in range(words))]) + end for _ in range(num)]


@pytest.mark.parametrize("language", PROSE)
@pytest.mark.parametrize("told", ["", "unknown", "itself"])
def test_good_prose_of_any_language_is_kept(language, told):
    reason, scores = judge(PROSE[language], language if told == "itself" else told, False, RULES)
    assert reason == ""
    assert set(scores) == set(SCORES)


def test_wrapped_text_and_lists_of_a_manual_are_kept():
    import textwrap

    text = (
        "# A heading\n\n" + textwrap.fill(ENGLISH[:306], 72) + "\n\n- a first point of a list\n- a second one\n\n" + textwrap.fill(ENGLISH[306:], 72)
    )
    assert judge(text, "en", False, RULES)[0] == ""


NUMBERS = " ".join(str(each) for each in range(1000, 1200))
BROKEN = {
    "empty": " \n",
    "max_damaged": ENGLISH.replace("e", "\ufffd"),
    "gopher_min_words": "The end of it. And so? That is all! Be well. To bed.",
    "gopher_min_word_length": " ".join(f"{a}{b} the to." for a in "abcdefgh" for b in "qrstuvwxyz"),
    "gopher_max_word_length": " ".join(line.replace(" ", "") + " the and. " for line in lines_of(30)),
    "gopher_max_symbols": "\n".join(line.replace(" ", " #", 4) for line in lines_of(20)),
    "gopher_max_bullet_lines": "\n".join("• " + line for line in lines_of(20)),
    "gopher_max_ellipsis_lines": "\n".join(lines_of(20, end="...")),
    "gopher_min_letter_words": "\n".join(lines_of(6)) + " " + NUMBERS,
    "gopher_min_stop_words": "\n".join(line.replace("the and ", "") for line in lines_of(20)),
    "gopher_max_duplicate_paragraphs": "\n\n".join(lines_of(6) + lines_of(6, 1)[:1] * 5),
    "gopher_max_duplicate_lines": "\n\n".join(f"{a}\nThe same line." for a in lines_of(20, words=40)),
    "gopher_max_top_ngrams": "\n".join(line + " buy cheap watches" * 4 + "." for line in lines_of(12)),
    "gopher_max_duplicate_ngrams": "\n".join(
        line + f" {i} and then all of us went home to our own little house again." for i, line in enumerate(lines_of(6, words=20))
    ),
    "c4_min_sentences": "\n".join(lines_of(4)),
    "c4_lorem_ipsum": "\n".join(lines_of(9)) + "\nLorem ipsum dolor sit amet.",
    "c4_max_brace_lines": "\n".join(line.replace(".", " {}.") for line in lines_of(20)),
    "fineweb_min_stop_lines": "\n\n".join(lines_of(60, end="") + lines_of(6, 1)),
    "fineweb_max_short_lines": "\n".join(["The and so it is."] + lines_of(6) + [line[:25] + "." for line in lines_of(20, 2)]),
    "fineweb_max_duplicate_line_characters": "\n".join(a[8:] + "\n" + b for a, b in zip(lines_of(20), lines_of(10, 1, 3) * 2)),
    "fineweb_max_lines_per_word": "\n\n\n\n\n".join(lines_of(9, words=10)),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_drops_what_breaks_it_and_switched_off_lets_it_pass(rule):
    reason, _ = judge(BROKEN[rule], "en", False, RULES)
    assert reason.startswith(f"{rule}: ")
    if rule != "empty":
        assert not judge(BROKEN[rule], "en", False, RULES.changed({rule: "off"}))[0].startswith(rule)


def test_stop_words_of_english_are_asked_of_english_alone():
    text = BROKEN["gopher_min_stop_words"]
    assert judge(text, "en", False, RULES)[0]
    assert judge(text, "xx", False, RULES)[0] == judge(text, "unknown", False, RULES)[0] == ""


def test_code_is_judged_by_the_rules_for_code():
    code = "def f(x):\n    return {x: 1}\n"
    assert judge(code, "", True, RULES)[0] == ""
    assert judge("x = [" + "1, " * 500 + "]", "", True, RULES)[0].startswith("code_max_line_length")
    assert judge(("x" * 150 + "\n") * 5, "", True, RULES)[0].startswith("code_max_mean_line_length")
    assert judge("1, 2, 3\n" * 20, "", True, RULES)[0].startswith("code_min_letters")


def test_no_filters_means_none():
    off = RULES.without_filters()
    assert [judge(text, "en", False, off)[0] for rule, text in BROKEN.items() if rule != "empty"] == [""] * (len(BROKEN) - 1)


def slow_shares(words, scale):
    """Repeated n-grams as the papers define them, in plain Python; words of one length."""
    found = []
    for n in range(2, 5):
        grams = [tuple(words[i : i + n * scale]) for i in range(len(words) - n * scale + 1)]
        most = max(map(grams.count, grams), default=0)
        found.append(most * n * scale / len(words) if most > 1 else 0)
    for n in range(5, 11):
        seen, i, repeated = set(), 0, 0
        while i <= len(words) - n * scale:
            gram = tuple(words[i : i + n * scale])
            repeated += n * scale if gram in seen else 0
            i += n * scale if gram in seen else 1
            seen.add(gram)
        found.append(repeated / len(words))
    return found


@given(st.lists(st.sampled_from(["abc", "def", "ghi"]), min_size=1, max_size=80))
@settings(max_examples=150, deadline=None)
def test_repetition_is_what_plain_python_counts(words):
    measured = measure(split(" ".join(words)), measures.word_hashes())
    assert measured[Measures._fields.index("top_2") :] == pytest.approx(slow_shares(words, 1))
    text = "".join({"abc": "甲", "def": "乙", "ghi": "丙"}[word] for word in words)
    assert measure(split(text), measures.word_hashes())[15:] == pytest.approx(slow_shares(words, 2))  # two ideographs are a word


@given(st.text(max_size=300), st.sampled_from(["", "en", "zh", "th"]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_text_is_judged(text, language, is_code):
    reason, scores = judge(text, language, is_code, RULES)
    assert isinstance(reason, str)
    assert all(0 <= scores[name] <= 1.0001 for name in scores if name.startswith(("top", "duplicate", "stop_lines", "short")))


def test_a_long_text_is_judged_in_pieces():
    """A phrase once in each 10,000 words is no repetition, however long the book."""
    book = "\n".join(line for i in range(12) for line in [*lines_of(900, i), "In those days it came to pass that the king spoke unto all."])
    measured = measure(split(book), measures.word_hashes())
    assert measured.duplicate_10 == 0
    assert judge(book, "en", False, RULES)[0] == ""


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gopher_min_word": 3}, "Did you mean gopher_min_words?"),
        ({"zzz": 3}, "The rules are: mojibake"),
        ({"gopher_min_words": "many"}, "a whole number"),
        ({"gopher_min_words": -1}, "negative"),
        ({"near_threshold": "nan"}, "negative or infinite"),
        ({"gopher_max_top_ngrams": "0.1"}, "3 numbers"),
        ({"mojibake": "perhaps"}, "on or off"),
        ({"secrets": "show"}, '"mask" or "keep"'),
    ],
)
def test_a_wrong_setting_says_what_is_wrong(settings, words):
    with pytest.raises(UserError, match=re.escape(words)):
        RULES.changed(settings)


def test_settings_are_taken_as_a_person_writes_them():
    changed = RULES.changed(
        {"gopher_min_words": "20", "gopher_max_symbols": "off", "languages": "en, FI", "gopher_max_top_ngrams": "0.1,0.2,0.3", "personal_data": "on"}
    )
    assert (changed.gopher_min_words, changed.gopher_max_symbols, changed.languages) == (20, None, ("en", "fi"))
    assert changed.gopher_max_top_ngrams == (0.1, 0.2, 0.3)
    assert changed.personal_data is True
    assert changed.digest() != RULES.digest() == Rules().digest()
