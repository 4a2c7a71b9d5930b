"""Words and lines of a text, against plain Python that says the same slowly."""

import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.clean import words as parts
from cllm.data.clean.words import ngrams, split

TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("abcABC äöéßıİ\n\n .!?…'\"#{}-•中文の\u0301ที่ไทย_0٣"), max_size=200)


def words_in(text):
    """The words of a text by what the documentation promises, in small letters."""
    found, open_word, ideograph = [], False, False
    for character in text:
        category = unicodedata.category(character)[0]
        point = ord(character)
        table_kind = int(parts._table()[point]) if point < 0x20000 else (parts._LETTER | parts._IDEOGRAPH if point < 0x323B0 else 0)
        if table_kind & parts._IDEOGRAPH:
            found.append(character)
            open_word = ideograph = True
        elif (category in "LN" and point < 0x20000) or character == "_":
            if open_word and not ideograph:
                found[-1] += character
            else:
                found.append(character)
            open_word, ideograph = True, False
        elif category == "M" and open_word:
            found[-1] += character
        else:
            open_word = ideograph = False
    return [small(word) for word in found]


def small(word):
    return "".join(c.lower() if len(c.lower()) == 1 and unicodedata.category(c) in ("Lu", "Lt") else c for c in word)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_words_are_those_of_plain_python(text):
    cut, slow = split(text), words_in(text)
    assert cut.lengths.tolist() == [len(word) for word in slow]
    alike = {}
    for word, each in zip(slow, cut.hashes.tolist()):
        assert alike.setdefault(word, each) == each
    assert len(set(alike.values())) == len(alike)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_lines_are_those_of_plain_python(text):
    cut = split(text)
    lines = [line.strip() for line in text.split("\n")]
    assert cut.line_lengths.tolist() == [len(line) for line in lines]
    assert [bool(key) for key in cut.lines.tolist()] == [bool(line) for line in lines]
    assert [bool(flag & parts.BRACE_LINE) for flag in cut.line_flags] == [bool(set("{}") & set(line)) for line in lines]
    ends = set(parts._STOPS + parts._QUOTES)
    assert [bool(flag & parts.STOP_LINE) for flag in cut.line_flags] == [line[-1:] in ends and line != "" for line in lines]
    assert cut.counts[parts.CHARACTERS] == len(text)
    assert cut.counts[parts.INK] == sum(not character.isspace() for character in text)
    assert cut.line_words.tolist() == [sum(len(words_in(line)) for line in lines[:i]) for i in range(len(lines) + 1)]


def test_case_punctuation_and_layout_do_not_matter():
    plain, loud = split("Hello, world! It's ÄRGER -- Ångström."), split("hello WORLD\n\n(it s) ärger... ångström")
    assert np.array_equal(plain.hashes, loud.hashes)
    assert not np.array_equal(split("one two").hashes, split("two one").hashes)


def test_scripts_without_spaces_give_a_word_a_letter_with_its_marks():
    assert len(split("中文字符").hashes) == 4
    assert split("中文字符").word_count == 2
    assert split("ที่").lengths.tolist() == [3]  # one consonant, a vowel and a tone above it
    assert split("한국어 문장").lengths.tolist() == [3, 2]  # Korean has spaces


def test_sentences_are_counted_once_each():
    def count(text):
        return int(split(text).counts[parts.SENTENCES])

    assert count("One. Two! Three?") == 3
    assert count("Really?! Yes... \"No.\" 'So!' Version 3.5 of a.b is not two.") == 5
    assert count("一。二\uff01三\uff1f") == 3
    assert count("A line\nwithout any stop") == 0


def test_ngrams_depend_on_their_words_and_on_nothing_else():
    words = split("a b c d e f a b c d e").hashes
    found = ngrams(words, 5)
    assert len(found) == 7
    assert found[0] == found[6]
    assert len(set(found.tolist())) == 6
    assert ngrams(words[:4], 5).tolist() == []
    assert np.array_equal(ngrams(split("x y a b c d e").hashes, 5)[2:], found[:1])


def test_the_hashes_are_the_same_for_ever():
    """They are stored with the duplicates of finished data sets; who changes them counts VERSION up."""
    assert parts.VERSION == 1
    assert [f"{each:016x}" for each in split("Hello 世 wörld").hashes.tolist()] == GOLDEN


GOLDEN = ["e9c562c0fdb23244", "659f38ae50949d3d", "a442e440be484fdb"]
