"""`cllm prepare` and `cllm data` as they are typed."""

import os
import signal

import pytest
from command import Started, cllm, wait_until
from made import prose

pytest.importorskip("pyarrow", reason="the data extra is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = tmp_path_factory.mktemp("box") / "papers"
    source.mkdir()
    for number in range(30):
        (source / f"{number:02}.txt").write_text(prose(number, 60))
    (source / "copy.txt").write_text(prose(0, 60))
    (source / "empty.pdf").write_text("")
    (source / "\x1b[31mred.bin").write_bytes(b"\0\1\2\3" * 100)
    return source


def test_a_box_of_files_is_prepared_and_looked_into(folder, tmp_path):
    out = tmp_path / "prepared"
    done = cllm("prepare", folder, "--out", out, "--workers", 2)
    assert done.status == 0
    assert "33 files gave 33 documents." in done.out and "kept     30" in done.out and "exact duplicate" in done.out
    assert "papers/empty.pdf: empty" in done.out and "\x1b" not in done.out + done.err
    assert done.out.splitlines()[-1] == f"Next: cllm train {out}"
    assert "Reading documents" in done.err
    again = cllm("prepare", folder, "--out", out, "--json")
    assert again.json["kept"] == 30 and "Reading documents" not in again.err
    shown = cllm("data", "show", out, "07.txt")
    assert prose(7, 60).split("\n")[0] in shown.out and "00000000" in shown.out
    listed = cllm("data", "show", out, "--count", 2).out.splitlines()
    assert listed[-1] == "2 of 30 documents; see --count" and len(listed) == 3
    assert "documents; see" not in cllm("data", "show", out, "--count", 30).out
    assert cllm("data", "search", out, "exact duplicate", "--dropped", "--json").json["documents"][0]["path"] == "copy.txt"
    first = prose(7, 60).split()[:12]
    found = cllm("data", "search", out, f"{first[9]} {first[0]} 07.txt", "--json").json["documents"]
    assert [each["path"] for each in found] == ["07.txt"], "all words, in any order, in the text and the path"
    found = cllm("data", "search", out, f'"{" ".join(first)}" 07', "--json").json["documents"]
    assert [each["path"] for each in found] == ["07.txt"] and found[0]["around"].startswith(" ".join(first[:5]))
    assert not cllm("data", "search", out, f'"{first[9]} {first[0]}" 07.txt', "--json").json["documents"], "not in a row"
    assert cllm("data", "stats", out, "--json").json["digest"] == again.json["digest"]
    assert cllm("data", "diff", out, out).out == "no difference\n"


def test_signals_end_it_with_its_workers_and_the_next_run_goes_on(folder, tmp_path):
    out = tmp_path / "prepared"
    for number, stage in ((signal.SIGINT, "extract"), (signal.SIGTERM, "clean")):
        process = Started("prepare", folder, "--out", out, "--workers", 2)
        wait_until((out / ".ledger" / stage).is_dir, process)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == 130
        assert said.splitlines()[-1] == "interrupted; nothing is lost: the same command goes on where this one stopped"
    assert not [each for each in os.listdir(out) if each.endswith((".parquet", ".html"))]
    assert cllm("data", "stats", out).err == f"error: {out} holds no prepared data yet. Run the same cllm prepare again.\n"
    assert cllm("prepare", folder, "--out", out, "--json").json["kept"] == 30


def test_mistakes_are_told_in_a_line(folder, tmp_path):
    out = tmp_path / "prepared"
    for arguments, words in (
        ((tmp_path / "nothing",), "does not exist. Give a folder, a file, an archive or the folder of a crawl."),
        ((folder, "--rule", "gopher"), "--rule must be NAME=VALUE, got 'gopher'."),
        ((folder, "--rule", "gopher_min_words=few"), "gopher_min_words is a whole number"),
        ((folder, "--epochs", "books=2"), "there is no source 'books'. The sources are papers."),
        ((folder, "--runner", "dask://10.0.0.1:8786"), "must be encrypted"),
        ((folder, "--against", folder), "holds no prepared data"),
    ):
        done = cllm("prepare", *arguments, "--out", out)
        assert done.status in (1, 2) and words in done.err and len(done.err.strip().splitlines()) <= 2, done.err


def test_a_rule_that_drops_most_documents_is_named_with_how_to_switch_it_off(tmp_path):
    source = tmp_path / "notes"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.txt").write_text(" ".join(prose(number, 60).replace("\n", " ").replace(".", "").split()) + ".")
    done = cllm("prepare", source, "--out", tmp_path / "out", "--workers", 1)
    assert "--rule c4_min_sentences=off" in done.out, done.out
    kept = cllm("prepare", source, "--out", tmp_path / "out", "--rule", "c4_min_sentences=off", "--workers", 1)
    assert "kept     3" in kept.out and "--rule" not in kept.out
