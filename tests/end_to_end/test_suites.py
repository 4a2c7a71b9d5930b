"""`cllm evaluate --suite` as a user types it, on a run that was really trained."""

import shutil

import pytest
from command import cllm

SMALL = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 256, "--batch-size", 2, "--vocab-size", 320, "--threads", 2)


@pytest.fixture(scope="module")
def suite_run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("suite") / "run"
    ran = cllm("train", text, "--out", out, "--steps", 4, "--learning-rate", "3e-3", "--fim-rate", 0.5, *SMALL)
    assert ran.status == 0, ran.err
    return out


@pytest.fixture(scope="module")
def held_out(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    for name in ("one/decoder.py", "two/heapq.py"):
        (folder / name).parent.mkdir()
        source = text / "json" / "decoder.py" if "decoder" in name else text / "heapq.py"
        (folder / name).write_text(source.read_text().replace("self", "this"))
    return folder


def is_share(value):
    low, high = value["interval"] or (0, 1)
    return 0 <= value["hits"] <= value["trials"] and low <= (value["share"] or 0) <= high


def test_the_code_suite_has_a_baseline_beside_every_figure(suite_run, held_out):
    results = [cllm("evaluate", suite_run, held_out, "--suite", "code", "--samples", 3, "--threads", threads, "--json").json for threads in (1, 3)]
    found = results[0]
    assert results[0] == results[1]
    assert found["suite"] == "code" and found["num_documents"] == 2 and found["trained_on_files"] == 0 and found["ngram_tokens"] > 1000
    assert set(found["bits_per_byte"]) == {"model", "ngram", "gzip", "xz"} and all(0 < each < 20 for each in found["bits_per_byte"].values())
    assert set(found["functions"]) == {"model", "ngram", "held_out"} and set(found["next_line"]) == {"model", "model_fim", "ngram", "line_before"}
    for each in found["functions"].values():
        assert each["parse"]["trials"] == 3 and all(map(is_share, each.values())) and each["compile"]["hits"] <= each["parse"]["hits"]
    for each in found["next_line"].values():
        assert is_share(each["exact"]) and 0 <= each["edit_similarity"] <= 1


def test_the_run_fills_in_a_middle_as_the_file_that_is_exported_from_it(suite_run, tmp_path):
    asked = ("--prompt", "def first(items):\n", "--suffix", "\n\ndef second(items):\n", "--max-tokens", 8, "--temperature", 0, "--json")
    found = cllm("generate", suite_run, *asked)
    assert found.status == 0 and found.json["finish_reasons"][0] in ("length", "end"), found.err
    exported = cllm("export", suite_run, "--to", "cllm", "--out", tmp_path / "m.cllm")
    assert exported.status == 0 and cllm("generate", tmp_path / "m.cllm", *asked).json["texts"] == found.json["texts"], exported.err


def test_the_prose_suite_has_a_baseline_beside_every_figure(suite_run, held_out):
    ran = cllm("evaluate", suite_run, held_out, "--suite", "prose", "--samples", 3, "--threads", 1, "--json")
    found = ran.json
    assert "coherence" in ran.err and "held-out beginnings" in ran.err
    for name in ("coherence", "relevance"):
        assert set(found[name]) == {"model", "ngram", "words"} and all(map(is_share, found[name].values())) and found[name]["model"]["trials"] == 3
    assert set(found["samples"]) == {"model", "ngram", "held_out"}
    for each in found["samples"].values():
        assert is_share(each["memorised"]) and 0 <= each["repetition"] <= 1 and all(0 <= each[f"distinct_{n}"] <= 1 for n in (1, 2, 3))


def test_text_that_was_trained_on_is_told_and_counts_as_memorised_where_it_is_copied(suite_run, text):
    found = cllm("evaluate", suite_run, text, "--suite", "prose", "--samples", 12, "--threads", 1, "--json").json
    assert found["trained_on_files"] > 0 and found["samples"]["held_out"]["memorised"]["share"] > 0.5


def test_a_mistake_gets_one_clear_line(run, suite_run, held_out, text, tmp_path):
    (tmp_path / "short.txt").write_text("too short " * 3)
    (tmp_path / "bare").mkdir()
    shutil.copytree(suite_run / "checkpoints", tmp_path / "bare" / "checkpoints")
    for arguments, words in (
        ([suite_run, tmp_path / "short.txt", "--suite", "code"], "holds no file whose name ends in .py"),
        ([suite_run, tmp_path / "short.txt", "--suite", "prose"], "no held-out document has 160 tokens"),
        ([run, held_out, "--suite", "code"], "no function of the held-out Python files leaves room"),
        ([tmp_path / "bare", held_out, "--suite", "prose"], "are missing"),
        ([suite_run, "--suite", "code"], "give either DATA"),
        ([suite_run, "--suite", "code", "--tasks", "x"], "--suite is measured on text"),
        ([suite_run, held_out, "--suite", "poems"], "--suite"),
    ):
        ran = cllm("evaluate", *arguments, "--threads", 1)
        assert ran.status != 0 and words in ran.err and ran.err.count("error: ") == 1, ran.err
