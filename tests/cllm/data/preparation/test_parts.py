"""A large file of records is read in parts by several tasks: together they give what one that reads the whole gives."""

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from here import Here
from hypothesis import given, settings
from hypothesis import strategies as st
from made import edited, prose

from cllm.data.documents import parquet
from cllm.data.extract import records
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.options import Options
from cllm.data.extract.parts import Left, Part
from cllm.data.preparation import extraction, within
from cllm.data.preparation.cuts import cut, form_of, parts_of_groups, parts_of_lines
from cllm.data.preparation.plan import prepare
from cllm.data.preparation.recipe import Mix, Recipe, Sizes
from cllm.data.preparation.rows import read_rows

pytest.importorskip("pyarrow", reason="the data extra is not installed")
WHOLE = 10**9  # bytes of a part that no file of these tests has


def read_whole(path):
    """The documents of a file, and what is told at its end."""
    found = []
    with open(path, "rb") as file:
        try:
            for document in records.stream(file, path.name, Options()):
                found.append(document)
        except Unreadable as error:
            return found, str(error)
    return found, ""


def parts_of(path, part_bytes):
    with open(path, "rb") as file:
        how = json.loads(json.dumps(records.divide(file, path.name, Options())))
    if form_of(path, path.name) == "groups":
        return [part for part, _ in parts_of_groups(how, part_bytes)]
    return parts_of_lines(how, cut(path, part_bytes))


def read_parts(path, parts):
    found, left = [], Left()
    for part in parts:
        own = Left()
        with open(path, "rb") as file:
            found += records.part(file, Part(**part.to_dict()), Options(), own)
        left.update(Left.from_dict(json.loads(json.dumps(own.to_dict()))))
    return found, left.reason


def written(folder, content, name="records.jsonl"):
    path = Path(folder) / name
    path.write_bytes(content)
    return path


# -- where a file is cut ------------------------------------------------------------------------------------------------------------

LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\n", b"\r", b"\n\n"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=40), LINE_ENDS)), st.binary(max_size=40), st.integers(1, 60), st.integers(1, 50), st.binary(max_size=90))
def test_each_line_is_in_the_part_in_which_it_begins_and_what_is_added_changes_the_last_part(lines, last, part_bytes, block, more):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cllm.data.preparation.cuts._BLOCK", block)
        content = b"".join(line + end for line, end in lines) + last
        path = written(folder, content)
        cuts = cut(path, part_bytes)
        assert b"".join(content[each.begin : each.end] for each in cuts) == content
        assert all(each.end == following.begin for each, following in pairwise(cuts))
        for each in cuts[1:]:
            before = content[: each.begin]
            assert before.endswith(b"\n")
            assert each.line == 1 + before.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n").count("\n")
        begins = [0, *(place + 1 for place, byte in enumerate(content) if byte == 10 and place + 1 < len(content))]
        assert [each.begin for each in cuts] == (
            [min(b for b in begins if b // part_bytes == n) for n in sorted({b // part_bytes for b in begins})] if content else []
        )
        assert [each.has_quotes for each in cuts] == [b'"' in content[each.begin : each.end] for each in cuts]
        path.write_bytes(content + more)
        assert cut(path, part_bytes)[: len(cuts) - 1] == cuts[:-1]


# -- what parts give ----------------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
RECORDS = st.one_of(
    TEXTS.map(lambda text: json.dumps({"text": text, "url": "https://a.example/"}).encode()),
    TEXTS.map(lambda text: json.dumps({"text": text + "\u2028\x85\x0b two", "title": text}, ensure_ascii=False).encode()),
    TEXTS.map(lambda text: json.dumps({"content": text}).encode("utf-8") + b" , " + json.dumps({"text": "second on the line"}).encode()),
    st.just(json.dumps([{"text": "one of a batch"}, {"text": "another one"}]).encode()),
    st.just(json.dumps({"text": "first half.<|endoftext|>Second half."}).encode()),
    st.just(json.dumps({"text": "a long record " * 20}).encode()),
    st.sampled_from([b"", b"  ", b"\xef\xbb\xbf", b'{"text": "not closed', b"{", b"nonsense", b'"\xc3\n']),
    st.sampled_from([b'{"text": "\xff\xe4 \xc3"}', b'{"text": 3}', b'{"text": "\t\0"}']),
    st.binary(max_size=20),
)  # fmt: skip
BEGIN = b"".join(json.dumps({"text": f"a record of words, number {number}"}).encode() + b"\n" for number in range(4))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(RECORDS, LINE_ENDS)), RECORDS, st.integers(1, 200), st.booleans())
def test_the_parts_of_lines_together_are_the_whole(lines, last, part_bytes, marked):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_HEAD_BYTES", len(BEGIN) + 1)
        path = written(folder, b"\xef\xbb\xbf" * marked + BEGIN + b"".join(line + end for line, end in lines) + last)
        parts = parts_of(path, part_bytes)
        assert parts and read_parts(path, parts) == read_whole(path)


CELLS = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters='"~'), max_size=20)  # nothing that says another charset


@settings(deadline=None)
@given(st.lists(st.lists(CELLS, min_size=1, max_size=4)), st.integers(1, 200), LINE_ENDS.filter(lambda end: end != b"\r"))
def test_the_parts_of_a_table_without_quotes_together_are_the_whole(rows, part_bytes, end):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        begin = [line.encode() for line in ("id\ttext", *(f"{number}\ta row of some words, number {number}" for number in range(20)))]
        patch.setattr(records, "_HEAD_BYTES", len(end.join(begin)) + 2)  # what the drawn rows look like decides nothing
        path = written(folder, end.join([*begin, *("\t".join(row).encode() for row in rows), b"the last one"]), "table.tsv")
        parts = parts_of(path, part_bytes)
        assert parts and read_parts(path, parts) == read_whole(path)


def test_quotes_that_mean_nothing_are_no_obstacle(tmp_path):
    rows = "".join(f'{number}\t"Alas" said number {number} to the others\n' for number in range(40))
    path = written(tmp_path, ("id\ttext\n" + rows).encode(), "table.tsv")
    parts = parts_of(path, 200)
    assert len(parts) > 4 and read_parts(path, parts) == read_whole(path) and len(read_whole(path)[0]) == 40


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=8), st.integers(1, 3000))
def test_the_parts_of_a_parquet_file_together_are_the_whole(groups, part_bytes):
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryDirectory() as folder:
        path, number = Path(folder) / "table.parquet", 0
        schema = pyarrow.schema([("text", pyarrow.string()), ("title", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(path, schema) as file:
            for count in groups:
                texts = [None if k % 5 == 4 else f"row of some words, number {k}" for k in range(number, number + count)]
                file.write_table(pyarrow.table({"text": texts, "title": [str(k) for k in range(count)]}, schema))
                number += count
        parts = parts_of(path, part_bytes)
        if parts:
            assert read_parts(path, parts) == read_whole(path) and [parts[0].begin, parts[-1].end] == [0, len(groups)]
        else:
            assert sum(parquet.group_sizes(path)[:-1]) < part_bytes


TEXT = [{"text": prose(number, 6)} for number in range(8)]
LINES = "".join(json.dumps(each) + "\n" for each in TEXT)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", json.dumps(TEXT)),
        ("array of lines.json", "[\n" + ",\n".join(map(json.dumps, TEXT)) + "\n]\n"),
        ("indented.jsonl", "\n".join(json.dumps(each, indent=1) for each in TEXT)),
        ("on one line.jsonl", "".join(map(json.dumps, TEXT))),
        ("joined.jsonl", "".join(map(json.dumps, TEXT)).replace(", ", ",\n").replace("{", "{\n")),
        ("wide.jsonl", LINES.encode("utf-16")),
        ("narrow.jsonl", LINES.replace("ba", "bä").replace("\\u00e4", "ä").encode("cp1252")),
        ("two charsets.jsonl", LINES.replace("ba", "bä").encode() + LINES.replace("ri", "rü").encode("cp1252")),
        ("old mac.jsonl", LINES.replace("\n", "\r")),
        ("quoted.csv", "id,text\n" + "".join(f'{number},"{prose(number, 6)}"\n' for number in range(8))),
        ("chats.jsonl", (json.dumps({"messages": [{"role": each, "content": "So."} for each in ("user", "assistant")]}) + "\n") * 90),
        ("settings.json", "".join(json.dumps({"level": number, "name": f"n{number}"}) + "\n" for number in range(90))),
        ("numbers.jsonl", "".join(json.dumps({"level": number}) + "\n" for number in range(200))),
        ("dropped.parquet", None),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_read_by_one_task_as_before(tmp_path, name, content):
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / name
    if content is None:
        import pyarrow
        import pyarrow.parquet

        why = ["" if number % 3 else f"near duplicate of {number}" for number in range(60)]
        table = pyarrow.table({"text": [prose(number, 6) for number in range(60)], "dropped_because": why})
        pyarrow.parquet.write_table(table, path, row_group_size=5)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    runner = Here()
    parts, whole = both(tmp_path, path, 500, runner=runner)
    assert rows(parts) == rows(whole)
    assert runner.ran.count("extract") == 1


# -- prepared -----------------------------------------------------------------------------------------------------------------------


def rows(prepared):
    """All rows in the order of documents: kept, then dropped."""
    return [row for place in prepared.paths() for row in read_rows(place)]


def both(tmp_path, source, part_bytes, runner=None, **more):
    """What comes of a source in parts of so many bytes, and of whole files."""
    runners = {part_bytes: runner or Here(), WHOLE: Here()}
    return [
        prepare([str(source)], tmp_path / f"out-{size}", Recipe(sizes=Sizes(piece_bytes=size, part_chars=4_000), **more), runners[size])
        for size in runners
    ]


def corpus(place, count=40):
    """Records with copies, near copies, damage and empty ones, all over the file."""
    texts = [prose(number) for number in range(count)]
    texts[count - 3], texts[count // 2], texts[5] = texts[2], edited(texts[1], 1, 0.01), "Too short."
    lines = [json.dumps({"text": text, "title": f"Number {number}"}) for number, text in enumerate(texts)]
    lines[7], lines[count - 5] = '{"text": "broken', '{"text": " "}'
    lines[count - 8] = "not JSON at all"
    place.write_text("\r\n".join(lines))
    return place


@pytest.mark.parametrize("part_bytes", [2_000, 9_000, 30_000])
def test_documents_ids_lines_and_reasons_are_those_of_the_whole_file(tmp_path, part_bytes):
    source, runner = corpus(tmp_path / "all.jsonl"), Here()
    parts, whole = both(tmp_path, source, part_bytes, runner, mixes={str(source): Mix(epochs=1.5)})
    assert runner.ran.count("extract") > 1 and runner.ran.count("close") == 1
    assert rows(parts) == rows(whole)
    found = rows(parts)
    assert [row["path"] for row in found if row["title"] == "Number 33"][:1] == ["all.jsonl#line 34"]
    (left,) = [row for row in found if row["path"] == "all.jsonl"]
    assert left["dropped_because"] == "damaged (2 records that are not valid JSON: line 8, line 33)" and left["id"] == max(row["id"] for row in found)
    assert len({row["id"] for row in found}) == 38
    reasons = [row["dropped_because"].partition(" of ")[0] for row in found]
    assert reasons.count("exact duplicate") == 1 and reasons.count("near duplicate") == 1
    same = {key: value for key, value in parts.summary.items() if key not in ("shards", "recipe")}
    assert same == {key: value for key, value in whole.summary.items() if key not in ("shards", "recipe")}


def test_empty_records_of_several_parts_are_told_once_with_the_lines_of_the_file(tmp_path):
    texts = [prose(number) if number % 5 else " " for number in range(1, 26)]
    source = tmp_path / "some.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parts, whole = both(tmp_path, source, 3_000)
    assert rows(parts) == rows(whole)
    assert [row["dropped_because"] for row in rows(parts) if not row["text"]] == ["empty (5 records without text: line 5, line 10, line 15, ...)"]


def test_documents_that_are_like_examples_are_the_same_in_parts(tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    for number in range(12):
        (good / f"{number}.txt").write_text("Stir the flour with the butter. " * 8 + f"Bake cake number {number} in a hot oven.")
    lines = [
        json.dumps({"text": prose(number) if number % 2 else f"Stir the butter with the flour. Serve {number} cakes. " * 9}) for number in range(30)
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    parts, whole = both(tmp_path, tmp_path / "all.jsonl", 6_000, filter=False, dedup=False, like=str(good))
    assert rows(parts) == rows(whole)
    assert {row["dropped_because"].partition(":")[0] for row in rows(parts)} == {"", "min_quality"}


def test_what_is_added_to_a_file_is_read_and_nothing_before_it(tmp_path):
    source, runner = tmp_path / "log.jsonl", Here()
    lines = [json.dumps({"text": prose(number)}) + "\n" for number in range(40)]
    source.write_text("".join(lines[:30]))
    how = Recipe(sizes=Sizes(piece_bytes=5_000))
    prepare([str(source)], tmp_path / "out", how, runner)
    assert runner.ran.count("extract") > 8 and runner.ran.count("close") == 0
    runner.ran.clear()
    source.write_text("".join(lines))
    after = prepare([str(source)], tmp_path / "out", how, runner)
    assert 1 < runner.ran.count("extract") == runner.ran.count("clean") < 6
    assert after.digest == prepare([str(source)], tmp_path / "anew", how, Here()).digest
    # A line more at the beginning moves the numbers of all others, and a shorter file leaves nothing of the longer one behind.
    source.write_text("".join([*lines[35:], *lines[:3]]))
    again = prepare([str(source)], tmp_path / "out", how, runner)
    assert rows(again) == rows(prepare([str(source)], tmp_path / "third", how, Here()))
    here, there = ({place.name for place in (tmp_path / name / ".ledger/extract").iterdir()} for name in ("out", "third"))
    assert here == there


def test_lines_that_are_put_before_others_change_their_ids(tmp_path):
    """Each part has the same bytes as before and other numbers: of lines, and of rows in its piece."""
    lines = [json.dumps({"text": prose(number)}) for number in range(12)]
    lines = [line.ljust(3_000) + "\n" for line in lines]
    source, how = tmp_path / "all.jsonl", Recipe(sizes=Sizes(piece_bytes=3_001))
    source.write_text("".join(lines[:8]))
    prepare([str(source)], tmp_path / "out", how, Here())
    source.write_text("".join(lines[8:] + lines[:8]))
    assert rows(prepare([str(source)], tmp_path / "out", how, Here())) == rows(prepare([str(source)], tmp_path / "anew", how, Here()))


def test_a_file_that_is_not_alone_in_its_piece_is_read_as_a_whole(tmp_path):
    folder, runner = tmp_path / "texts", Here()
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jsonl").write_text(json.dumps({"text": prose(number)}) + "\n")
    how = Recipe(sizes=Sizes(piece_bytes=9_000))
    prepare([str(folder)], tmp_path / "out", how, runner)
    corpus(folder / "1.jsonl")  # grows
    runner.ran.clear()
    grown = prepare([str(folder)], tmp_path / "out", how, runner)
    assert runner.ran.count("extract") == 1 and rows(grown)


def test_the_reading_of_a_part_tells_how_far_in_it_it_is(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(within, "hear", heard.append)
    monkeypatch.setattr(within, "_PAUSE", 0.0)
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps({"text": f"{number} and {prose(number)}"}) + "\n" for number in range(900)))
    second = cut(source, source.stat().st_size // 2)[1]
    how = extraction.divide("", str(source), source.name, {})["how"]
    part = Part(how, second.begin, second.end, second.line).to_dict()
    found = extraction.extract(str(tmp_path / "0"), 0, "records", str(source), [source.name], {}, {}, 1 << 20, part)
    assert 0 < found["rows"] < 900 and found["left"]["documents"] == found["rows"]
    assert heard == sorted(heard) and heard[0] >= 0 and 0.5 * (second.end - second.begin) < heard[-1] <= second.end - second.begin


def test_a_part_that_costs_too_much_says_so_and_the_file_is_not_called_empty():
    class Lost:
        told = {"damaged": "of another file"}

        def documents(self, *request, **more):
            yield Document("a text", "line 7")
            raise Unreadable("time limit (more than 60 seconds)")

    left, part = Left(), Part({"fields": ["text"], "codec": "utf-8", "dialect": None}, 100, 200, 7)
    (_, read), (_, refused) = extraction.rows_of_part(Path("a.jsonl"), "a.jsonl", part, Lost(), left)
    assert read["path"] == "a.jsonl#line 7" and refused["path"] == "a.jsonl" and refused["dropped_because"].startswith("time limit")
    assert left.reason == ""


def test_a_part_whose_file_has_gone_says_so(tmp_path):
    part = Part({"fields": ["text"], "codec": "utf-8", "dialect": None}, 10, 20, 2).to_dict()
    found = extraction.extract(str(tmp_path / "0"), 0, "records", str(tmp_path / "gone.jsonl"), ["gone.jsonl"], {}, {}, 1 << 20, part)
    (row,) = read_rows(tmp_path / "0.parquet")
    assert row["dropped_because"] == "unreadable (no such file or directory)" and Left.from_dict(found["left"]).reason == ""
