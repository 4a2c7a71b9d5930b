"""Token shards: what is written is read back, damage is noticed, and a failure leaves nothing half-written."""

import errno
import json
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data import TokenSplit
from cllm.data.tokens.shards import ShardWriter
from cllm.files import DATA, new_folder
from cllm.runtime.errors import DataError

HASH = "0" * 64


def write(folder, documents, vocab_size=100, shard_tokens=7, tokenizer=HASH):
    with new_folder(folder, DATA) as temporary:
        writer = ShardWriter(temporary, vocab_size, tokenizer, 0, shard_tokens)
        for number, ids in enumerate(documents):
            half = len(ids) // 2
            writer.append(np.array(ids[:half], dtype=np.int64))
            writer.append(np.array(ids[half:], dtype=np.int64))
            writer.end_document(f"document {number}\n\u2603", num_chars=len(ids), num_bytes=2 * len(ids))
        writer.close()
    return TokenSplit(folder)


@given(st.lists(st.lists(st.integers(0, 99), max_size=30), max_size=8), st.integers(1, 9), st.sampled_from([100, 70000]))
@settings(max_examples=40, deadline=None)
def test_every_slice_reads_back_across_shards(tmp_path_factory, documents, shard_tokens, vocab_size):
    split = write(tmp_path_factory.mktemp("x") / "split", documents, vocab_size, shard_tokens)
    stream = [i for ids in documents for i in ids]
    kept = [ids for ids in documents if ids]
    assert split.num_tokens == len(stream) and split.num_documents == len(kept)
    assert split.read(0, len(stream)).tolist() == stream
    for start in range(len(stream)):
        count = min(5, len(stream) - start)
        assert split.read(start, count).tolist() == stream[start : start + count]
    assert split.document_starts.tolist() == [sum(map(len, kept[:i])) for i in range(len(kept))]
    assert [split.document_at(int(start)) for start in split.document_starts] == list(range(len(kept)))
    assert split.token_counts().tolist() == np.bincount(stream, minlength=vocab_size).tolist()
    assert split.dtype.itemsize == (2 if vocab_size == 100 else 4)
    split.verify()


def test_a_split_may_have_more_shards_than_a_process_may_open_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        split = write(tmp_path / "split", [list(range(1, 100))] * 21)
        assert split.read(0, split.num_tokens).tolist() == list(range(1, 100)) * 21 and len(list((tmp_path / "split").glob("shard-*"))) == 297
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_names_and_sizes_of_documents_are_kept(tmp_path):
    split = write(tmp_path / "split", [[1, 2], [3], [4, 5, 6]])
    assert [split.document_name(i) for i in range(3)] == [f"document {i}\n\u2603" for i in range(3)]
    assert split.num_chars == 6 and split.num_bytes == 12 and split.eot_id == 0
    with pytest.raises(DataError, match="3 documents"):
        split.document_name(3)


def test_an_empty_split_can_be_opened(tmp_path):
    split = write(tmp_path / "split", [])
    assert split.num_tokens == 0 and split.unigram_nats() == 0.0 and split.read(0, 0).tolist() == []


def test_unigram_entropy_is_that_of_the_token_frequencies(tmp_path):
    even = write(tmp_path / "even", [[1, 2, 3, 4] * 5])
    assert even.unigram_nats() == pytest.approx(np.log(4))
    assert even.unigram_nats_per_byte() == pytest.approx(np.log(4) / 2)
    other = write(tmp_path / "other", [[1] * 100])
    assert other.unigram_nats() == 0.0
    expected = -np.mean(np.log([(count + 1) / (100 + 100) for count in (100, 0, 0, 0)]))
    assert even.unigram_nats(other) == pytest.approx(expected), "tokens that the reference never saw count as seen once"


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    write(tmp_path / "split", [[1, 2, 3]])
    with pytest.raises(DataError, match="packed with another tokenizer"):
        TokenSplit(tmp_path / "split", tokenizer_hash="1" * 64)
    assert TokenSplit(tmp_path / "split", tokenizer_hash=HASH).num_tokens == 3


def test_every_damaged_byte_is_noticed_by_verify_and_every_wrong_size_at_once(tmp_path):
    split = write(tmp_path / "split", [[1, 2, 3] * 5, [4]])
    files = sorted(path for path in (tmp_path / "split").iterdir() if path.name != "index.json")
    assert [path.name for path in files] == ["counts.bin", "documents.jsonl", "offsets.bin", "shard-00000.bin", "shard-00001.bin", "shard-00002.bin"]
    for path in files:
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with pytest.raises(DataError, match=f"{path.name} has {len(good) - 1} bytes, and {len(good)} were expected"):
            TokenSplit(split.folder)
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name} is missing"):
            TokenSplit(split.folder)
        middle = len(good) // 2
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        with pytest.raises(DataError, match=f"{path.name} is damaged"):
            TokenSplit(split.folder).verify()
        path.write_bytes(good)
    TokenSplit(split.folder).verify()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"}, {"version": 99}, {"dtype": "float64"}, {"num_tokens": 5}, {"num_documents": 9}, {"vocab_size": "many"}, {"shards": None},
        {"shards": [{"file": "../../outside", "size": 6, "blake2b": ""}]}, {"offsets": {"file": "offsets.bin"}}, {"tokenizer": ...},
    ],
)  # fmt: skip
def test_a_foreign_index_is_refused_in_one_clear_line(tmp_path, change):
    write(tmp_path / "split", [[1, 2, 3]])
    path = tmp_path / "split" / "index.json"
    index = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not ...}
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index.json is not a valid index of packed tokens: .*cllm pack") as caught:
        TokenSplit(tmp_path / "split")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_an_unreadable_index_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="index"):
        TokenSplit(tmp_path)
    with pytest.raises(DataError, match="no packed tokens"):
        TokenSplit(tmp_path / "nowhere")


def test_a_full_disk_leaves_what_was_there_and_says_so(tmp_path, monkeypatch):
    write(tmp_path / "split", [[1, 2, 3]])
    before = sorted(tmp_path.rglob("*"))
    real = ShardWriter.append

    def full(self, ids):
        real(self, ids)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append", full)
    with pytest.raises(DataError, match=r"split, the disk is full: No space left on device \(.* free\)\..*nothing half-written"):
        write(tmp_path / "split", [[4, 5, 6]])
    assert sorted(tmp_path.rglob("*")) == before
    assert TokenSplit(tmp_path / "split").read(0, 3).tolist() == [1, 2, 3]
