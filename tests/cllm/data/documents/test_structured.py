"""Files of records and files of several documents, as a user has them in a folder: what becomes a document, what is said, what is left out."""

import json

import pytest

from cllm.data.documents.corpus import describe, load_corpus
from cllm.data.documents.scan import CHATS, Reading, file_of, read
from cllm.data.documents.sides import plan_split
from cllm.runtime.errors import DataError

STORIES = [f"The small garden number {n} repaired the old river at night, before the winter came." for n in range(6)]


def write(value, indent=None):
    return json.dumps(value, ensure_ascii=False, indent=indent)


def load(root, memory, reading=Reading()):
    """(name -> text of each document, what was said about them)"""
    corpus = load_corpus(root, memory, [memory], reading=reading)
    said = []
    describe(corpus, plan_split(corpus.rows, 0.0), said.append)
    return {each.name: "".join(each.chunks) for file, info in corpus.files for each in read(file, info)}, [line.strip() for line in said]


def fields(**values):
    return [{"id": n, **{name: value.replace("{}", str(n)) for name, value in values.items()}} for n in range(6)]


LONG = "the {}th of several long sentences, which nobody would take for a title or a label, and which goes on"


@pytest.mark.parametrize(
    "records, field",
    [
        (fields(text=LONG, title="a title with {} words that is longer than it should be, and longer still, to be honest, than the text"), "text"),
        (fields(content=LONG, body=LONG * 3), "content"),
        (fields(title="title {}", body=LONG), "body"),
        (fields(title="title {}", story=LONG, url="https://example.org/{}?" + "x" * 300), "story"),
        (fields(title="title {}", words=LONG * 2, note="a short note {}"), "words"),
        (fields(Text=LONG), "Text"),
        ([{"meta": {"text": "x", "body": 1}, "data": {"document": {"text": text}}} for text in STORIES], "data.document.text"),
        ([{"version": 3, "about": "metadata first"}, *fields(text=LONG)], "text"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_the_field_with_the_text_is_found_and_said(records, field, name, tmp_path):
    (tmp_path / name).write_text("\n".join(map(write, records)) if name == "a.jsonl" else write(records, indent=1))
    found, said = load(tmp_path / name, tmp_path / "out")
    expected = []
    for record in records:
        value = record
        for step in field.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        expected += [value] if value else []
    assert list(found.values()) == expected
    assert f"{name}: {len(expected)} records, text from field '{field}'" in said
    assert load(tmp_path / name, tmp_path / "out")[1] == [said[0].replace("(done)", "(cached)"), *said[1:]]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        (
            "a.jsonl",
            "\n".join(map(write, fields(german=LONG, english=LONG))),
            r"several fields hold text \((german, english|english, german)\); choose one",
        ),
        ("a.jsonl", '{"id": 1, "url": "https://example.org"}', r"no field holds text \(fields found: id, url\)"),
        ("a.jsonl", '{"id": 1, "title": "two words"}', r"every field is short \(fields found: id, title\); choose one"),
        ("a.csv", "x,y\n1,2\n3,4\n", r"table in which no field holds text \(fields found: x, y\)"),
        ("a.jsonl", '{"text": 5}', r"JSON file in which no field holds text \(fields found: text\)"),
        ("a.jsonl", "no json\nat all\n", r"no record can be read; 1 record that is not valid JSON: a.jsonl:1"),
        ("a.jsonl", write({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}), "--from MODEL"),
    ],
)
def test_records_without_a_certain_text_are_an_error_that_names_the_fields_and_the_form(name, content, problem, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=problem) as error:
        load(tmp_path / name, tmp_path / "out")
    assert '{"text": "..."}' in str(error.value)


def test_a_setting_names_the_field(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(write, fields(german="das {}te", english="the {}th"))))
    (tmp_path / "b.csv").write_text("english;german\nthe one;das eine\n")
    (tmp_path / "c.jsonl").write_text('{"text": "no such field"}\n')
    (tmp_path / "d.txt").write_text("plain text has no fields\n")
    (tmp_path / "e.jsonl").write_text(write({"english": "a chat's question", "german": "Antwort", "messages": []}))
    found, said = load(tmp_path, tmp_path / "out", Reading(text_field="english"))
    assert list(found.values()) == [*(f"the {n}th" for n in range(6)), "the one", "plain text has no fields\n", "a chat's question"]
    assert "2 files (a.jsonl, e.jsonl): 7 records, text from field 'english'" in said and "b.csv: 1 row, text from column 'english'" in said
    assert any("no field 'english' holds text (fields found: text): c.jsonl" in line for line in said)


def test_what_is_left_out_of_records_is_counted_by_reason_and_line(tmp_path):
    lines = ['{"text": "one"}', "{broken", '{"title": "x"}', '{"text": " "}', '{"text": "half of a face: \\ud83d"}', "{broken too", "[1]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, said = load(tmp_path, tmp_path / "out")
    assert found == {"a.jsonl:1": "one", "a.jsonl:5": "half of a face: \ufffd"}
    assert said[2:] == [
        "left out 5:", "2 records that are not valid JSON: a.jsonl:2, a.jsonl:6",
        "2 records without a text in 'text' or 'content': a.jsonl:3, a.jsonl:7",
        "1 record with empty text: a.jsonl:4",
    ]  # fmt: skip
    assert load(tmp_path, tmp_path / "out")[1][1:] == said[1:]


def test_json_that_is_no_data_is_learnt_as_it_is_and_that_is_said(tmp_path):
    plain = {
        "package.json": write(
            {"name": "x", "description": "a package that does several things", "files": [{"path": "a b"}, {"path": "c d"}]}, indent=2
        ),
        "tsconfig.json": '{"compilerOptions": {"strict": true}}',
        "map.json": '{"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": {"coordinates": [1, 2]}}]}',
        "words.json": '["one", "two", "three"]',
        "broken.json": '{"a": ',
        "app.json": write({"text": "Save", "keys": {name: [1, 2, 3] for name in "abcdefgh"}}),
    }
    for name, content in plain.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "page.json").write_text(write({"url": "https://example.org", "text": STORIES[0]}, indent=2))
    found, said = load(tmp_path, tmp_path / "out")
    assert {name: text for name, text in found.items() if name in plain} == plain
    assert found["page.json:1"] == STORIES[0]
    assert "6 files (app.json, broken.json, map.json, ...): learnt as written, because no records with a text were found in them" in said
    assert "page.json: 1 record, text from field 'text'" in said


def test_tables_and_their_places(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbf" + "".join(f'{n};"{text}\r\nand more";x\r\n' for n, text in [("id", "body"), *enumerate(STORIES)]).encode()
    )
    content = (tmp_path / "a.csv").read_text("utf-8-sig").replace("body\nand more", "body")
    (tmp_path / "a.csv").write_text(content, "utf-16")
    (tmp_path / "b.tsv").write_text("".join(f"{n}\t{text}\n" for n, text in enumerate(STORIES)))
    found, said = load(tmp_path, tmp_path / "out")
    assert list(found.values()) == [f"{text}\nand more" for text in STORIES] + STORIES
    assert list(found)[:2] == ["a.csv:2", "a.csv:4"] and {file_of(name) for name in found} == {"a.csv", "b.tsv"}
    assert "a.csv: 6 rows, text from column 'body'" in said and "b.tsv: 6 rows, text from column 'column 2'" in said


def test_chats_and_parquet_beside_text_are_left_out_with_a_reason(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chats.json").write_text(write([{"messages": chat}] * 3))
    (tmp_path / "one.json").write_text(write(chat, indent=2))
    (tmp_path / "alpaca.csv").write_text("instruction,input,output\nSay it.,,It.\n")
    (tmp_path / "data.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "data").write_bytes(b"PAR1" + bytes(100))
    found, said = load(tmp_path, tmp_path / "out")
    assert list(found) == ["a.txt"]
    assert f"3 {CHATS.replace('file', 'files', 1)}: alpaca.csv, chats.json, one.json" in said
    assert "1 Parquet file of another name (rename it so that it ends with .parquet): data" in said
    assert any(line.startswith("1 Parquet file ") and line.endswith(": data.parquet") for line in said)


@pytest.mark.parametrize("size", [1 << 18, 7])
def test_stories_in_one_file_are_documents(size, tmp_path, monkeypatch):
    from cllm.data.documents import scan

    monkeypatch.setattr(scan, "CHUNK_CHARS", size)
    (tmp_path / "a.txt").write_text("\r\n<|endoftext|>\r\n".join(STORIES))
    (tmp_path / "b.py").write_text('END = "x"\n<|endoftext|>\nprint(END)\n<|endoftext|>\n')
    (tmp_path / "c.md").write_text("GPT-2 ends a text with <|endoftext|> and nothing else.\n")
    (tmp_path / "d.jsonl").write_text(write({"text": STORIES[0] + "<|endoftext|>"}) + "\n" + write({"text": "One.\n<|endoftext|>\nTwo.\n"}) + "\n")
    found, said = load(tmp_path, tmp_path / "out")
    plain = {name: (tmp_path / name).read_text() for name in ("b.py", "c.md")}
    stories = {f"a.txt#{n}": text + "\n" * (n < 6) for n, text in enumerate(STORIES, 1)}
    assert found == {**stories, **plain, "d.jsonl:1": STORIES[0], "d.jsonl:2.1": "One.\n", "d.jsonl:2.2": "Two.\n"}
    assert "a.txt: 6 documents, cut at '<|endoftext|>'; data.separator=none keeps a file whole" in said
    assert {file_of(name) for name in found} == {"a.txt", "b.py", "c.md", "d.jsonl"}
    whole, said = load(tmp_path, tmp_path / "out", Reading(separator="none"))
    assert list(whole) == ["a.txt", "b.py", "c.md", "d.jsonl:1", "d.jsonl:2"] and not any("cut at" in line for line in said)


def test_a_separator_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n\n".join(STORIES) + "\n")
    (tmp_path / "b.txt").write_text("no separator\n\nin this one\n")
    reading = Reading.of("", "\\n\\n\\n")
    found, said = load(tmp_path, tmp_path / "out", reading)
    assert [*found] == [f"a.txt#{n}" for n in range(1, 7)] + ["b.txt"] and list(found.values())[:5] == STORIES[:5]
    assert "a.txt: 6 documents, cut at '\\n\\n\\n'" in said


def test_no_name_acts_on_the_terminal(tmp_path):
    evil = "a\x1b[31m\nred\u202e"
    (tmp_path / f"{evil}.jsonl").write_text(write({f"{evil}": STORIES[0], "id": 1}) + "\nbroken\n")
    (tmp_path / f"{evil}.txt").write_text("<|endoftext|>\n".join(f"{text}\n" for text in STORIES))
    (tmp_path / f"{evil}.bin").write_bytes(b"x")
    (tmp_path / f"{evil}.json").write_text("{}")
    (tmp_path / "b\udcff.txt").write_text("a name that is not UTF-8\n")
    found, said = load(tmp_path, tmp_path / "out")
    for line in [*found, *said]:
        assert line.isprintable() and "\x1b" not in line, line
    assert "a\\x1b[31m\\x0ared\\u202e.jsonl: 1 record, text from field 'a\\x1b[31m\\x0ared\\u202e'" in said
    assert "b\\udcff.txt" in found


def test_a_record_beyond_the_first_thousand_may_have_its_text_in_the_other_usual_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 1000 + '{"content": "the last"}\n')
    found, said = load(tmp_path / "a.jsonl", tmp_path / "out")
    assert len(found) == 1001 and found["a.jsonl:1001"] == "the last"
    assert "a.jsonl: 1,001 records, text from field 'text' or 'content'" in said


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_without_end_is_passed_over_and_never_held(name, tmp_path, monkeypatch):
    from cllm.data.documents import tables

    monkeypatch.setattr(tables, "LINE_CHARS", 1 << 21)
    longest = 0
    real = tables.is_cut

    def watched(line):
        nonlocal longest
        longest = max(longest, len(line))
        return real(line)

    monkeypatch.setattr(tables, "is_cut", watched)
    texts = [f"a short text, number {n} of four, with enough words in it" for n in range(4)]
    with open(tmp_path / name, "w") as file:
        for number, text in enumerate(["text,id"] * (name == "a.csv") + texts):
            if number == 2:
                begin, end = ('{"text": "', '"}\n') if name == "a.jsonl" else ("", ",x\n")
                file.write(begin + "endless " * (1 << 20) + end)
            file.write(f"{text if text == 'text,id' else json.dumps({'text': text}) if name == 'a.jsonl' else chr(34) + text + chr(34) + ',1'}\n")
    found, said = load(tmp_path / name, tmp_path / "out")
    assert list(found.values()) == texts and longest < 4 << 20
    assert any("of more than 2 million characters" in line for line in said)
