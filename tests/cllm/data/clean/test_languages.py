"""Languages are told apart as py3langid tells them, only faster; code and short texts are not asked about."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.clean.languages import UNKNOWN, language_of

from .texts import PROSE

langid = pytest.importorskip("py3langid.langid", reason="needs cllm[data]")


@pytest.fixture(scope="module")
def theirs():
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@pytest.mark.parametrize("language", PROSE)
def test_prose_is_recognised(language, theirs):
    code, probability = language_of(PROSE[language])
    assert code == language
    assert probability == pytest.approx(theirs.classify(PROSE[language])[1], abs=5e-3)


@given(st.text(st.characters(categories=["L", "Zs"], codec="utf-8"), min_size=220, max_size=400))
@settings(max_examples=50, deadline=None)
def test_any_text_gets_what_the_library_says(theirs, text):
    text = unicodedata.normalize("NFC", text)  # which normalising has done before, and the library does itself
    code, probability = language_of(text, 400)
    assert code == UNKNOWN or probability == pytest.approx(theirs.classify(text)[1], abs=5e-3)
    if probability > 0.55:
        assert code == theirs.classify(text)[0]


def test_short_texts_are_of_unknown_language():
    assert language_of("A few words of English.") == (UNKNOWN, 0.0)
    assert language_of("1 2 3 " * 200) == (UNKNOWN, 0.0)


def test_a_long_text_is_judged_by_all_of_it():
    mixed = PROSE["en"] * 20 + PROSE["de"] * 60
    assert language_of(mixed)[0] == "de"
