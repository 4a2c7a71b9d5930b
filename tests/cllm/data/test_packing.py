"""What is copied from an earlier packing is what packing again would give, byte for byte, and only what changed is tokenized."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cllm.data import packing
from cllm.data.pipeline import prepare
from cllm.data.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["some words that are here, and a few more of them for the merges " * 20], 320)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tokens(folder):
    """All of it but what was left out, which is told of the files that the tokens were first packed from."""
    return {name: found for name, found in content(folder).items() if name != "dataset.json"}


def tokenized(monkeypatch):
    """The texts that are tokenized from now on."""
    texts, real = [], Tokenizer.encode_arrays

    def encode_arrays(self, batch):
        texts.extend(batch)
        return real(self, batch)

    monkeypatch.setattr(Tokenizer, "encode_arrays", encode_arrays)
    return texts


NAMES = st.sampled_from(["a.txt", "b.jsonl", "b/c.txt", "b.txt", "d.py", "z.csv"])
TEXTS = st.lists(st.sampled_from(["some words\n", "a few more of them\n", "here, and here\n", "é ü 日本\n", "   \n"]), min_size=1, max_size=6)


def written(name, lines):
    if name.endswith(".jsonl"):
        return "\n".join(json.dumps({"text": line}) for line in lines)
    return "text,id\n" + "".join(f'"{line.strip()}",{n}\n' for n, line in enumerate(lines)) if name.endswith(".csv") else "".join(lines)


@given(
    st.dictionaries(NAMES, TEXTS, min_size=1),
    st.lists(st.dictionaries(NAMES, TEXTS | st.none(), min_size=1), max_size=3),
    st.sampled_from([0.0, 0.3, None]),
)
@example(files={"a.txt": ["some words\n"]}, changes=[{"a.txt": None}, {"a.txt": ["   \n"]}], val_fraction=0.0)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_after_any_changes_the_result_is_that_of_packing_all_again(tmp_path_factory, tokenizer, files, changes, val_fraction):
    root = tmp_path_factory.mktemp("x")
    data, out = root / "data", root / "out"
    for round_number, change in enumerate([files, *changes]):
        for name, lines in change.items():
            path = data / name
            if lines is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(written(name, lines))
        (data / "always.txt").write_text("some words that are always here\n" * 9)
        again = prepare(data, out, tokenizer, val_fraction=val_fraction)
        fresh = prepare(data, root / f"fresh-{round_number}", tokenizer, val_fraction=val_fraction)
        assert tokens(again.folder) == tokens(fresh.folder) and again.info == fresh.info


def test_what_is_left_out_is_told_of_these_files_where_the_tokens_are_those_of_others(tmp_path, tokenizer):
    data = tmp_path / "data"
    data.mkdir()
    (data / "always.txt").write_text("some words that are always here\n" * 9)
    assert not prepare(data, tmp_path / "out", tokenizer).info["skipped"]
    (data / "blank.txt").write_text("   \n")
    again = prepare(data, tmp_path / "out", tokenizer)
    assert again.steps[-1][1] == "cached" and again.info["skipped"]["empty"]["examples"] == ["blank.txt"]


def test_only_what_changed_is_tokenized(tmp_path, tokenizer, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(30):
        (data / f"{number:02}.txt").write_text(f"some words of file number {number}\n" * 4)
    prepare(data, tmp_path / "out", tokenizer)
    (data / "07.txt").write_text("other words\n")
    (data / "12.txt").unlink()
    (data / "30.txt").write_text("a new file\n")
    texts, said = tokenized(monkeypatch), []
    prepare(data, tmp_path / "out", tokenizer, log=said.append)
    assert [text for text in texts if text] == ["other words\n", "a new file\n"]
    assert any("those of 28 unchanged files were copied" in line for line in said)


@pytest.mark.parametrize("damage", ["train/shard-00000.bin", "segments.bin", "segments.json", "val/documents.jsonl"])
def test_nothing_is_copied_out_of_damage(damage, tmp_path, tokenizer):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(30):
        (data / f"{number:02}.txt").write_text(f"some words of file number {number}\n" * 4)
    first = prepare(data, tmp_path / "out", tokenizer)
    path = first.folder / damage
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 1
    path.write_bytes(broken)
    (data / "07.txt").write_text("other words\n")
    said = []
    again = prepare(data, tmp_path / "out", tokenizer, log=said.append)
    assert content(again.folder) == content(prepare(data, tmp_path / "fresh", tokenizer).folder)
    assert not any("copied" in line for line in said)


def test_another_tokenizer_or_cut_copies_nothing_and_the_order_of_sides_does_not_matter(tmp_path, tokenizer, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(40):
        (data / f"{number:02}.txt").write_text(f"some words of file number {number}\n" * 4)
    prepare(data, tmp_path / "out", tokenizer, val_fraction=0.1)
    texts = tokenized(monkeypatch)
    moved = prepare(data, tmp_path / "out", tokenizer, val_fraction=0.4, keep_others=True)  # documents change sides, their tokens stay
    assert not any(texts)
    assert content(moved.folder) == content(prepare(data, tmp_path / "fresh", tokenizer, val_fraction=0.4).folder)
    texts.clear()
    other = Tokenizer.train(["other words, other merges " * 30], 320)
    prepare(data, tmp_path / "out", other, val_fraction=0.1, keep_others=True)
    assert len(texts) == 40


def test_segments_end_where_batches_do_not(tmp_path, tokenizer, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("some words that are here, " * 9000)
    (data / "b.txt").write_text("a few more of them " * 9000)
    whole = prepare(data, tmp_path / "whole", tokenizer, val_fraction=0.2)
    monkeypatch.setattr(packing, "_BATCH_CHARS", 1000)
    assert content(prepare(data, tmp_path / "parts", tokenizer, val_fraction=0.2).folder) == content(whole.folder)
