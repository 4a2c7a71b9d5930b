"""Parquet as records: what is written by pyarrow comes back, what was dropped stays out, and damage costs the rows that it hits."""

import json
import sys

import pytest

from cllm.data.documents.corpus import load_corpus
from cllm.data.documents.files import PREPARED_FORMAT, PREPARED_MARK, find
from cllm.data.documents.parquet import NEEDS_PYARROW, refusal, rows
from cllm.data.documents.scan import Reading, file_of, read
from cllm.data.pipeline import prepare
from cllm.data.tokens.chat import is_chat, prepare_chat
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.runtime.errors import DataError

arrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow (pip install 'cllm[data]')")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = "A paragraph of some length, which is number {} of all that are here. "


def write(path, columns, **options):
    parquet.write_table(arrow.table(columns), path, **options)
    return path


def load(path, out, reading=Reading()):
    """The documents that are found, by name, and what is said of those left out."""
    corpus = load_corpus(path, out, [out], None, reading)
    found = {each.name: "".join(each.chunks) for file, info in corpus.files for each in read(file, info)}
    assert [len(text) for text in found.values()] == corpus.rows["chars"].tolist()
    return found, corpus.skipped.lines()


def texts(count, first=0):
    return [WORDS.format(number) * 3 for number in range(first, first + count)]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_rows_are_documents_in_order_whatever_the_row_groups(compression, tmp_path):
    write(tmp_path / "a.parquet", {"id": list(range(700)), "text": texts(700)}, row_group_size=150, compression=compression)
    found, said = load(tmp_path, tmp_path / "out")
    assert list(found.values()) == texts(700) and said == []
    assert list(found)[:2] == ["a.parquet:1", "a.parquet:2"] and list(found)[-1] == "a.parquet:700"
    assert {file_of(name) for name in found} == {"a.parquet"}


@pytest.mark.parametrize("kind", [arrow.string(), arrow.large_string(), arrow.binary(), arrow.dictionary(arrow.int32(), arrow.string())])
def test_every_way_to_write_text_is_text(kind, tmp_path):
    words = ["Grüße aus Köln, und noch ein paar Worte dazu.", "日本語の文章です。", "plain words of a text"]
    column = arrow.array([word.encode() for word in words]) if kind == arrow.binary() else arrow.array(words).cast(kind)
    write(tmp_path / "a.parquet", {"text": column})
    assert list(load(tmp_path, tmp_path / "out")[0].values()) == words


def test_dropped_rows_are_left_out_and_counted_by_reason(tmp_path):
    why = ["", None, "language: en below 0.65", "language: en below 0.71", "near duplicate"]
    write(tmp_path / "a.parquet", {"text": texts(5), "dropped_because": why})
    found, said = load(tmp_path, tmp_path / "out")
    assert list(found) == ["a.parquet:1", "a.parquet:2"]
    assert said == [
        "2 rows dropped (language: en below N): a.parquet:3, a.parquet:4",
        "1 row dropped (near duplicate): a.parquet:5",
    ]


def test_reasons_without_number_stay_few(tmp_path):
    why = [f"copy of {chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)] + [""]
    write(tmp_path / "a.parquet", {"text": texts(301), "dropped_because": why})
    _, said = load(tmp_path, tmp_path / "out")
    assert len(said) == 21 and said[0].startswith("280 rows dropped (for other reasons)")


def test_the_field_is_found_as_in_json_and_may_be_named(tmp_path):
    write(tmp_path / "a.parquet", {"url": ["http://a.example/b"] * 3, "page": [{"body": each, "size": 3} for each in texts(3)]})
    assert list(load(tmp_path, tmp_path / "out")[0].values()) == texts(3)
    write(tmp_path / "a.parquet", {"left": texts(3), "right": texts(3, 9)})
    with pytest.raises(DataError, match="several fields hold text"):
        load(tmp_path, tmp_path / "out")
    assert list(load(tmp_path, tmp_path / "out", Reading(text_field="right"))[0].values()) == texts(3, 9)


def test_what_no_text_can_be_does_not_stop_the_rest(tmp_path):
    from datetime import timedelta

    columns = {"when": arrow.array([2**55, 1], type=arrow.timestamp("ms")), "text": texts(2), "size": [timedelta(1)] * 2, "none": [None] * 2}
    write(tmp_path / "a.parquet", columns)
    raw = arrow.array([b"a text that is cut \xe2\x82", b"and one that is whole"])
    parquet.write_table(arrow.table({"text": raw.view(arrow.string())}), tmp_path / "b.parquet")
    found, _ = load(tmp_path, tmp_path / "out")
    assert list(found.values()) == [*texts(2), "a text that is cut \ufffd", "and one that is whole"]


def test_damage_costs_a_row_group_or_the_file_and_never_more(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": texts(900)}, row_group_size=300, compression="none", write_page_checksum=True, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[content.index(b"number 450 ")] ^= 1
    path.write_bytes(content)
    found, said = load(tmp_path, tmp_path / "out")
    assert [*texts(300), *texts(300, 600)] == [text for text in found.values() if text not in texts(300, 300)] and 600 <= len(found) < 900
    assert len(said) == 1 and said[0].startswith("1 row that is damaged, with those after it in its group: a.parquet:")

    (tmp_path / "b.parquet").write_bytes(content[:-200])
    (tmp_path / "c.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "d.parquet").write_bytes(b"PARE" + bytes(100))
    _, said = load(tmp_path, tmp_path / "out")
    assert "1 Parquet file that is damaged (its list of columns cannot be read): b.parquet" in said
    assert "1 Parquet file that is damaged (it does not begin as one): c.parquet" in said and "1 Parquet file that is encrypted: d.parquet" in said


def test_any_damaged_byte_is_survived(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": texts(40), "id": list(range(40))}, row_group_size=10)
    content = path.read_bytes()
    for place in range(4, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        if not refusal(path):
            for _, row in rows(path, lambda reason, place: None, ["text"]):
                assert isinstance(row, dict)


def test_without_pyarrow_the_extra_is_named_and_the_file_is_read_once_it_is_there(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", {"text": texts(2)})
    (tmp_path / "a.txt").write_text("some text")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        found, said = load(tmp_path, tmp_path / "out")
    assert list(found) == ["a.txt"] and said == [f"1 {NEEDS_PYARROW}: a.parquet"] and "pip install 'cllm[data]'" in said[0]
    assert len(load(tmp_path, tmp_path / "out")[0]) == 3


def prepared_folder(out, count=40):
    """A folder as `cllm prepare` leaves one."""
    out.mkdir()
    (out / PREPARED_MARK).write_text(json.dumps({"format": PREPARED_FORMAT, "version": 1}))
    (out / "manifest.jsonl").write_text(json.dumps({"text": "no text of the user"}) + "\n")
    (out / "report.html").write_text("<p>What was kept and why.</p>")
    for name in ("ledger", "_work", "parts"):
        (out / name).mkdir()
    write(out / "ledger" / "x.parquet", {"text": ["memory of the ledger"]})
    write(out / "_work" / "x.parquet", {"text": ["half of a stage"]})
    why = ["", "", "", "too short"] * (count // 4)
    write(out / "parts" / "000.parquet", {"id": list(map(str, range(count))), "text": texts(count), "dropped_because": why})
    return out


def test_of_a_prepared_folder_only_its_parquet_is_text(tmp_path):
    out = prepared_folder(tmp_path / "out")
    files, skipped = find(out)
    assert [file.name for file in files] == ["parts/000.parquet"] and not skipped.total
    (tmp_path / "note.txt").write_text("beside it")
    assert [file.name for file in find(tmp_path)[0]] == ["note.txt", "out/parts/000.parquet"]
    (out / PREPARED_MARK).write_text("{}")  # some file of that name
    assert {"manifest.jsonl", PREPARED_MARK, "report.html"} < {file.name for file in find(out)[0]}


def test_a_prepared_folder_becomes_tokens(tmp_path):
    out, said = prepared_folder(tmp_path / "out"), []
    dataset = prepare(out, tmp_path / "data", tokenizer="char", val_fraction=0.2, log=said.append)
    assert dataset.train.num_documents + dataset.val.num_documents == 30
    assert "  parts/000.parquet: 30 rows, text from column 'text'" in said
    assert any("10 rows dropped (too short)" in line for line in said)


def test_chats_in_parquet_are_chats(tmp_path):
    chat = [{"role": "user", "content": "Hi there", "name": None}, {"role": "assistant", "content": "Hello", "name": None}]
    write(tmp_path / "a.parquet", {"messages": [chat] * 5, "dropped_because": [""] * 4 + ["toxic"]})
    assert is_chat(tmp_path) and is_chat(tmp_path / "a.parquet")
    dataset = prepare_chat(tmp_path, tmp_path / "out", Tokenizer.train(["Hi there Hello"], 320), 0.0)
    assert dataset.train.num_documents == 4 and dataset.train.document_names()[0] == "a.parquet:1"
    assert dataset.info["skipped"]["row dropped (toxic)"]["count"] == 1
    (tmp_path / "out" / "texts").mkdir()
    write(tmp_path / "out" / "texts" / "b.parquet", {"text": texts(3)})
    assert not is_chat(tmp_path / "out" / "texts")
