"""One form for what means the same; code keeps what may be meant."""
# ruff: noqa: RUF001 - letters of other alphabets are meant

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cllm.data.clean.exact import digest
from cllm.data.clean.normalise import normalise
from cllm.data.clean.rules import Rules

from .texts import PROSE

RULES = Rules()
TEXT = st.text(st.characters() | st.sampled_from("\r\n\t \u00a0\u200b\ufeff\x1b\x85\u2028Ã©â€™Рџe\u0301"), max_size=100)


@given(TEXT, st.booleans())
@example("\x1b\x1b[0m[0m", False)
@example("\u0301 \r\x00\n a", False)
@settings(max_examples=500, deadline=None)
def test_normalising_twice_changes_nothing_more(text, is_code):
    once, _ = normalise(text, is_code, RULES)
    again, counts = normalise(once, is_code, RULES)
    if "mojibake" not in counts:  # a text that was garbled twice takes two passes
        assert (again, counts) == (once, {})
    once.encode("utf-8")


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_nothing_is_reported_where_nothing_changed(text):
    done, counts = normalise(text, False, RULES)
    assert counts or done == text.strip("\n") or done == text.rstrip() or text[:1].isspace()


@pytest.mark.parametrize("text", PROSE.values(), ids=PROSE)
def test_good_text_stays_as_it_is(text):
    assert normalise(text, False, RULES) == (text, {})


@pytest.mark.parametrize(
    "right",
    [
        "Der Käse kostet 3 € – „viel zu viel“, sagt Zoë.",
        "L'été à Besançon, c'est l'œuvre d'André.",
        "It’s a “test” — really…",
        "Привет, как дела сегодня?",
    ],
)
def test_text_read_in_a_wrong_charset_is_repaired(right):
    wrong = right.encode().decode("cp1251" if "П" in right else "cp1252", "replace")
    if "\ufffd" in wrong:
        wrong = right.encode().decode("latin-1")
    done, counts = normalise(f"A line before.\n{wrong}\nA line after.", False, RULES)
    assert done == f"A line before.\n{right}\nA line after."
    assert counts["mojibake"] == 1
    assert wrong in normalise(wrong, True, Rules(control_characters=False, white_space=False))[0]  # code may mean it
    assert normalise(wrong, False, RULES.changed({"mojibake": "off"}))[1].get("mojibake") is None


def test_letters_are_composed_in_prose_only():
    apart = unicodedata.normalize("NFD", "Ångström")
    assert normalise(apart, False, RULES) == ("Ångström", {"unicode_form": 1})
    assert normalise(apart, True, RULES)[0] == apart


def test_what_does_not_show_is_removed():
    done, counts = normalise("\ufeffa\u200bb\x00c\x1b[31mred\x1b[0m \u202eevil soft\xadhyphen", False, RULES)
    assert done == "abcred evil softhyphen"
    assert counts["control_characters"] == 7
    kept = "می\u200cخواهم 👨\u200d👩\u200d👧"
    assert normalise(kept, False, RULES)[0] == kept


def test_white_space_is_tidied_and_code_keeps_its_indentation():
    assert normalise("a \r\nb\rc\u2028d\xa0e\n\n\n\nf\t\n", False, RULES)[0] == "a\nb\nc\nd e\n\nf"
    code = "\n    def f():\r\n\t    return 1  \n\n\n\n    x = 2\n"
    assert normalise(code, True, RULES)[0] == "    def f():\n\t    return 1\n\n\n\n    x = 2"
    assert normalise("x = '\xa0'", True, RULES)[0] == "x = '\xa0'"


def test_halves_of_characters_do_not_stop_anything():
    assert normalise("a\ud800b", False, RULES) == ("a\ufffdb", {"surrogates": 1})


def test_switched_off_is_off():
    off = RULES.changed(dict.fromkeys(("mojibake", "unicode_form", "control_characters", "white_space"), False))
    text = "a \r\n\x00e\u0301Ã©\n\n\n\n"
    assert normalise(text, False, off)[0] == text


def test_equal_texts_have_equal_digests_whatever_their_white_space():
    assert digest("a b\n\nc ") == digest(" a  b c")
    assert len(digest("")) == 16
    assert digest("a b") != digest("ab")
    assert digest("a b") != digest("A b")
    assert digest("one text").hex() == "8fae8c29d5ec01638362d4b8a4d06a45"
