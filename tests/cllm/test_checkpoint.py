"""Checkpoints are whole or absent: every byte covered, a full disk changes nothing, damage is found and passed over, nothing is unpickled."""

import errno
import json
import os
import pickle
import resource
import signal
import struct

import pytest
import torch

from cllm.checkpoint import CheckpointStore, check_tokenizer, load, read_checkpoint, save, verify, weights_of
from cllm.config import ModelConfig
from cllm.model import Model
from cllm.runtime.errors import CheckpointError, UserError
from cllm.storage import sha256_of, write_safetensors

TINY = ModelConfig(vocab_size=40, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=8)


@pytest.fixture
def model():
    return Model(TINY, seed=3)


def weights(value=0.0):
    scalar = torch.full((), value, dtype=torch.bfloat16)
    return {"a": torch.full((3, 5), value), "b": torch.arange(4, dtype=torch.int64), "c": scalar, "d": torch.empty(0, 2)}


def state(**values):
    return {"model": TINY.to_dict(), "tokenizer_hash": None, **values}


def test_a_safetensors_file_is_what_the_library_reads_and_always_the_same_bytes(tmp_path):
    from safetensors.torch import load_file

    first = write_safetensors(tmp_path / "one", weights(1.5), {"z": "1", "a": "ü", "format": "pt"})
    second = write_safetensors(tmp_path / "two", dict(reversed(weights(1.5).items())), {"format": "pt", "a": "ü", "z": "1"})
    assert first == second == sha256_of(tmp_path / "one") == sha256_of(tmp_path / "two")
    read = load_file(tmp_path / "one")
    assert read.keys() == weights().keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in weights(1.5).items())
    (size,) = struct.unpack("<Q", (tmp_path / "one").read_bytes()[:8])
    assert size % 8 == 0


def test_strided_tensors_are_stored_in_row_major_order(tmp_path):
    from safetensors.torch import load_file

    tensor = torch.arange(12.0).view(3, 4).T[1:]
    write_safetensors(tmp_path / "file", {"x": tensor}, {})
    assert torch.equal(load_file(tmp_path / "file")["x"], tensor)


def test_keep_holds_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3, 4, 5):
        store.save(step, weights(step), weights(), state())
        if step == 2:
            store.mark_best(step)
    assert store.steps() == [2, 4, 5] and store.latest() == 5 and store.best() == 2
    assert (store.folder / "latest").read_text() == "step-00000005\n"
    store.mark_best(5)
    assert store.steps() == [4, 5]
    found = store.newest_good()
    assert found.step == 5 and found.state["model"] == TINY.to_dict()
    assert torch.equal(found.weights["a"], weights(5)["a"])
    assert sorted(path.name for path in found.path.iterdir()) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damaged_file_is_found_and_the_checkpoint_before_it_is_taken(tmp_path, name, damage):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, weights(1), weights(), state())
    path = store.save(2, weights(2), weights(), state()) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    {"flip": lambda: path.write_bytes(content), "cut": lambda: path.write_bytes(content[:-3]), "remove": path.unlink}[damage]()
    told = []
    assert store.newest_good(told.append).step == 1
    assert len(told) == 1 and "step-00000002" in told[0] and name in told[0] and "Falling back" in told[0]
    with pytest.raises(CheckpointError):
        verify(store.path(2))
    store.save(2, weights(7), weights(), state())  # the run goes on and replaces it
    assert torch.equal(store.newest_good().weights["a"], weights(7)["a"])


def test_every_single_byte_of_a_checkpoint_is_covered(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"a": torch.ones(2)}, {"b": torch.ones(1)}, {"k": 1})
    for file in path.iterdir():
        good = file.read_bytes()
        for place in range(0, len(good), 7):
            file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            with pytest.raises(CheckpointError):
                read_checkpoint(path)
        file.write_bytes(good)
    assert read_checkpoint(path).step == 1


def test_when_all_checkpoints_are_damaged_nothing_starts_silently_anew(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    (store.save(1, weights(), weights(), state()) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        store.newest_good()
    assert CheckpointStore(tmp_path / "absent").newest_good() is None


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_disk_that_fails_leaves_the_earlier_checkpoints_and_no_temporary_file(tmp_path, monkeypatch, failing):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(1, weights(1), weights(), state())
    calls = 0

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls >= 2 or failing == "rename":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    import cllm.checkpoint as module

    owner, name = {"write": (module, "write_safetensors"), "fsync": (os, "fsync"), "rename": (os, "rename")}[failing]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(CheckpointError, match=r"No space left on device \(it needs .* MB are free\).*untouched.*same command"):
        store.save(2, weights(2), weights(), state())
    monkeypatch.undo()
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step-00000001"]
    assert store.newest_good().step == 1


def test_a_file_size_limit_is_met_like_a_full_disk(tmp_path):
    """The real system call fails here, in the middle of a file."""
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, weights(1), weights(), state())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(CheckpointError, match="File too large"):
            store.save(2, {"big": torch.ones(100_000)}, {}, state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.steps() == [1] and not list(store.folder.glob(".*"))


def test_an_interrupted_replacement_is_taken_back_or_completed(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(3, weights(3), weights(), state())
    os.rename(store.path(3), tmp_path / ".step-00000003.123.old.tmp")
    (tmp_path / ".step-00000004.123.tmp").mkdir()
    store.clean()
    assert store.steps() == [3] and not list(tmp_path.glob(".*"))


def test_one_file_holds_model_and_configuration(tmp_path, model):
    save(model, tmp_path / "sub" / "model.cllm")
    again, tokenizer = load(tmp_path / "sub" / "model.cllm")
    assert tokenizer is None and again.config == model.config
    assert all(torch.equal(tensor, weights_of(again)[name]) for name, tensor in weights_of(model).items())
    first = sha256_of(tmp_path / "sub" / "model.cllm")
    save(again, tmp_path / "sub" / "model.cllm")
    assert sha256_of(tmp_path / "sub" / "model.cllm") == first
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["model.cllm"]
    with pytest.raises(UserError, match=r"writes a \.cllm file"):
        save(model, tmp_path / "model.pt")


def test_one_file_holds_the_tokenizer_too(tmp_path):
    from cllm.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["hello world, hello"], vocab_size=300, kind="char")
    model = Model(ModelConfig.from_dict({**TINY.to_dict(), "vocab_size": tokenizer.vocab_size}))
    save(model, tmp_path / "model.cllm", tokenizer=tokenizer)
    _, again = load(tmp_path / "model.cllm")
    assert again.hash == tokenizer.hash and again.decode(again.encode("hello")) == "hello"


def test_a_damaged_cllm_file_is_refused(tmp_path, model):
    path = tmp_path / "model.cllm"
    save(model, path)
    good = path.read_bytes()
    for place in (0, 3, 20, len(good) // 3, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    for size in (0, 4, 100, len(good) - 5):
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError):
            load(path)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_foreign_files_are_refused_in_one_line_and_never_unpickled(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2)}, "zip.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(_Bomb()))
    (tmp_path / "bomb.cllm").write_bytes(pickle.dumps(_Bomb()))
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    write_safetensors(tmp_path / "plain.safetensors", weights(), {})
    (tmp_path / "folder").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("zip.pt", "bomb.pkl", "bomb.cllm", "text.txt", "empty", "plain.safetensors", "folder", "absent", "run"):
        with pytest.raises(CheckpointError) as caught:
            load(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_a_run_folder_gives_its_newest_good_checkpoint(tmp_path, model):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, weights_of(model), {}, state())
    (store.save(2, weights_of(model), {}, state()) / "model.safetensors").write_bytes(b"x")
    told = []
    again, _ = load(tmp_path, told.append)
    assert len(told) == 1 and all(torch.equal(tensor, weights_of(again)[name]) for name, tensor in weights_of(model).items())
    assert load(store.path(1))[0].config == model.config
    with pytest.raises(CheckpointError, match="damaged"):
        load(store.path(2))


def test_weights_of_another_model_are_refused(tmp_path, model):
    store = CheckpointStore(tmp_path / "checkpoints")
    other = Model(ModelConfig.from_dict({**TINY.to_dict(), "embed_dim": 32, "head_dim": 16}))
    store.save(1, weights_of(other), {}, state())
    with pytest.raises(CheckpointError, match="has shape"):
        load(tmp_path)
    store.save(2, {"foreign": torch.ones(1)}, {}, state())
    with pytest.raises(CheckpointError, match=r"missing .* unknown"):
        load(tmp_path)


def test_another_format_version_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, weights(), weights(), state()) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        read_checkpoint(path.parent)


def test_another_tokenizer_is_refused():
    check_tokenizer("abc", "abc", "here")
    check_tokenizer("abc", None, "here")
    with pytest.raises(CheckpointError, match="not the one that the model was trained with"):
        check_tokenizer("abc", "abd", "here")
