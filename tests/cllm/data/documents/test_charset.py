"""Charsets: text comes back as it was written, whatever it was written in; what is no text is left out; nothing ever raises."""

import io
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.documents import guess
from cllm.data.documents.charset import AUTO, Binary, check_encoding, decode, detect, examine, example
from cllm.data.documents.guess import Evidence
from cllm.runtime.errors import UserError

# One sentence or more in each language; none of them stands in languages.txt.
SENTENCES = dict(line.split("\t") for line in (Path(__file__).parent / "sentences.txt").read_text("utf-8").splitlines())
WRITTEN_IN = {
    "cp1252": "en de fr es pt it nl da nb sv fi is ca gl eu ga sq", "cp1250": "pl cs sk hu ro hr sl sq de", "cp1251": "ru uk be bg sr mk",
    "cp1253": "el", "cp1254": "tr", "cp1255": "he", "cp1256": "ar fa", "cp1257": "lt lv et", "cp1258": "vi", "cp874": "th",
    "cp932": "ja", "gb18030": "zh zht", "big5": "zht", "euc_kr": "ko",
    "iso8859_15": "de fr fi es", "iso8859_2": "pl cs hu hr", "iso8859_3": "mt eo", "iso8859_4": "lt lv", "iso8859_5": "ru uk sr", "iso8859_6": "ar",
    "iso8859_7": "el", "iso8859_8": "he", "iso8859_9": "tr", "iso8859_10": "is", "iso8859_13": "lt lv", "iso8859_14": "ga cy",
    "koi8_r": "ru bg", "koi8_u": "uk", "cp866": "ru bg", "cp855": "ru sr", "mac_cyrillic": "ru bg", "cp737": "el", "cp857": "tr", "cp862": "he",
    "cp775": "lt lv et", "cp437": "de fr es it sv fi", "cp850": "de fr es it pt nl da nb sv", "cp852": "pl cs sk hu ro hr sl", "cp861": "is",
    "mac_roman": "de fr es it pt nl da sv fi", "mac_latin2": "pl cs hu", "euc_jp": "ja", "gb2312": "zh", "johab": "ko",
    "iso2022_jp": "ja", "iso2022_kr": "ko", "hz": "zh", "utf-8": "de ru ja zh ko ar th", "utf-8-sig": "de", "utf-16": "de ja", "utf-32": "de ja",
    "utf-16-le": "en de ru ja zh zht ko ar he el th vi", "utf-16-be": "en de ru ja zh zht ko ar he el th vi",
    "utf-32-le": "en de ja zh", "utf-32-be": "en de ja zh",
}  # fmt: skip
WINDOWS = [charset for charset in WRITTEN_IN if charset.startswith(("cp125", "cp874", "cp932", "gb18030", "big5", "euc_kr"))]
TONES = "\u0300\u0301\u0303\u0309\u0323"


def tone_apart(character):
    parts = unicodedata.normalize("NFD", character)
    return unicodedata.normalize("NFC", "".join(p for p in parts if p not in TONES)) + "".join(p for p in parts if p in TONES)


def sentence(language, charset):
    """The sentence as people wrote it in that charset, with its plain quotation marks and dashes."""
    text = SENTENCES[language]
    if charset == "cp1258":
        return "".join(map(tone_apart, text))
    if not charset.startswith("utf") and charset != "cp1252":
        for character, plain in {"\u2019": "'", "\u2013": "-", "\u0153": "oe" if charset != "mac_roman" else "\u0153"}.items():
            text = text.replace(character, plain)
    return text


def decoded(content, encoding=AUTO):
    found = decode(content, encoding)
    return found if isinstance(found, Binary) else found[0]


def charset_of(content):
    return detect(io.BytesIO(content))


@pytest.mark.parametrize("charset", WRITTEN_IN)
def test_a_sentence_comes_back_from_its_charset(charset):
    for language in WRITTEN_IN[charset].split():
        text = sentence(language, charset)
        assert decoded(text.encode(charset)) == text, language


def test_forty_bytes_are_enough_for_the_usual_charsets():
    right = []
    for charset in WINDOWS:
        for language in WRITTEN_IN[charset].split():
            text = sentence(language, charset)
            for start in (0, len(text) // 2):
                piece = text[start:]
                while len(piece.encode(charset)) > 40:
                    piece = piece[:-1]
                right.append(decoded(piece.encode(charset)) == piece)
    assert len(right) > 80 and np.mean(right) >= 0.98


@pytest.mark.parametrize("text", ["Stra\u00dfe", "caf\u00e9", "\u00dcber uns", "Gr\u00f6\u00dfe: 5", "ma\u00f1ana", "p\u00e8re et m\u00e8re"])
def test_single_words_are_taken_for_windows_text(text):
    assert decoded(text.encode("cp1252")) == text


HELLO = (
    "\u4f60\u597d\u4e16\u754c",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "Hello",
    "\u3053\u3093\u306b\u3061\u306f",
    "\uc548\ub155\ud558\uc138\uc694",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
)


@pytest.mark.parametrize("text", HELLO)
def test_utf16_of_any_length_needs_no_mark_and_no_line_end(text):
    for charset in ("utf-16-le", "utf-16-be"):
        for count in (1, 3, 2000):
            assert decoded((text * count).encode(charset)) == text * count, (charset, count)


def test_lines_of_ascii_in_pairs_are_not_utf16():
    for text in ("Bush hid the facts", "this app can break", "hhhh hhh hhh hhhhh", "AB" * 40, "0123456789abcdef" * 100):
        assert charset_of(text.encode())[:2] == ("utf-8", "strict")


def test_escape_sequences_of_terminals_and_tildes_are_no_charset():
    for content in (b"\x1b[1mbold\x1b(B\x1b[m and so on\n" * 5, b"see~{\\em x}~and~{y}\n" * 5, b"echo ~{a,b}\n"):
        assert decoded(content) == content.decode()


def test_text_that_is_mostly_utf8_stays_utf8():
    russian = SENTENCES["ru"] * 3
    content = russian.encode() + b" \xff\xfe broken \xc3"
    assert decoded(content).startswith(russian) and charset_of(content).codec == "utf-8"
    assert not charset_of(content).guess


def test_a_charset_in_the_middle_of_much_ascii_is_found():
    line, german = "plain text in English, line after line\n", sentence("de", "cp1252") + "\n"
    for before, after in ((3000, 3000), (60000, 0)):
        text = line * before + german + line * after
        assert decoded(text.encode("cp1252")) == text
    one_line = (line * 4000).replace("\n", " ") + german
    assert decoded(one_line.encode("cp1252")) == one_line


# -- text and what is none -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [b"\0", b"\0\0\0", b"\x01", b"\x02\x03\x7f", b"\0" * 4096], ids=["zero", "zeros", "control", "controls", "padded by a crash"]
)
@pytest.mark.parametrize("charset", ["ascii", "utf-8", "cp1252", "gb18030"])
def test_a_few_zero_bytes_or_controls_do_not_drop_a_text(damage, charset):
    text = {"ascii": "It was a dark and stormy night.\n", "gb18030": SENTENCES["zh"] + "\n"}.get(charset, SENTENCES["de"] + "\n") * 200
    content = text.encode(charset)
    half = content.index(b"\n", len(content) // 2) + 1
    for place in (0, half, len(content)):
        assert decoded(content[:place] + damage + content[place:]) == content[:place].decode(charset) + damage.decode() + content[place:].decode(
            charset
        )


def test_a_short_note_with_a_zero_byte_at_its_end_is_a_note():
    assert decoded(b"remember the milk\0") == "remember the milk\0"


@pytest.mark.parametrize("seed", range(3))
def test_numbers_and_noise_are_no_text(seed):
    generator = np.random.default_rng(seed)
    for size in (40, 400, 20000):
        noise = generator.integers(0, 256, size, dtype=np.uint8)
        arrays = [
            generator.integers(0, 30000, size),
            generator.zipf(1.3, size) % 30000,
            generator.normal(0, 3000, size),
            generator.integers(0, 9, size),
        ]
        kinds = [np.int16, np.int32, np.float32, np.float64]
        for content in [noise.tobytes(), (noise | 128).tobytes(), *(each.astype(kind).tobytes() for each in arrays for kind in kinds)]:
            assert isinstance(charset_of(content), Binary)


def test_a_script_with_a_program_after_it_and_strings_with_zeros_between_are_no_text():
    noise = random.Random(0).randbytes(60000)
    assert isinstance(charset_of(b"#!/bin/sh\necho unpacking\nexit 0\n" * 2000 + noise), Binary)
    assert isinstance(charset_of(b"one\0two\0three\0" * 200), Binary)


# -- said by the user ----------------------------------------------------------------------------------------------------------------------


def test_an_encoding_that_was_said_decides_where_unicode_does_not():
    polish = SENTENCES["pl"]
    assert decoded(polish.encode("cp1250"), "cp852") == polish.encode("cp1250").decode("cp852")
    assert decoded(polish.encode("utf-8"), "cp1250") == polish
    assert decoded(polish.encode("utf-16"), "cp1250") == polish
    assert decoded(b"plain", "utf-16-le") == "plain"
    assert decoded("\u00e4 text".encode("utf-7"), "utf-7") == "\u00e4 text"
    assert decoded("REPORT OF\x85THE YEAR".encode("cp037"), "cp037") == "REPORT OF\x85THE YEAR"
    assert not detect(io.BytesIO(polish.encode("cp1250")), "cp1250").guess
    assert isinstance(detect(io.BytesIO(bytes(range(32)) * 40), "cp1250"), Binary)


def test_the_name_of_an_encoding_is_checked():
    assert check_encoding("Windows-1250") == "cp1250" and check_encoding("Auto") == AUTO
    for name in ("cp9999", "rot13", "hex", "", "a\0b"):
        with pytest.raises(UserError, match=r"data\.encoding must be auto or the name of a charset"):
            check_encoding(name)


def test_a_guess_is_shown_by_a_piece_of_text():
    content = b"a heading\n" + ("x" * 200 + " " + sentence("de", "cp1252") + "\n").encode("cp1252")
    charset = charset_of(content)
    shown = example(io.BytesIO(content), charset)
    assert charset.guess and "f\u00e4hrt" in shown and len(shown) < 80 and shown.startswith("... ") and shown.endswith(" ...")


@pytest.mark.parametrize(("language", "codec"), [("de", "cp1252"), ("fi", "cp1252"), ("pl", "cp1250"), ("ru", "cp1251"), ("el", "cp1253")])
@pytest.mark.parametrize("every", [2, 3, 7])
def test_lines_in_utf8_among_lines_in_another_charset(language, codec, every):
    lines = [f"{number} {sentence(language, codec)}" for number in range(14)]
    content = b"\n".join(line.encode("utf-8" if number % every else codec) for number, line in enumerate(lines))
    text, charset = decode(content)
    assert text == "\n".join(lines) and charset.guess
    assert charset.codec == f"utf-8+{codec}"
    read = io.TextIOWrapper(io.BytesIO(content), encoding=charset.codec, errors="replace")
    read._CHUNK_SIZE = 7  # characters are cut by the blocks
    assert read.read() == text
    assert example(io.BytesIO(content), charset).strip(" .") in lines[0]


# -- folders -------------------------------------------------------------------------------------------------------------------------------


def evidence_of(files):
    found = {name: examine([content]) for name, content in files.items()}
    return {name: each for name, each in found.items() if isinstance(each, Evidence)}


NOTES = ("\u00dcberall M\u00fcll", "Stra\u00dfe 5", "K\u00e4se, \u00d6l", "f\u00fcr Jan", "sch\u00f6n!", "Gr\u00fc\u00dfe", "Fu\u00dfball 19 Uhr")


@pytest.mark.parametrize("charset", ["cp1252", "cp850", "mac_roman"])
def test_short_notes_follow_their_folder(charset):
    texts = {f"{number}.txt": note for number, note in enumerate(NOTES)} | {"long.txt": SENTENCES["de"]}
    chosen = guess.pool(evidence_of({name: text.encode(charset) for name, text in texts.items()}))
    for name, text in texts.items():
        assert text.encode(charset).decode(chosen[name]) == text, name


def test_folders_of_other_languages_keep_their_own_charsets():
    folders = {"de": "cp1252", "cs": "cp1250", "ru": "koi8_r", "el": "cp1253", "deep/er/tr": "cp1254", "fr": "mac_roman"}
    texts = {}
    for folder in folders:
        words = SENTENCES[folder.rpartition("/")[2]].split(" ")
        notes = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
        texts |= {f"{folder}/{number}.txt": note for number, note in enumerate(notes) if not note.isascii()}
        texts[f"{folder}/whole.txt"] = " ".join(words)
    texts = {name: text.replace("\u0153", "oe") for name, text in texts.items()}
    contents = {name: text.encode(folders[name.rpartition("/")[0]]) for name, text in texts.items()}
    evidence = evidence_of(contents)
    chosen = guess.pool(evidence)
    wrong = [name for name in evidence if contents[name].decode(chosen[name], "replace") != texts[name]]
    assert len(evidence) > 40 and not wrong
    shuffled = list(evidence)
    random.Random(0).shuffle(shuffled)
    assert guess.pool({name: evidence[name] for name in shuffled}) == chosen
    again = {name: Evidence.from_dict(json.loads(json.dumps(each.to_dict()))) for name, each in evidence.items()}
    assert again == evidence


def test_a_folder_does_not_overrule_a_file_that_is_plainly_otherwise():
    files = {f"{number}.txt": SENTENCES["de"].encode("cp1252") for number in range(50)}
    files |= {"ru.txt": b"\xcf\xf0\xe8\xe2\xe5\xf2, \xec\xe8\xf0", "pl.txt": SENTENCES["pl"].encode("cp1250")}
    chosen = guess.pool(evidence_of(files))
    assert chosen["ru.txt"] == "cp1251" and files["pl.txt"].decode(chosen["pl.txt"]) == SENTENCES["pl"]


# -- properties ----------------------------------------------------------------------------------------------------------------------------

TEXT = st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufeff"), min_size=1, max_size=80)


@given(TEXT, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_unicode_comes_back_exactly(text, charset):
    assert decoded(text.encode(charset)) == text


@given(st.lists(st.sampled_from(sorted(SENTENCES)), min_size=1, max_size=4), st.sampled_from(["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_wide_charsets_without_a_mark_come_back_exactly(names, charset):
    text = "\n".join(SENTENCES[name] for name in names)
    assert decoded(text.encode(charset)) == text


PARTS = [b"\0", b"\x1b$B", b"\x1b(B", b"~{", b"~}", b"\xff\xfe", b"a", b"\xe4", b"\n", b"\x81", b"\r"]


@given(st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(PARTS), max_size=40).map(b"".join)))
@with_example(b"\x00\x00\x00\x00\n\x80\r\n")  # a block that ends inside a line break
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_bytes_are_decided_on_the_same_way_in_blocks_of_any_size(content):
    found = examine([content])
    assert examine([content[i : i + 7] for i in range(0, len(content), 7)]) == found
    if isinstance(found, Evidence):
        content.decode(found.alone(), "replace")
    elif not isinstance(found, Binary):
        content.decode(found.codec, "replace")
