"""Whether the text at a place is still what it was: told without a false alarm and without reading what cannot have changed."""

import json
import os
import shutil

import pytest

from cllm.data.documents import changes
from cllm.data.documents.changes import same_text, texts_of
from cllm.data.documents.corpus import load_corpus
from cllm.data.documents.scan import Reading
from cllm.runtime.errors import DataError


@pytest.fixture
def place(tmp_path):
    """A folder of text (and of what is no text), and what is remembered of it."""
    data = tmp_path / "books"
    (data / "part").mkdir(parents=True)
    for name in ("1.txt", "2.txt", "part/3.txt"):
        (data / name).write_text(f"the text of {name}\n")
    (data / "picture.raw").write_bytes(bytes(100))
    load_corpus(data, tmp_path / "memory")
    return data, tmp_path / "memory"


def append(data):
    with open(data / "1.txt", "a") as file:
        file.write("one more line\n")


def rewrite(data):
    os.utime(data / "1.txt", (1, 1))
    (data / "2.txt").write_text("the text of 2.TXT\n")  # as long as before


UNCHANGED = {
    "nothing": lambda data: None,
    "new times": lambda data: os.utime(data / "1.txt", (1, 1)),
    "written again": lambda data: (data / "1.txt").write_text((data / "1.txt").read_text()),
    "a new file without text": lambda data: (data / "more.raw").write_bytes(bytes(50)),
    "a new hidden file": lambda data: (data / ".hidden").write_text("words"),
}
CHANGED = {
    "a line more": append,
    "another word": rewrite,
    "a new file": lambda data: (data / "4.txt").write_text("more\n"),
    "a file less": lambda data: (data / "part" / "3.txt").unlink(),
    "another name": lambda data: (data / "2.txt").rename(data / "two.txt"),
    "text where none was": lambda data: (data / "picture.raw").write_text("words\n"),
}


@pytest.mark.parametrize("change", [*UNCHANGED, *CHANGED])
def test_a_change_of_the_text_is_seen_and_nothing_else_is_one(place, change):
    data, memory = place
    {**UNCHANGED, **CHANGED}[change](data)
    assert same_text(data, memory) is (change in UNCHANGED)


def test_a_copy_elsewhere_is_the_same_text_and_files_left_out_do_not_count(place, tmp_path):
    data, memory = place
    shutil.copytree(data, tmp_path / "moved")
    (tmp_path / "moved" / "runs").mkdir()
    (tmp_path / "moved" / "runs" / "notes.txt").write_text("not of the data\n")
    assert same_text(tmp_path / "moved", memory, exclude=[tmp_path / "moved" / "runs"]) is True
    assert same_text(tmp_path / "moved", memory) is False


def test_a_single_file_may_have_another_name(tmp_path):
    (tmp_path / "a.txt").write_text("words\n")
    load_corpus(tmp_path / "a.txt", tmp_path / "memory")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert same_text(tmp_path / "b.txt", tmp_path / "memory") is True
    (tmp_path / "b.txt").write_text("wordy\n")
    assert same_text(tmp_path / "b.txt", tmp_path / "memory") is False


@pytest.mark.parametrize(
    "reading", [{"text_field": "title"}, {"separator": "none"}, {"separator": "\\n\\n"}, {"encoding": "cp437"}], ids=lambda each: next(iter(each))
)
def test_every_setting_that_changes_the_text_counts(reading, tmp_path):
    data, memory = tmp_path / "data", tmp_path / "memory"
    data.mkdir()
    rows = [{"body": f"The body of the text number {n}.", "title": f"The title of the text number {n}."} for n in range(9)]
    (data / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, other = ({"text_field": "body", "separator": "auto", "encoding": "auto", **each} for each in ({}, reading))
    load_corpus(data, memory, reading=Reading.of(**first))
    assert same_text(data, memory, reading=Reading.of(**first)) is True
    assert same_text(data, memory, reading=Reading.of(**other)) is False


def test_a_new_file_is_text_where_the_settings_find_text_in_it(tmp_path):
    data, memory = tmp_path / "data", tmp_path / "memory"
    data.mkdir()
    reading = Reading.of("body", "auto", "auto")
    (data / "a.jsonl").write_text(json.dumps({"body": "The body of a text."}) + "\n")
    load_corpus(data, memory, reading=reading)
    (data / "b.jsonl").write_text(json.dumps({"text": "A text that the run does not learn from."}) + "\n")
    assert same_text(data, memory, reading=reading) is True
    (data / "b.jsonl").write_text(json.dumps({"body": "A text that it would have learnt from."}) + "\n")
    assert same_text(data, memory, reading=reading) is False


@pytest.mark.parametrize(("name", "same"), [("b.jsonl", True), ("B.JSONL", True), ("b.txt", False), ("b.json", False), ("b.py", False)])
def test_a_name_that_lets_a_file_be_read_otherwise_makes_it_another_text(name, same, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "A text of some words."}) + "\n")
    load_corpus(tmp_path / "a.jsonl", tmp_path / "memory")
    (tmp_path / "a.jsonl").rename(tmp_path / name)
    assert same_text(tmp_path / name, tmp_path / "memory") is same


def test_only_files_that_may_have_changed_are_read(place, monkeypatch):
    data, memory = place
    os.utime(data / "1.txt", (1, 1))
    read = []
    digest = changes._digest
    monkeypatch.setattr(changes, "_digest", lambda path: read.append(path.name) or digest(path))
    assert same_text(data, memory) is True and read == ["1.txt"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": {"stamp": [1]}}}'])
def test_without_a_record_nothing_is_said(place, content):
    data, memory = place
    if content is None:
        shutil.rmtree(memory)
    else:
        (memory / "sources.json").write_text(content)
    assert same_text(data, memory) is None and texts_of(memory) == set()


def test_a_place_that_is_gone_is_an_error(place):
    data, memory = place
    shutil.rmtree(data)
    with pytest.raises(DataError, match="does not exist"):
        same_text(data, memory)


def test_digests_tell_copies_by_their_content(place, tmp_path):
    data, memory = place
    shutil.copy(data / "1.txt", tmp_path / "copy.md")
    load_corpus(tmp_path / "copy.md", tmp_path / "other")
    assert len(texts_of(memory)) == 3 and texts_of(tmp_path / "other") < texts_of(memory)


def test_other_fields_of_the_same_records_are_other_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "The text of the record.", "title": "The title of the record."}) + "\n")
    for name, field in (("found", ""), ("text", "text"), ("title", "title")):
        load_corpus(tmp_path / "a.jsonl", tmp_path / name, reading=Reading.of(field, "auto", "auto"))
    assert texts_of(tmp_path / "found") == texts_of(tmp_path / "text") and not texts_of(tmp_path / "text") & texts_of(tmp_path / "title")
