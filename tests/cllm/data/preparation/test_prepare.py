"""Preparing documents: what comes out, what is done again when something changes, and what people are told."""

import gzip
import json
import random
import zipfile

import numpy as np
import pytest
from disk import file_size_limit
from here import Here
from made import edited, prose, recipe

from cllm.data import stream_texts
from cllm.data.preparation import duplicates, extraction, look, within
from cllm.data.preparation.manifest import open_prepared
from cllm.data.preparation.plan import prepare
from cllm.data.preparation.recipe import Mix, Recipe, Sizes, read_mix
from cllm.data.preparation.rows import COLUMNS, read_rows, writing
from cllm.report.prepared import prepared_page
from cllm.runtime.errors import DataError, UserError

pytest.importorskip("pyarrow", reason="the data extra is not installed")


@pytest.fixture
def folder(tmp_path):
    """Some documents that are kept."""
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.txt").write_text(prose(number))
    return source


def run(sources, out, how=None, runner=None, **more):
    return prepare([str(each) for each in sources], out, how or recipe(), runner or Here(), **more)


def rows(prepared, kept=None):
    return [row for place in prepared.paths(kept) for row in read_rows(place)]


def test_a_short_chinese_text_is_long_enough_to_tell_its_language(tmp_path):
    (tmp_path / "texts").mkdir()
    text = "子曰：学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？有子曰：其为人也孝弟，而好犯上者，鲜矣；不好犯上，而好作乱者，未之有也。"  # noqa: E501, RUF001
    (tmp_path / "texts" / "analects.txt").write_text(
        text + "君子务本，本立而道生。孝弟也者，其为仁之本与！子曰：巧言令色，鲜矣仁。吾日三省吾身。" + text  # noqa: RUF001
    )
    (row,) = rows(run([tmp_path / "texts"], tmp_path / "out"))
    assert row["language"] == "zh"


def test_a_large_file_is_cleaned_in_parts_and_nothing_else_changes(tmp_path):
    texts = [prose(number) for number in range(12)]
    texts[3], texts[10], texts[11] = texts[8], edited(texts[0], 1, 0.01), texts[1]  # copies lie in other parts than what they repeat
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, "Too short."]]
    (tmp_path / "all.jsonl").write_text("".join(lines))
    one, many = (
        run([tmp_path / "all.jsonl"], tmp_path / f"out-{chars}", Recipe(mixes={"all.jsonl": Mix(epochs=1.5)}, sizes=Sizes(part_chars=chars)))
        for chars in (10**9, 3_000)
    )
    cleaned = sorted((tmp_path / "out-3000" / ".ledger" / "clean").glob("*.parquet"))
    assert len(cleaned) > 3 and len(list((tmp_path / "out-1000000000" / ".ledger" / "clean").glob("*.parquet"))) == 1
    assert rows(one, True) == rows(many, True) and rows(one, False) == rows(many, False)
    reasons = [row["dropped_because"].split(" of ")[0] for row in rows(many, False)]
    assert reasons.count("exact duplicate") == 2 and reasons.count("near duplicate") == 1
    # With fewer parts than before, what the others have left behind goes.
    (tmp_path / "all.jsonl").write_text("".join(lines[:2]))
    run([tmp_path / "all.jsonl"], tmp_path / "out-3000", Recipe(sizes=Sizes(part_chars=3_000)))
    assert len(list((tmp_path / "out-3000" / ".ledger" / "clean").glob("*.parquet"))) == 1


def test_every_document_has_a_row_and_training_reads_the_kept_ones(folder, tmp_path):
    (folder / "8-copy.txt").write_text("\n" + prose(0).replace(" ", "  "))
    (folder / "9-near.txt").write_text(edited(prose(1), 1, 0.01))
    (folder / "short.txt").write_text("Too short.")
    (folder / "empty.txt").write_text("")
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 8)
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("inside/letter.txt", prose(100))
    prepared = run([folder], tmp_path / "out")
    found = {row["path"]: row for row in rows(prepared)}
    ids = {path: row["id"] for path, row in found.items()}
    assert len(ids) == len(set(ids.values())) == 14
    because = {path: row["dropped_because"] for path, row in found.items()}
    assert because["8-copy.txt"] == f"exact duplicate of {ids['0.txt']}"
    assert because["9-near.txt"].startswith(f"near duplicate of {ids['1.txt']} (Jaccard similarity 0.")
    assert because["short.txt"].startswith("gopher_min_words") and found["short.txt"]["text"] == "Too short."
    assert because["empty.txt"].startswith("empty") and because["noise.bin"].startswith("unknown type")
    assert found["more.zip/inside/letter.txt"]["text"] == prose(100).strip()
    assert {row["source"] for row in found.values()} == {"texts"} and found["0.txt"]["language"]
    kept = [row["text"] for row in rows(prepared, kept=True)]
    assert len(kept) == 9 and all(not row["dropped_because"] for row in rows(prepared, kept=True))
    assert list(stream_texts(tmp_path / "out")) == kept
    assert sum(prepared.summary["tally"]["sources"]["texts"]["dropped"].values()) == 5


def test_one_changed_file_redoes_only_what_depends_on_it(folder, tmp_path):
    how = Recipe(sizes=Sizes(piece_bytes=1, shard_bytes=6000))
    runner = Here()
    before = run([folder], tmp_path / "out", how, runner)
    assert runner.ran.count("extract") == runner.ran.count("clean") == 8
    runner.ran.clear()
    assert run([folder], tmp_path / "out", how, runner).digest == before.digest and runner.ran == []
    (folder / "3.txt").write_text(prose(33))
    after = run([folder], tmp_path / "out", how, runner)
    assert runner.ran.count("extract") == runner.ran.count("clean") == 1 and 1 <= runner.ran.count("write") < len(after.shards)
    assert after.digest == run([folder], tmp_path / "anew", how).digest
    runner.ran.clear()
    (folder / "3.txt").touch()
    run([folder], tmp_path / "out", how, runner)
    assert runner.ran == []


def test_a_changed_rule_does_not_extract_again(folder, tmp_path):
    runner = Here()
    run([folder], tmp_path / "out", runner=runner)
    runner.ran.clear()
    run([folder], tmp_path / "out", recipe(rules={"gopher_min_words": "1000000"}), runner)
    assert "extract" not in runner.ran and "clean" in runner.ran
    assert open_prepared(tmp_path / "out").summary["kept"] == 0


def test_documents_that_come_later_are_appended(folder, tmp_path):
    first = run([folder], tmp_path / "out")
    bytes_before = {shard.name: (first.folder / shard.name).read_bytes() for shard in first.shards}
    lines_before = (tmp_path / "out/manifest.jsonl").read_bytes()
    (folder / "00-comes-first-by-name.txt").write_text(prose(200))
    (folder / "01-copy.txt").write_text(prose(7))
    second = run([folder], tmp_path / "out")
    assert (tmp_path / "out/manifest.jsonl").read_bytes().startswith(lines_before)
    assert {name: (first.folder / name).read_bytes() for name in bytes_before} == bytes_before
    assert [row["text"] for row in rows(second, kept=True)] == [row["text"] for row in rows(first, kept=True)] + [prose(200).strip()]
    assert [row["path"] for row in rows(second, kept=False)] == ["01-copy.txt"]


def test_documents_of_an_earlier_data_set_are_not_taken_again(folder, tmp_path):
    run([folder], tmp_path / "first")
    more = tmp_path / "more"
    more.mkdir()
    for number in range(5, 12):
        (more / f"{number}.txt").write_text(prose(number))
    (more / "near.txt").write_text(edited(prose(2), 1, 0.01))
    prepared = run([more], tmp_path / "second", recipe(against=[str(tmp_path / "first")]))
    dropped = {row["path"]: row["dropped_because"] for row in rows(prepared, kept=False)}
    assert sorted(dropped) == ["5.txt", "6.txt", "7.txt", "near.txt"]
    assert dropped["5.txt"].startswith("exact duplicate of row ") and "first/kept/" in dropped["5.txt"]
    assert dropped["near.txt"].startswith("near duplicate of row ")
    with pytest.raises(DataError, match="holds no prepared data"):
        run([more], tmp_path / "third", recipe(against=[str(folder)]))
    with pytest.raises(UserError, match="--against has no effect with --no-dedup"):
        run([more], tmp_path / "third", recipe(against=[str(tmp_path / "first")], dedup=False))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_reading_of_a_large_file_tells_how_far_it_is(tmp_path, monkeypatch, ending):
    heard = []
    monkeypatch.setattr(within, "hear", heard.append)
    monkeypatch.setattr(within, "_PAUSE", 0.0)
    place = tmp_path / f"records.jsonl{ending}"
    content = "".join(json.dumps({"text": f"{number} {random.Random(number).randbytes(1500).hex()}"}) + "\n" for number in range(700)).encode()
    place.write_bytes(gzip.compress(content, 1) if ending else content)
    extraction.extract(str(tmp_path / "0"), 0, "records", str(place), [place.name], {}, {}, 1 << 20)
    assert heard == sorted(heard) and (ending or len({*heard}) > 1) and 0.5 * place.stat().st_size < heard[-1] <= place.stat().st_size


def test_a_disk_that_takes_no_more_is_told_and_not_that_a_file_was_closed(tmp_path):
    rows = ({**dict.fromkeys(COLUMNS, ""), "text": random.Random(number).randbytes(100).hex()} for number in range(2000))
    with pytest.raises(DataError, match=r"could not write .*File too large"), file_size_limit(20_000), writing(tmp_path / "rows.parquet") as out:
        for row in rows:
            out.add(row)
    with pytest.raises(DataError, match=r"could not write .*File too large"), file_size_limit(20_000):
        duplicates.save(tmp_path / "numbers", np.zeros(10_000))
    assert not list(tmp_path.iterdir())


def test_sources_are_mixed_by_epochs_weights_and_caps(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for number in range(20, 60):
        (other / f"{number}.txt").write_text(prose(number))
    prepared = run([folder, other], tmp_path / "out", recipe(mixes={str(folder): Mix(epochs=2), str(other): Mix(epochs=0.5)}))
    taken = [row["path"] for row in rows(prepared, kept=True) if row["source"] == "texts"]
    assert sorted(taken) == sorted([f"{number}.txt" for number in range(8)] * 2)
    drawn = {row["path"] for row in rows(prepared, kept=True) if row["source"] == "other"}
    assert 10 < len(drawn) < 30
    left = rows(prepared, kept=False)
    page = prepared_page(prepared.summary)
    assert "2 times" in page and "0.5 times" in page and prepared.summary["taken"] == {"texts": 2, "other": 0.5}
    assert len(left) == 40 - len(drawn) and {row["dropped_because"] for row in left} == {"not drawn (other is taken 0.5 times)"}
    equal = run([folder, other], tmp_path / "equal", recipe(mixes={str(folder): Mix(weight=1), str(other): Mix(weight=1)}))
    chars = {name: counts["written_chars"] for name, counts in equal.summary["tally"]["sources"].items()}
    assert 0.6 < chars["texts"] / chars["other"] < 1.6


def test_a_cap_is_the_most_bytes_that_are_taken(tmp_path):
    sources = [tmp_path / "letters", tmp_path / "books"]
    for source in sources:
        source.mkdir()
    for number in range(30):
        (sources[0] / f"{number}.txt").write_text("".join(chr(0x4E00 + each) for each in random.Random(number).randbytes(100)))  # 3 bytes each
    for number in range(3):
        (sources[1] / f"{number}.txt").write_text(prose(number))
    mixes = {str(sources[0]): Mix(cap=7000, epochs=4), str(sources[1]): Mix(cap=int(2.5 * len(prose(0))), epochs=9)}
    prepared = run(sources, tmp_path / "out", recipe(filter=False, mixes=mixes))
    kept = rows(prepared, kept=True)
    taken = {source.name: [len(row["text"].encode()) for row in kept if row["source"] == source.name] for source in sources}
    assert taken["letters"] == [300] * 23 and len(taken["books"]) == 2
    again = run(sources, tmp_path / "twice", recipe(filter=False, mixes={str(sources[0]): Mix(cap=9000 + 1500, epochs=4)}))
    drawn = [row["path"] for row in rows(again, kept=True) if row["source"] == "letters"]
    assert len(drawn) == 35 and len({*drawn}) == 30


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": ["texts"]}, "must be SOURCE=VALUE"),
        ({"epochs": ["nothing=2"]}, "there is no source 'nothing'"),
        ({"epochs": ["texts=0"]}, "above 0"),
        ({"cap": ["texts=much"]}, "an amount of text"),
        ({"weight": ["texts=1"]}, "for all sources or for none"),
        ({"epochs": ["texts=1", "a/texts=2"]}, "was given twice"),
        ({"epochs": ["same=1"]}, "several sources are called 'same', so give the whole path"),
    ],
)
def test_a_wrong_mix_is_told(given, words):
    from cllm.data.preparation.inputs import Source

    sources = [Source("a/texts", "texts"), Source("b/other", "other"), Source("c/same", "c/same"), Source("d/same", "d/same")]
    with pytest.raises(UserError, match=words):
        read_mix(given, sources)
    assert read_mix({"epochs": ["texts=0.5"], "cap": ["b/other/=1.5MB"]}, sources) == {"a/texts": Mix(epochs=0.5), "b/other": Mix(cap=1_500_000)}


def test_a_source_that_would_lose_most_of_its_documents_is_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("cllm.data.preparation.plan.LARGE_LOSS", 5)
    source = tmp_path / "pages"
    source.mkdir()
    for number in range(10):
        (source / f"{number}.txt").write_text(edited(prose(1), number, 0.01))
    asked = []
    with pytest.raises(DataError, match=r"pages would lose 9 of its 10 documents .* --allow-loss, to keep them --no-dedup"):
        run([source], tmp_path / "out", ask=lambda question: bool(asked.append(question)))
    assert len(asked) == 1 and not (tmp_path / "out/prepared.json").exists()
    assert run([source], tmp_path / "out", ask=lambda question: True).summary["kept"] == 1
    assert run([source], tmp_path / "all", recipe(dedup=False)).summary["kept"] == 10


def test_without_a_filter_only_what_has_no_text_is_dropped(folder, tmp_path):
    (folder / "short.txt").write_text("Too short.")
    (folder / "empty.txt").write_text("")
    assert [row["path"] for row in rows(run([folder], tmp_path / "out", recipe(filter=False)), kept=False)] == ["empty.txt"]


def test_a_folder_whose_manifest_or_shards_are_damaged_is_told(folder, tmp_path):
    prepared = run([folder], tmp_path / "out")
    place = prepared.folder / prepared.shards[0].name
    content = place.read_bytes()
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"other": [1]}), place)
    with pytest.raises(DataError, match=r"lacks some of the columns text, .* Remove it and run the same cllm prepare again"):
        rows(prepared)
    place.write_bytes(content[:100])
    with pytest.raises(DataError, match=r"cannot be read as Parquet: .*[^.]\. Remove it"):
        rows(prepared)
    manifest = prepared.folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"manifest\.jsonl cannot be read"):
        open_prepared(prepared.folder)
    assert len(rows(run([folder], tmp_path / "out"), kept=True)) == 8


def test_hostile_text_is_text_on_the_page(folder, tmp_path):
    (folder / "<b>.txt").write_text(prose(300) + "\n<script>alert(1)</script>\n")
    (folder / "<img src=x>.bin").write_bytes(b"\0\1\2" * 100)
    page = prepared_page(run([folder], tmp_path / "out").summary)
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert "&lt;img src=x&gt;.bin" in page


def test_what_is_in_a_folder_can_be_looked_at(folder, tmp_path):
    first = run([folder], tmp_path / "first")
    (folder / "3.txt").write_text(prose(3) + "\nHeat pumps are quiet.\n")
    (folder / "4.txt").write_text(prose(5))
    (folder / "8.txt").write_text(prose(8))
    (folder / "0.txt").unlink()
    second = run([folder], tmp_path / "second")
    assert look.find_document(second, "8.txt")["text"] == look.find_document(second, "texts/8.txt")["text"] == prose(8).strip()
    assert look.find_document(second, look.find_document(second, "8.txt")["id"])["path"] == "8.txt"
    ((row, place),) = look.search(second, "heat PUMPS".lower())
    assert row["path"] == "3.txt" and row["text"][place:].startswith("Heat pumps")
    assert [row["path"] for row, _ in look.search(second, "exact duplicate", dropped=True)] == ["5.txt"]
    found = look.difference(first, second)
    assert {kind: [entry[0] for entry in entries] for kind, entries in found.items()} == {
        "added": ["texts/8.txt"],
        "removed": ["texts/0.txt"],
        "changed": ["texts/3.txt", "texts/4.txt"],
        "decided otherwise": ["texts/5.txt"],
    }
    assert look.figures(second)["dropped_because"] == {"exact duplicate": 1}
    with pytest.raises(DataError, match=r"no document's path or address ends with 'nothing'"):
        look.find_document(second, "nothing")


def test_a_manifest_that_was_cut_by_a_kill_is_gone_on_with(folder, tmp_path):
    before = run([folder], tmp_path / "out")
    place = tmp_path / "out/manifest.jsonl"
    whole = place.read_bytes()
    place.write_bytes(whole + b'{"name": "kept/000009.parquet", "rows": 1, "bytes": 1, "blake2b": "", "content": ""}\n{"na')
    assert open_prepared(tmp_path / "out").shards == before.shards
    (folder / "8.txt").write_text(prose(8))
    run([folder], tmp_path / "out")
    lines = [json.loads(line) for line in place.read_bytes().splitlines()]
    assert place.read_bytes().startswith(whole) and "run" in lines[-1]


def test_what_is_not_there_is_told(tmp_path, folder):
    with pytest.raises(UserError, match="does not exist"):
        run([tmp_path / "nothing"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no files"):
        run([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(UserError, match="is one of the sources"):
        run([folder], folder)
    with pytest.raises(UserError, match=r"there is no rule gopher_min_wrds\. Did you mean gopher_min_words"):
        run([folder], tmp_path / "out", recipe(rules={"gopher_min_wrds": "3"}))
