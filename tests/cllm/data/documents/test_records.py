"""Records: whatever layout and charset a program wrote them in, they are read back equal; what is damaged is passed over and counted."""

import csv
import io
import json
import string

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from cllm.data.documents import json_records, record_text, records
from cllm.data.documents.charset import Binary
from cllm.data.documents.chat_forms import is_message
from cllm.data.documents.json_records import clean
from cllm.data.documents.record_text import charset_of
from cllm.data.documents.records import Records

quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

WORDS = st.text(st.sampled_from(string.ascii_letters + "  .,;:'\"\\/\n\t{}[]\u00e9\u00fc\u0416\u4e2d\u6587\U0001f600"), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=4)
OBJECTS = st.dictionaries(WORDS, VALUES, min_size=1, max_size=3)

LAYOUTS = {
    "lines": lambda values, write: "".join(write(value) + "\n" for value in values),
    "lines without the last newline": lambda values, write: "\n".join(map(write, values)),
    "blank lines between": lambda values, write: "\n\n".join(map(write, values)),
    "Windows lines": lambda values, write: "\r\n".join(map(write, values)),
    "no line ends": lambda values, write: "".join(map(write, values)),
    "pretty": lambda values, write: "\n".join(write(value, indent=2) for value in values),
    "pretty with tabs": lambda values, write: "\n".join(write(value, indent="\t") for value in values) + "\n",
    "pretty with commas": lambda values, write: ",\n".join(write(value, indent=4) for value in values),
    "array": lambda values, write: write(values),
    "indented array": lambda values, write: write(values, indent=2) + "\n",
    "array with a record on each line": lambda values, write: "[\n" + ",\n".join(map(write, values)) + "\n]\n",
    "array in an object": lambda values, write: write({"version": 1, "data": values, "more": None}),
    "indented array in an object": lambda values, write: write({"meta": {"n": [1]}, "records": values}, indent=1),
}  # fmt: skip


def write(value, indent=None):
    return json.dumps(value, ensure_ascii=False, indent=indent)


def read(path, content):
    path.write_bytes(content)
    with open(path, "rb") as file:
        charset = charset_of(file)
    assert not isinstance(charset, Binary), charset
    problems = []
    found = list(Records(path, charset).read(lambda reason, place: problems.append((place, reason))))
    return [value for _, value in found], problems, [place for place, _ in found]


@pytest.fixture
def small_blocks(monkeypatch):
    """So that records lie across the blocks in which a file is read, and the layout is told from a part of it."""
    monkeypatch.setattr(json_records, "_BLOCK", 16)
    monkeypatch.setattr(record_text, "_BLOCK", 16)
    monkeypatch.setattr(records, "HEAD_CHARS", 500)


@quick
@given(
    layout=st.sampled_from([*LAYOUTS]),
    values=st.lists(OBJECTS, min_size=2, max_size=4),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_any_records_in_any_layout_are_read_back_equal(layout, values, encoding, tmp_path, small_blocks):
    assume(not any(is_message(value) for value in values))
    assume(all(len(write(value, indent=4)) < 300 for value in values))
    content = LAYOUTS[layout](values, write).encode(encoding)
    found, problems, _ = read(tmp_path / "a.json", content)
    assert found == values and problems == []


CHINESE = [{"text": f"\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u3002 {n}", "n": n} for n in range(30)]
HAPPY = (
    "\u0412\u0441\u0435 \u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\u0435 \u0441\u0435\u043c\u044c\u0438 "
    "\u043f\u043e\u0445\u043e\u0436\u0438 \u0434\u0440\u0443\u0433 \u043d\u0430 \u0434\u0440\u0443\u0433\u0430"
)
RUSSIAN = [{"text": f"{HAPPY}, {n}.", "n": n} for n in range(30)]
GERMAN = [{"text": f"V\u00f6gel fliegen \u00fcber die Stra\u00dfe, w\u00e4hrend {n} B\u00e4ume im Wind rauschen.", "n": n} for n in range(30)]


@pytest.mark.parametrize("layout", ["lines", "pretty", "array", "indented array", "no line ends"])
@pytest.mark.parametrize(
    "values, encoding",
    [(CHINESE, name) for name in ("gb18030", "utf-16-le", "utf-16-be", "utf-8")] + [(GERMAN, "utf-16-le"), (RUSSIAN, "cp1251")],
)
def test_charsets_without_a_mark_are_told_from_the_text(layout, values, encoding, tmp_path, small_blocks):
    assert read(tmp_path / "a.json", LAYOUTS[layout](values, write).encode(encoding))[0] == values


def test_lines_in_latin_1_among_lines_in_utf8_are_each_read_as_they_are(tmp_path):
    lines = [write(value).encode("cp1252" if value["n"] % 3 == 0 else "utf-8") for value in GERMAN]
    found, problems, _ = read(tmp_path / "a.jsonl", b"\n".join(lines))
    assert found == GERMAN and not problems
    lines[4] = lines[4].replace("\u00fc".encode(), b"\xc3")  # a damaged character is no Latin-1
    damaged = read(tmp_path / "a.jsonl", b"\n".join(line for i, line in enumerate(lines) if i % 3))[0]
    assert [value["n"] for value in damaged] == [n for n in range(30) if n % 3] and "\ufffd" in damaged[2]["text"]


def test_a_short_line_of_chinese_that_is_valid_utf8_by_chance_is_still_chinese(tmp_path):
    short = "\u04bb\u04bb".encode()  # D2 BB D2 BB: a word of two signs in GB18030
    assert short.decode("gb18030") == "\u4e00\u4e00"
    content = "".join(write(value) + "\n" for value in CHINESE).encode("gb18030") + b'{"text": "' + short + b'"}\n'
    assert read(tmp_path / "a.jsonl", content)[0][-1] == {"text": "\u4e00\u4e00"}


def test_halves_of_surrogate_pairs_become_the_replacement_character(tmp_path):
    content = b'{"text": "half \\ud83d, whole \\ud83d\\ude00, \\\\ud83d as text", "k\\udc00": ["\\ud83d"]}\n'
    expected = {"text": "half \ufffd, whole \U0001f600, \\ud83d as text", "k\ufffd": ["\ufffd"]}
    assert read(tmp_path / "a.jsonl", content)[0] == read(tmp_path / "b.json", content.replace(b" ", b"\n"))[0][:0] + [expected]


@quick
@given(layout=st.sampled_from([*LAYOUTS]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.floats(0, 1), flip=st.booleans())
@example(layout="lines", place=0, bit=0, cut=1, flip=True)
def test_damage_neither_stops_the_reading_nor_invents_text(layout, place, bit, cut, flip, tmp_path, small_blocks):
    values = [{"text": f"the {n}th text, with \u00e9 in it", "meta": {"tags": ["a", n]}} for n in range(20)]
    content = bytearray(LAYOUTS[layout](values, write).encode())
    if flip:
        content[int(place * len(content))] ^= 1 << bit
    else:
        del content[int(cut * len(content)) :]
    if not content:
        return
    found, _, _ = read(tmp_path / "a.json", bytes(content))
    texts = {value["text"] for value in values}
    whole = [value for value in found if isinstance(value, dict) and value.get("text") in texts]
    assert len(found) <= 21 or layout.endswith("object")
    if flip:
        assert len(whole) >= 17 or "object" in layout or (layout != "lines" and place < 0.05), (len(whole), bytes(content))
    elif "object" not in layout:
        assert len(whole) >= int(cut * 20) - 1


@quick
@given(
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv"]),
    content=st.binary(max_size=300) | st.text(st.sampled_from('{}[]",:\\u\n\t aT1;'), max_size=200).map(str.encode),
)
def test_no_bytes_at_all_stop_the_reading(name, content, tmp_path, small_blocks):
    path = tmp_path / name
    path.write_bytes(content)
    with open(path, "rb") as file:
        charset = charset_of(file)
    if not isinstance(charset, Binary):
        for _, value in Records(path, charset).read(lambda reason, place: None):
            json.dumps(value).encode()


def test_damaged_places_are_told_by_line_and_reason(tmp_path):
    lines = [
        b'{"text": "one"}',
        b"no json",
        b'{"text": "cut',
        b"",
        b'{"text": "two"} {"text": "three"}',
        b"[" * 5000,
        b'{"text": "\x00"}',
        b'{"text": "t\tab"}',
    ]
    found, problems, places = read(tmp_path / "a.jsonl", b"\n".join(lines))
    assert [value["text"] for value in found] == ["one", "two", "three", "\0", "t\tab"] and places == ["1", "5", "5#2", "7", "8"]
    assert problems == [("2", "record that is not valid JSON"), ("3", "record that is not valid JSON"), ("6", "record nested too deeply")]
    pretty = write([{"text": "one"}, {"text": "two", "more": 1}, {"text": "three"}], indent=2).replace('"two"', '"two')
    found, problems, places = read(tmp_path / "a.json", pretty.encode())
    assert [value["text"] for value in found] == ["one", "three"] and places == ["2", "9"] and problems == [("5", "record that is not valid JSON")]


def test_a_list_of_messages_is_one_record_and_lists_of_records_are_many(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read(tmp_path / "a.json", write(chat, indent=2).encode())[0] == [chat]
    assert read(tmp_path / "a.json", write([chat, chat]).encode())[0] == [chat, chat]
    assert read(tmp_path / "a.jsonl", (write(chat) + "\n" + write(chat)).encode())[0] == [chat, chat]
    assert read(tmp_path / "a.json", write({"v": 1, "conversations": [{"messages": chat}] * 2}).encode())[0] == [{"messages": chat}] * 2
    assert read(tmp_path / "a.json", write({"v": 1, "messages": chat}, indent=2).encode())[0] == [{"v": 1, "messages": chat}]
    posts = [{"author": "Ann", "text": "first"}, {"author": "Bob", "text": "second"}]
    assert read(tmp_path / "a.json", write(posts).encode())[0] == posts
    assert read(tmp_path / "a.jsonl", (write(posts) + "\n" + write(posts)).encode())[0] == posts * 2
    assert read(tmp_path / "a.json", b'["one", "two"]')[0] == ["one", "two"]


# -- tables -------------------------------------------------------------------------------------------------------------------------

FIELDS = st.text(st.sampled_from(string.ascii_letters + "  .,;|\t\"'\n\u00e9\u4e2d"), max_size=12)


def table(rows, delimiter=",", header=("id", "text", "label"), **options):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, **options)
    writer.writerows([header, *rows] if header else rows)
    return out.getvalue()


@quick
@given(
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    texts=st.lists(FIELDS, min_size=3, max_size=12),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ends=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_table_is_read_back_equal(delimiter, texts, quoting, ends, encoding, tmp_path, small_blocks):
    rows = [(str(n), text, "good") for n, text in enumerate(texts)]
    content = table(rows, delimiter, quoting=quoting, lineterminator=ends).encode(encoding)
    found, problems, _ = read(tmp_path / "a.csv", content)
    assert found == [{"id": a, "text": b, "label": c} for a, b, c in rows] and not problems


SENTENCES = [f'Sentence {n}, which says "well" and more; nothing else.' for n in range(12)]


@pytest.mark.parametrize(
    "content, expected",
    [
        (table([(s, "1") for s in SENTENCES], header=("body", "n")), [{"body": s, "n": "1"} for s in SENTENCES]),
        (table([("1", s) for s in SENTENCES], header=None), [{"column 1": "1", "column 2": s} for s in SENTENCES]),
        (table([(s,) for s in SENTENCES], header=("text",)), [{"text": s} for s in SENTENCES]),
        ("text\n" + "\n".join(s.replace('"', "") for s in SENTENCES), [{"text": s.replace('"', "")} for s in SENTENCES]),
        ("sep=;\n" + table([("1", s) for s in SENTENCES], ";", ("id", "text")), [{"id": "1", "text": s} for s in SENTENCES]),
        ("label,text\n" + "".join(f"1,{s}\n".replace('"', "") for s in SENTENCES), [{"label": "1", "text": s.replace('"', "")} for s in SENTENCES]),
        ("id\ttext\n" + "".join(f'1\t"{n}" he said\n' for n in range(9)), [{"id": "1", "text": f'"{n}" he said'} for n in range(9)]),
        ("# made by hand\n\n" + table([("1", s) for s in SENTENCES], header=("id", "text")), [{"id": "1", "text": s} for s in SENTENCES]),
        ("\n".join(s.replace('"', "") for s in SENTENCES), [{"column 1": s.replace('"', "")} for s in SENTENCES]),
        ('id,text\n1,"a \\"b\\" c"\n2,"d \\"e\\", f"\n', [{"id": "1", "text": 'a "b" c'}, {"id": "2", "text": 'd "e", f'}]),
    ],
    ids=[
        "long first",
        "no header",
        "one column",
        "one column bare",
        "sep=",
        "commas not quoted",
        "tabs and quotes",
        "title above",
        "sentences",
        "backslashes",
    ],
)
def test_tables_as_programs_and_people_write_them(content, expected, tmp_path):
    found, problems, _ = read(tmp_path / "a.csv", content.encode())
    assert found == expected and not problems


def test_a_quote_that_is_not_closed_costs_one_row(tmp_path):
    rows = [f'{n},"text {n}",x\n' for n in range(40)]
    rows[7] = '7,"text 7,x\n'
    found, problems, _ = read(tmp_path / "a.csv", ("id,text,label\n" + "".join(rows)).encode())
    assert [row["id"] for row in found] == [str(n) for n in range(40) if n != 7]
    assert problems == [("9", "row with a quote that is not closed")]
    rows[7] = "7,text, and more, and more\n"
    assert read(tmp_path / "a.csv", ("id,text,label\n" + "".join(rows)).encode())[1] == [("9", "row with more fields than the table has columns")]
    found, problems, _ = read(tmp_path / "a.csv", b'id,text\n1,plain\n2,"never closed\n3,plain\n4,plain\n')
    assert [row["id"] for row in found] == ["1", "3", "4"] and problems == [("3", "row with a quote that is not closed")]


def test_clean_joins_two_halves():
    assert clean("\ud83d\ude00 \ud83d") == "\U0001f600 \ufffd"
