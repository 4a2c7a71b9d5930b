"""From a folder to packed tokens: the split, the cache by content, and clear errors for what cannot be used."""

import errno
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.data import Dataset, is_packed, train_tokenizer
from cllm.data.documents.scan import ROW
from cllm.data.documents.sides import TRAIN, VAL, default_val_fraction, plan_split
from cllm.data.pipeline import prepare
from cllm.data.tokens.dataset import read_info
from cllm.data.tokens.shards import ShardWriter
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.runtime.errors import DataError, UserError

WORDS = "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were".split()  # noqa: SIM905


def sentence(seed, num_words=200):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + str(rng.randrange(30)) for _ in range(num_words)) + "\n"


def fill(folder, count=60):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.txt").write_text(sentence(i))
    return folder


def states(dataset):
    return {step: state for step, state, _ in dataset.steps}


def text_of(dataset, split):
    return dataset.tokenizer.decode(split.read(0, split.num_tokens))


def documents_of(dataset, split):
    starts = [*map(int, split.document_starts), split.num_tokens]
    ids = split.read(0, split.num_tokens)
    return {split.document_name(i): ids[a:b].tolist() for i, (a, b) in enumerate(pairwise(starts))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory):
    return prepare(folder, tmp_path_factory.mktemp("out"), "bpe", 512)


def test_every_document_is_packed_whole_on_one_side_and_ends_with_the_end_token(folder, dataset):
    packed = documents_of(dataset, dataset.train) | documents_of(dataset, dataset.val)
    assert sorted(packed) == sorted(path.name for path in folder.iterdir())
    for name, ids in packed.items():
        assert ids[-1] == dataset.tokenizer.eot_id and dataset.tokenizer.eot_id not in ids[:-1]
        assert dataset.tokenizer.decode(ids) == (folder / name).read_text()
    texts = sum(path.stat().st_size for path in folder.iterdir())
    assert dataset.train.num_bytes + dataset.val.num_bytes == texts
    assert dataset.train.num_documents + dataset.val.num_documents == 60
    assert 0.03 <= dataset.val.num_bytes / texts <= 0.3
    dataset.verify()
    assert dataset.info["split"] == {"method": "hash", "val_fraction": 0.1}


def test_a_second_run_redoes_nothing_and_a_change_redoes_what_depends_on_it(tmp_path):
    data, out = fill(tmp_path / "data"), tmp_path / "out"
    lines = []
    first = prepare(data, out, "bpe", 320, log=lines.append)
    assert states(first) == {"files": "done", "tokenizer": "done", "tokens": "done"}
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    lines.clear()
    again = prepare(data, out, "bpe", 320, log=lines.append)
    assert states(again) == {"files": "cached", "tokenizer": "cached", "tokens": "cached"}
    assert sum("(cached)" in line for line in lines) == 3
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    assert states(prepare(data, out, "bpe", 384)) == {"files": "cached", "tokenizer": "done", "tokens": "done"}
    (data / "000.txt").touch()  # new times, same content
    assert states(prepare(data, out, "bpe", 384)) == {"files": "done", "tokenizer": "cached", "tokens": "cached"}
    (data / "000.txt").write_text(sentence(1000))
    changed = prepare(data, out, "bpe", 384)
    assert states(changed) == {"files": "done", "tokenizer": "done", "tokens": "done"}
    assert sentence(1000) in text_of(changed, changed.train) + text_of(changed, changed.val)


def test_tokens_of_other_text_another_split_or_another_tokenizer_are_kept_where_asked(tmp_path):
    data, out = fill(tmp_path / "data", 20), tmp_path / "out"
    first = prepare(data, out, "bpe", 320, keep_others=True)
    kept = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    (data / "000.txt").write_text(sentence(1000))
    others = [prepare(data, out, *how, keep_others=True) for how in (("bpe", 320), ("bpe", 320, 0.3), ("char",))]
    assert len({first.folder, *(each.folder for each in others)}) == 4
    assert all(path.read_bytes() == content for path, content in kept.items())
    (data / "000.txt").write_text(sentence(0))
    again = prepare(data, out, "bpe", 320, keep_others=True)
    assert again.folder == first.folder and states(again)["tokens"] == "cached"
    assert all(read_info(each.folder)["key"].startswith(each.folder.name.removeprefix("tokens-")) for each in (first, *others))


def test_tokens_in_the_folder_of_older_runs_are_used_on_and_never_replaced(tmp_path):
    data, out = fill(tmp_path / "data", 20), tmp_path / "out"
    old = prepare(data, out, "bpe", 320)
    assert old.folder == out / "tokens"
    assert prepare(data, out, "bpe", 320, keep_others=True).folder == out / "tokens"
    (data / "000.txt").write_text(sentence(1000))
    assert prepare(data, out, "bpe", 320, keep_others=True).folder != out / "tokens"
    assert Dataset.open(out).info == old.info


def test_a_run_that_is_being_prepared_is_not_text(tmp_path):
    data = fill(tmp_path / "data", 20)
    prepare(data, data / "runs" / "a" / "data", "bpe", 320, keep_others=True)
    for name in ("config.toml", ".lock"):
        (data / "runs" / "b").mkdir(exist_ok=True)
        (data / "runs" / "b" / name).touch()
    dataset = prepare(data, tmp_path / "out", "bpe", 320)
    assert dataset.info["num_files"] == 20 and dataset.info["skipped"]["output of cllm"]["count"] == 2


def test_damaged_caches_are_made_again(tmp_path):
    data, out = fill(tmp_path / "data", 20), tmp_path / "out"
    good = prepare(data, out, "bpe", 512)
    tokens = good.train.read(0, good.train.num_tokens)
    for name in (
        "sources.json",
        "sources.bin",
        "tokenizer.json",
        "training.json",
        "tokens/dataset.json",
        "tokens/train/index.json",
        "tokens/train/shard-00000.bin",
    ):
        (out / name).write_bytes(b"{damaged")
        again = prepare(data, out, "bpe", 512)
        assert np.array_equal(again.train.read(0, again.train.num_tokens), tokens)
        assert again.tokenizer == good.tokenizer


def test_one_file_is_split_by_position_at_the_same_character_as_nanogpt(tmp_path):
    text = "".join(sentence(i) for i in range(9)) + "\u00e9"
    (tmp_path / "book.txt").write_text(text, "utf-8")
    dataset = prepare(tmp_path / "book.txt", tmp_path / "out", "char")
    cut = int(0.9 * len(text))
    assert text_of(dataset, dataset.train) == text[:cut] and text_of(dataset, dataset.val) == text[cut:]
    assert dataset.tokenizer.vocab_size == len(set(text)), "one id for each character and nothing else"
    assert dataset.train.num_tokens == cut and dataset.val.num_bytes == len(text[cut:].encode("utf-8"))
    assert dataset.unigram_nats() == dataset.val.unigram_nats(dataset.train) > 0


def test_a_few_documents_each_give_their_end(tmp_path):
    fill(tmp_path / "data", 2)
    dataset = prepare(tmp_path / "data", tmp_path / "out", "char", val_fraction=0.25)
    assert dataset.info["split"]["method"] == "position" and dataset.tokenizer.eot_id is not None
    assert dataset.train.num_documents == dataset.val.num_documents == 2
    for i in range(2):
        whole = sentence(i)
        cut = int(0.75 * len(whole))
        assert whole[:cut] in text_of(dataset, dataset.train) and whole[cut:] in text_of(dataset, dataset.val)


def rows_of(texts):
    return np.array([(hash_, size, size) for hash_, size in texts], dtype=ROW)


def test_documents_keep_their_side_when_others_arrive_and_identical_ones_stay_together():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 4000, dtype=np.uint64)
    rows = rows_of([(key, 100) for key in keys])
    whole = plan_split(rows, 0.1)
    assert whole.method == "hash" and 0.08 < (whole.sides == VAL).mean() < 0.12
    assert (plan_split(rows[:1500], 0.1).sides == whole.sides[:1500]).all()
    doubled = plan_split(np.concatenate([rows, rows[::-1]]), 0.1)
    assert (doubled.sides[:4000] == doubled.sides[4000:][::-1]).all()


@pytest.mark.parametrize(
    "megabytes, validation",
    [(0.2, 0.02), (1, 0.1), (10, 1.0), (50, 1.0), (100, 1.0), (288, 2.88), (800, 8.0), (50_000, 8.0)],
)
def test_validation_is_a_tenth_of_small_texts_and_bounded_on_large_ones(megabytes, validation):
    size = round(megabytes * 1e6)
    assert default_val_fraction(size) * size == pytest.approx(validation * 1e6)
    rng = np.random.default_rng(1)  # documents of very different sizes, as in real folders
    shares = rng.lognormal(sigma=1.5, size=20_000)
    rows = rows_of(zip(rng.integers(0, 2**64, 20_000, dtype=np.uint64), np.maximum(1, shares / shares.sum() * size)))
    plan, total = plan_split(rows, None), int(rows["bytes"].sum())
    assert plan.val_fraction == default_val_fraction(total) and plan.sides is not None
    assert 0.3 * validation * 1e6 <= total - plan.train_bytes(rows) <= 2 * validation * 1e6
    assert plan_split(rows, 0.1).val_fraction == 0.1, "what is given is honoured"


@given(st.lists(st.integers(1, 10**12), min_size=2, max_size=20))
def test_text_that_is_added_only_ever_moves_documents_out_of_validation(sizes):
    fractions = [default_val_fraction(size) for size in sorted(sizes)]
    assert fractions == sorted(fractions, reverse=True) and all(0 < each <= 0.1 for each in fractions)


def test_few_documents_are_shared_out_in_the_order_of_their_hashes():
    rows = rows_of([(2**64 - 1 - i, 100) for i in range(10)] * 2)  # ten texts, twice each, none of them below the threshold
    plan = plan_split(rows, 0.1)
    assert plan.method == "hash order" and (plan.sides == VAL).sum() == 2
    assert plan.sides[9] == plan.sides[19] == VAL, "the smallest hash, both times"
    assert plan_split(rows, 0.0).sides.tolist() == [TRAIN] * 20
    assert plan_split(rows_of([(0, 100), (1, 1)]), 0.1).sides is None, "all of it would be validation"
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="val_fraction"):
            plan_split(rows, wrong)


def test_a_given_tokenizer_is_used_and_checked(folder, dataset, tmp_path):
    again = prepare(folder, tmp_path / "a", dataset.tokenizer)
    assert states(again)["tokenizer"] == "given" and again.train.num_tokens == dataset.train.num_tokens
    dataset.tokenizer.save(tmp_path / "t.json")
    assert prepare(folder, tmp_path / "a", tmp_path / "t.json").tokenizer == dataset.tokenizer
    other = Tokenizer.train(["other text"], 320)
    with pytest.raises(DataError, match="packed with another tokenizer"):
        Dataset.open(dataset.folder, tokenizer_hash=other.hash)
    with pytest.raises(DataError, match="packed with another tokenizer"):
        prepare(dataset.folder, tmp_path / "b", other)
    with pytest.raises(UserError, match="bpe, wordpiece, unigram, char or the path"):
        prepare(folder, tmp_path / "c", "words")


def test_packed_tokens_are_recognised_wherever_they_are_moved(dataset, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for source in dataset.folder.rglob("*"):
        target = moved / source.relative_to(dataset.folder)
        target.mkdir() if source.is_dir() else target.write_bytes(source.read_bytes())
    assert is_packed(moved) and is_packed(dataset.folder.parent) and not is_packed(tmp_path)
    opened = prepare(moved, tmp_path / "unused")
    assert opened.train.num_tokens == dataset.train.num_tokens and not (tmp_path / "unused").exists()
    (moved / "tokenizer.json").write_text(Tokenizer.train(["x"], 320).to_json())
    with pytest.raises(DataError, match="not the tokenizer of these tokens"):
        Dataset.open(moved)
    info = json.loads((moved / "dataset.json").read_text())
    (moved / "dataset.json").write_text(json.dumps(info | {"version": 99}))
    with pytest.raises(DataError, match="version 99"):
        Dataset.open(moved)


def test_jsonl_documents_and_their_line_numbers_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(50)) + "broken\n")
    lines = []
    dataset = prepare(tmp_path / "a.jsonl", tmp_path / "out", vocab_size=320, log=lines.append)
    names = documents_of(dataset, dataset.train) | documents_of(dataset, dataset.val)
    assert sorted(names, key=lambda name: int(name.split(":")[1])) == [f"a.jsonl:{i}" for i in range(1, 51)]
    assert dataset.info["skipped"]["record that is not valid JSON"]["examples"] == ["a.jsonl:51"]
    assert any("1 record that is not valid JSON: a.jsonl:51" in line for line in lines)


def test_the_training_sample_is_bounded_and_recorded(folder, tmp_path):
    prepare(folder, tmp_path / "out", "bpe", 512, sample_bytes=20_000)
    sample = json.loads((tmp_path / "out" / "training.json").read_text())["sample"]
    assert 8_000 < sample["bytes"] < 40_000 < sample["of_bytes"] and sample["share"] < 0.5
    assert train_tokenizer(folder, 512, sample_bytes=20_000) == train_tokenizer(folder, 512, sample_bytes=20_000)


def test_the_tokenizer_never_sees_validation_text(folder, dataset):
    training = [(folder / name).read_text() for name in documents_of(dataset, dataset.train)]
    assert Tokenizer.train(training, 512) == dataset.tokenizer


def test_no_text_is_an_error_that_says_what_was_found(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        prepare(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is empty\. Text, Markdown"):
        prepare(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries" / "a.bin").write_bytes(bytes(100))
    (tmp_path / "binaries" / "b").write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"holds no text\. Left out: 1 binary \(\.bin\): a\.bin; 1 binary \(zero bytes\): b"):
        prepare(tmp_path / "binaries", tmp_path / "out")
    with pytest.raises(DataError, match=r"it is binary \(zero bytes\)"):
        prepare(tmp_path / "binaries" / "b", tmp_path / "out")
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(DataError, match="1 character of text, too little"):
        prepare(tmp_path / "one.txt", tmp_path / "out")
    (tmp_path / "nothing.txt").touch()
    with pytest.raises(DataError, match="it is empty"):
        prepare(tmp_path / "nothing.txt", tmp_path / "out")
    assert not (tmp_path / "out" / "tokens").exists()


def test_a_full_disk_is_reported_and_leaves_no_tokens(folder, tmp_path, monkeypatch):
    def full(self, ids):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append", full)
    with pytest.raises(DataError, match="disk is full"):
        prepare(folder, tmp_path / "out", "char")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sources.bin", "sources.json", "tokenizer.json", "training.json"]
    monkeypatch.undo()
    assert prepare(folder, tmp_path / "out", "char").train.num_tokens > 0


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    data = fill(tmp_path / "data", 3)
    real = Tokenizer.train.__func__

    def train(cls, texts, *args, **kwargs):
        tokenizer = real(cls, texts, *args, **kwargs)
        (data / "001.txt").write_text("shorter")
        return tokenizer

    monkeypatch.setattr(Tokenizer, "train", classmethod(train))
    with pytest.raises(DataError, match=r"001.txt changed while it was being read"):
        prepare(data, tmp_path / "out", "bpe", 320)


def test_what_is_written_into_the_data_folder_is_not_data(tmp_path):
    data = fill(tmp_path / "data", 20)
    first = prepare(data, data / "out", "bpe", 320)
    again = prepare(data, data / "out", "bpe", 320)
    assert states(again) == {"files": "cached", "tokenizer": "cached", "tokens": "cached"}
    assert first.train.num_tokens == again.train.num_tokens


def test_what_is_told_of_little_text_is_grammar(tmp_path):
    (tmp_path / "one.txt").write_text("A text of a few words that is its only document. " * 5)
    said = []
    prepare(tmp_path / "one.txt", tmp_path / "out", "bpe", 320, 0.0, log=said.append)
    assert [line.strip() for line in said] == [
        "files: 1 file, 1 document, 245 bytes of text (done)",
        "tokenizer: bpe, 320 tokens, learned from 245 bytes of text (done)",
        said[2],
    ]
    assert re.fullmatch(r"tokens: \d+ in 1 document, \d\.\d\d bytes a token \(done\)", said[2])
    said.clear()
    prepare(fill(tmp_path / "data", 20), tmp_path / "out2", "bpe", 320, 0.05, log=said.append)
    assert "1 document, chosen by the hash of its text" in said[1]
    assert re.search(r"tokens: train [\d,]+ in 19 documents, val [\d,]+ in 1 document, ", said[-1])
    (tmp_path / "data" / "020.txt").write_text("Another.")
    said.clear()
    prepare(tmp_path / "data", tmp_path / "out2", "bpe", 320, 0.05, log=said.append)
    assert "(1 read, the others cached)" in said[0]


def test_a_split_that_leaves_nothing_for_training_names_the_setting(tmp_path):
    (tmp_path / "a.txt").write_text("abc " * 650)
    with pytest.raises(DataError, match=r"of the 2,600 characters of text in .*a.txt, val_fraction=0.9999 leaves none for training.*smaller"):
        prepare(tmp_path / "a.txt", tmp_path / "out", "bpe", 320, 0.9999)


def test_progress_counts_bytes_up_to_the_end(folder, tmp_path):
    calls = []
    prepare(folder, tmp_path / "out", "bpe", 320, progress=lambda step, done, total: calls.append((step, done, total)))
    total = sum(path.stat().st_size for path in Path(folder).iterdir())
    for step in ("Reading files", "Reading text for the tokenizer", "Packing tokens"):
        own = [(done, of) for name, done, of in calls if name == step]
        assert own == sorted(own) and own[-1] == (total, total)


def test_progress_counts_only_the_files_that_are_read_so_that_those_read_before_do_not_shorten_the_time_left(tmp_path):
    data = fill(tmp_path / "data", 20)
    prepare(data, tmp_path / "out", "bpe", 320)
    (data / "007.txt").write_text("Another text than before. " * 20)
    calls = []
    again = prepare(data, tmp_path / "out", "bpe", 320, progress=lambda step, done, total: calls.append((step, done, total)))
    size = (data / "007.txt").stat().st_size
    assert [(done, of) for name, done, of in calls if name == "Reading files"] == [(size, size)]
    assert states(again)["files"] == "done"
    fresh = prepare(data, tmp_path / "fresh", "bpe", 320)
    assert fresh.train.read(0, fresh.train.num_tokens).tolist() == again.train.read(0, again.train.num_tokens).tolist()
    third = prepare(data, tmp_path / "out", "bpe", 320)
    assert states(third)["files"] == "cached" and third.train.num_tokens == fresh.train.num_tokens
