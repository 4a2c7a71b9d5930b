"""Folders of old text: files are decoded alike, what was guessed is shown, what the user says is done, and the cache knows what it depends on."""

import json
from pathlib import Path

import pytest

from cllm.data.documents.corpus import describe, load_corpus
from cllm.data.documents.scan import Reading, read
from cllm.data.documents.sides import plan_split
from cllm.runtime.errors import UserError

GERMAN = "Unser Zug f\u00e4hrt um zehn nach f\u00fcnf ab, also m\u00fcssen wir uns beeilen. Drau\u00dfen regnet es heftig auf den B\u00fcrgersteig.\n"
POLISH = "S\u0105siadka ma dwa koty, ale jeden z nich zagin\u0105\u0142. Czy kto\u015b go widzia\u0142? Prosz\u0119 dzwoni\u0107 przed sobot\u0105.\n"


def load(folder: Path, memory: Path, encoding: str = "auto"):
    """(text of each document by name, what was said, how many files were read)"""
    corpus = load_corpus(folder, memory, reading=Reading.of("", "auto", encoding))
    said: list[str] = []
    describe(corpus, plan_split(corpus.rows, 0.0), said.append)
    texts = {each.name: "".join(each.chunks) for file, info in corpus.files for each in read(file, info)}
    return texts, [line.strip() for line in said], corpus.files_read, corpus.digest()


@pytest.fixture
def place(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "memory").mkdir()
    return tmp_path / "data", tmp_path / "memory"


def test_a_guess_is_shown_with_a_piece_of_text_the_first_time_and_from_the_cache(place):
    data, memory = place
    (data / "a.txt").write_bytes(b"heading\n" + GERMAN.encode("cp1252"))
    (data / "b.txt").write_bytes("M\u00fcll".encode("cp1252"))
    (data / "c.txt").write_bytes(POLISH.encode("utf-8"))
    (data / "d.txt").write_bytes(GERMAN.encode("utf-16"))
    texts, said, files_read, digest = load(data, memory)
    assert texts == {"a.txt": "heading\n" + GERMAN, "b.txt": "M\u00fcll", "c.txt": POLISH, "d.txt": GERMAN} and files_read == 4
    assert "decoded d.txt from utf-16" in said
    (guess,) = [line for line in said if "guess" in line]
    assert guess.startswith("decoded 2 files (a.txt, b.txt) from cp1252 (a guess), for example: 'Unser Zug f\u00e4hrt um")
    assert guess.endswith("'. Wrong? Say data.encoding=NAME.")
    again = load(data, memory)
    assert again[2] == 0 and again[3] == digest and again[1][1:] == said[1:]


def test_a_file_that_joins_the_folder_may_change_what_others_are_read_as(place):
    data, memory = place
    (data / "note.txt").write_bytes("Fu\u00df".encode("mac_roman"))
    alone, _, _, before = load(data, memory)
    assert alone["note.txt"] != "Fu\u00df"
    for number in range(3):
        (data / f"{number}.txt").write_bytes(GERMAN.encode("mac_roman"))
    together, _, files_read, after = load(data, memory)
    assert together["note.txt"] == "Fu\u00df" and files_read == 4 and before != after
    fresh = data.parent / "fresh"
    fresh.mkdir()
    assert load(data, fresh)[3] == after, "the cache and a first reading disagree"
    for number in range(3):
        (data / f"{number}.txt").unlink()
    assert load(data, memory)[0] == alone


def test_a_file_that_is_left_out_after_it_was_decoded_stays_a_witness(place):
    data, memory = place
    (data / "a.js").write_bytes(("var a='" + GERMAN.strip() * 60 + "';").encode("mac_roman"))
    (data / "b.txt").write_bytes("sch\u00f6n!".encode("mac_roman"))
    first = load(data, memory)
    assert list(first[0]) == ["b.txt"] and any("minified" in line for line in first[1])
    (data / "c.txt").write_bytes(b"another")
    second = load(data, memory)
    assert second[2] == 1 and second[0]["b.txt"] == first[0]["b.txt"]


def test_what_the_user_says_is_done_for_all_that_is_not_unicode(place):
    data, memory = place
    (data / "a.txt").write_bytes(POLISH.encode("cp852"))
    (data / "b.txt").write_bytes(POLISH.encode("utf-8"))
    (data / "c.jsonl").write_bytes(json.dumps({"text": POLISH}, ensure_ascii=False).encode("cp852"))
    (data / "d.csv").write_bytes(("text\n" + POLISH).encode("cp852"))
    load(data, memory)
    for encoding in ("cp852", "IBM852"):
        texts, said, _, digest = load(data, memory, encoding)
        assert texts == {"a.txt": POLISH, "b.txt": POLISH, "c.jsonl:1": POLISH, "d.csv:2": POLISH.rstrip()}
        assert not any("guess" in line for line in said) and "decoded 3 files (a.txt, c.jsonl, d.csv) from cp852, as data.encoding says" in said
    wrong, _, files_read, other = load(data, memory, "cp1250")
    assert wrong["a.txt"] == POLISH.encode("cp852").decode("cp1250", "replace") and files_read == 4 and other != digest


def test_bytes_that_do_not_fit_are_told(place):
    data, memory = place
    (data / "a.txt").write_bytes(GERMAN.encode("cp1252") * 3)
    texts, said, _, _ = load(data, memory, "utf-8")
    assert "\ufffd" in texts["a.txt"] and "a.txt holds bytes that are not utf-8, each read as U+FFFD" in said
    (data / "a.txt").write_bytes(GERMAN.encode("utf-8") * 9 + b"\xff\n")
    assert "a.txt holds bytes that are not utf-8, each read as U+FFFD" in load(data, memory)[1]
    for number in range(4):
        (data / f"{number}.txt").write_bytes(GERMAN.encode("utf-8") * 9 + b"\xff\n")
    assert "5 files (0.txt, 1.txt, 2.txt, ...) hold bytes that are not utf-8, each read as U+FFFD" in load(data, memory)[1]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (1, "note 0.txt"),
        (2, "2 files (note 0.txt, note 1.txt)"),
        (3, "3 files (note 0.txt, note 1.txt, note 2.txt)"),
        (12, "12 files (note 0.txt, note 1.txt, note 10.txt, ...)"),
    ],
)
@pytest.mark.parametrize("codec", ["cp1252", "utf-16"])
def test_files_in_an_old_charset_are_named(count, shown, codec, place):
    data, memory = place
    for number in range(count):
        (data / f"note {number}.txt").write_bytes(GERMAN.encode(codec))
    (data / "other.txt").write_text(POLISH, "utf-8")
    (line,) = [line for line in load(data, memory)[1] if line.startswith("decoded")]
    assert line.startswith(f"decoded {shown} from {codec}")


def test_the_name_of_a_file_in_an_old_charset_acts_on_no_terminal(place):
    data, memory = place
    (data / "a\x1b[31m\n.txt").write_bytes(GERMAN.encode("cp1252"))
    (line,) = [line for line in load(data, memory)[1] if line.startswith("decoded")]
    assert line.startswith(r"decoded a\x1b[31m\x0a.txt from cp1252")


def test_an_unknown_charset_is_refused_before_anything_is_read(place):
    with pytest.raises(UserError, match=r"data\.encoding must be auto or the name of a charset that Python knows, got 'cp12500'"):
        load(place[0] / "nowhere", place[1], "cp12500")


TEXTS = {
    "cp1252": [
        f"V\u00f6gel fliegen \u00fcber die Stra\u00dfe, w\u00e4hrend {n} B\u00e4ume im Wind rauschen \u2013 f\u00fcr 5 \u20ac, \u201esagt man\u201c."
        for n in range(12)
    ],
    "cp1250": [
        f"Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 ja\u017a\u0144: {n} \u0142\u00f3dek p\u0142ynie, a \u015bwie\u017cy \u015bnieg le\u017cy."
        for n in range(12)
    ],
    "cp1251": [
        f"\u0421\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\u0435 \u0441\u0435\u043c\u044c\u0438 \u043f\u043e\u0445\u043e\u0436\u0438, {n}."
        for n in range(12)
    ],
}
RECORDS = {
    "a.jsonl": lambda texts: "".join(json.dumps({"id": n, "text": text}, ensure_ascii=False) + "\n" for n, text in enumerate(texts)),
    "a.json": lambda texts: json.dumps([{"id": n, "text": text} for n, text in enumerate(texts)], ensure_ascii=False, indent=2),
    "a.csv": lambda texts: "id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts)),
    "b.csv": lambda texts: "id;text\r\n" + "".join(f"{n};{text}\r\n" for n, text in enumerate(texts)),
    "a.tsv": lambda texts: "id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts)),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("codec", TEXTS)
def test_records_in_an_old_charset_come_back_as_they_were_written_alone_and_beside_others(codec, name, place):
    data, memory = place
    (data / name).write_bytes(RECORDS[name](TEXTS[codec]).encode(codec))
    texts, said, _, _ = load(data, memory)
    assert list(texts.values()) == TEXTS[codec]
    assert any(line.startswith(f"decoded {name} from {codec} (a guess), for example: '") for line in said)
    (data / "book.txt").write_bytes("\n".join(TEXTS[codec]).encode(codec))
    (data / "marked.txt").write_bytes(POLISH.encode("utf-8-sig"))
    together, said, files_read, _ = load(data, memory)
    assert files_read == 2 and together == {**texts, "book.txt": "\n".join(TEXTS[codec]), "marked.txt": POLISH}
    names = ", ".join(sorted([name, "book.txt"]))
    assert any(line.startswith(f"decoded 2 files ({names}) from {codec} (a guess)") for line in said)
