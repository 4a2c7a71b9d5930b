"""Checkpoints are whole or absent: every byte covered, a full disk changes nothing, damage is found and passed over, nothing is unpickled."""

import errno
import json
import os
import pickle
import struct
import threading

import pytest
import torch
from command import cllm
from disk import file_size_limit

from cllm.checkpoint.folder import read_checkpoint, verify
from cllm.checkpoint.model_file import load, save
from cllm.checkpoint.safetensors import sha256_of, write_safetensors
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.tools import average, diff, verify_all
from cllm.checkpoint.weights import check_tokenizer, weights_of
from cllm.checkpoint.writer import CheckpointWriter
from cllm.cli.options import load_model
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.interop.hf import save_hf
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, CLLMError, DataError, UserError
from cllm.train.finetune import start

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

    import cllm.checkpoint.store as module

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
    with file_size_limit(100_000), pytest.raises(CheckpointError, match="File too large"):
        store.save(2, {"big": torch.ones(100_000)}, {}, state())
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


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
FOREIGN = {
    "GGUF file": b"GGUF\x03\x00\x00\x00" + bytes(40), "pointer of Git LFS": LFS, "pickle": pickle.dumps({"a": 1}), "HDF5": b"\x89HDF\r\n\x1a\n",
    "web page": b"<!DOCTYPE html><html><head><title>Sign in</title>", "torch.save": b"PK\x03\x04" + bytes(60),
    "ONNX file": b"\x08\x08\x12\x07pytorch", "gzip archive": b"\x1f\x8b\x08\0", "empty": b"", "XML": b'\xef\xbb\xbf<?xml version="1.0"?><Error/>',
    "tar archive": bytes(257) + b"ustar\x0000", "array of NumPy": b"\x93NUMPY\x01\0",
}  # fmt: skip


@pytest.mark.parametrize(("words", "content"), FOREIGN.items())
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, model, words, content):
    (tmp_path / "model.cllm").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/model.cllm is .*{words}") as caught:
        load(tmp_path / "model.cllm")
    assert "header" not in str(caught.value) and "\n" not in str(caught.value)
    save_hf(model, tmp_path / "hf", Tokenizer.train(["hello world"], vocab_size=300, kind="char"))
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (tmp_path / "hf" / name).write_bytes(content)
        with pytest.raises(CLLMError, match=rf"^{tmp_path}/hf/{name} is .*{words}"):
            load(tmp_path / "hf")


def test_a_text_is_named_and_a_cut_off_model_is_no_pickle(tmp_path, model):
    (tmp_path / "words.txt").write_text("It was the best of times, it was the worst of times.")
    with pytest.raises(CheckpointError, match=r"words\.txt is a text file\. Expected a run folder"):
        load(tmp_path / "words.txt")
    for length in (0x280, 0x580):  # the first bytes are those of a pickle
        (tmp_path / "cut.cllm").write_bytes(length.to_bytes(8, "little") + b'{"a":')
        with pytest.raises(CheckpointError, match=r"cut\.cllm is not a readable safetensors file"):
            load(tmp_path / "cut.cllm")


def test_the_command_names_a_file_of_another_kind(tmp_path):
    (tmp_path / "m.gguf").write_bytes(FOREIGN["GGUF file"])
    ran = cllm("generate", tmp_path / "m.gguf", "--prompt", "x")
    assert ran.status == 1 and "GGUF file, which CLLM writes and does not read" in ran.err and len(ran.err.strip().splitlines()) == 1


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


# -- written while training goes on --------------------------------------------------------------------------------------------


def test_a_background_checkpoint_holds_what_was_there_when_it_began_whatever_changes_after_before_update(tmp_path):
    writer = CheckpointWriter(CheckpointStore(tmp_path), background=True)
    for step in range(1, 5):
        live, moments = weights(step), weights(-step)
        writer.save(step, live, moments, state())
        writer.before_update()
        for tensor in [*live.values(), *moments.values()]:
            tensor.zero_()
        writer.wait()
        found = writer.store.newest_good()
        assert found.step == step and all(torch.equal(found.weights[name], each) for name, each in weights(step).items())
        assert all(torch.equal(found.optimizer[name], each) for name, each in weights(-step).items())


def test_training_goes_on_while_the_disk_writes_and_the_next_checkpoint_waits_its_turn(tmp_path, monkeypatch):
    store, release, order = CheckpointStore(tmp_path), threading.Event(), []
    save_now = store.save
    monkeypatch.setattr(store, "save", lambda step, *rest: (release.wait(20), order.append(step), save_now(step, *rest)))
    writer = CheckpointWriter(store, background=True)
    writer.save(1, weights(), weights(), state())
    writer.before_update()  # returns although nothing is written yet
    writer.check()
    writer.afterwards(lambda: order.append("best"))
    assert writer.busy and not order
    threading.Timer(0.1, release.set).start()
    writer.save(2, weights(), weights(), state())
    writer.wait()
    assert order == [1, "best", 2] and store.steps() == [1, 2] and writer.stall_seconds > 0


def test_a_background_write_that_fails_says_so_at_the_next_chance(tmp_path, monkeypatch):
    import cllm.checkpoint.store as module

    writer = CheckpointWriter(CheckpointStore(tmp_path / "checkpoints"), background=True)
    writer.save(1, weights(1), weights(), state())
    writer.wait()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_safetensors", full)
    writer.save(2, weights(2), weights(), state())
    writer.before_update()
    with pytest.raises(CheckpointError, match="No space left on device"):
        writer.wait()
    assert writer.store.newest_good().step == 1
    writer.wait()  # said once


def test_keep_every_keeps_checkpoints_for_good(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_every=4)
    for step in range(1, 11):
        store.save(step, weights(), weights(), state())
    assert store.steps() == [4, 8, 10]


# -- cllm checkpoint -----------------------------------------------------------------------------------------------------------


def test_verify_names_the_damaged_tensors(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, weights(1), weights(), state())
    path = store.save(2, weights(2), weights(), state()) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last tensor of the file is the narrowest
    path.write_bytes(content)
    (_, first), (_, second) = verify_all(tmp_path)
    assert first is None and "SHA-256" in second and second.endswith("Damaged: c.")


def test_diff_tells_changed_weights_and_settings(tmp_path, model):
    save(model, tmp_path / "a.cllm")
    with torch.no_grad():
        model.embedding_weight[3, 4] += 0.5
    save(model, tmp_path / "b.cllm")
    save(Model(ModelConfig.from_dict({**TINY.to_dict(), "num_layers": 2})), tmp_path / "c.cllm")
    assert diff(tmp_path / "a.cllm", tmp_path / "a.cllm").identical
    found = diff(tmp_path / "a.cllm", tmp_path / "b.cllm")
    assert list(found.changed) == ["model.embed_tokens.weight"] and found.same == 10 and not found.identical
    assert found.changed["model.embed_tokens.weight"][0] == pytest.approx(0.5)
    other = diff(tmp_path / "a.cllm", tmp_path / "c.cllm")
    assert other.config == {"num_layers": (1, 2)} and not other.only_first and len(other.only_second) == 9


def test_an_average_is_the_mean_of_the_weights(tmp_path):
    models = [Model(TINY, seed=seed) for seed in range(3)]
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    for step, each in enumerate(models, 1):
        store.save(step, weights_of(each), {}, state())
    mean, _, used = average([tmp_path / "run"])
    assert len(used) == 3
    for name, tensor in weights_of(mean).items():
        expected = sum(weights_of(each)[name].double() for each in models) / 3
        assert torch.equal(tensor, expected.float())
    assert len(average([tmp_path / "run"], last=2)[2]) == 2
    save(Model(ModelConfig.from_dict({**TINY.to_dict(), "num_layers": 2})), tmp_path / "other.cllm")
    with pytest.raises(UserError, match="another model"):
        average([tmp_path / "run", tmp_path / "other.cllm"])
    with pytest.raises(UserError, match="at least two"):
        average([tmp_path / "other.cllm"])


def test_the_checkpoint_commands_do_what_they_say(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    for step in (1, 2):
        store.save(step, weights_of(Model(TINY, seed=step)), {}, state(tokens=7))
    run = tmp_path / "run"
    assert cllm("checkpoint", "inspect", run, "--tensors", "--json").json["step"] == 2
    assert "parameters" in cllm("checkpoint", "inspect", run).out
    assert cllm("checkpoint", "verify", run, "--json").json == {"checkpoints": 2, "damaged": []}
    assert len(cllm("checkpoint", "diff", store.path(1), run, "--json").json["changed"]) > 3
    averaged = cllm("checkpoint", "average", run, "--out", tmp_path / "mean.cllm", "--json").json["averaged"]
    assert averaged == [str(store.path(1)), str(store.path(2))]
    (store.path(2) / "model.safetensors").write_bytes(b"gone")
    bad = cllm("checkpoint", "verify", run)
    assert bad.status == 1 and "BAD" in bad.out and "1 of 2 checkpoints are damaged" in bad.err


def test_a_command_says_that_it_takes_an_older_checkpoint_because_the_newest_is_damaged(tmp_path, capsys):
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    for step in (1, 2):
        store.save(step, weights_of(Model(TINY, seed=step)), {}, state())
    (store.path(2) / "model.safetensors").write_bytes(b"gone")
    model, _ = load_model(str(tmp_path / "run"), need_tokenizer=False)
    assert torch.equal(weights_of(model)["model.embed_tokens.weight"], weights_of(Model(TINY, seed=1))["model.embed_tokens.weight"])
    told = capsys.readouterr().err
    assert "step-00000002" in told and "Falling back to the checkpoint before it" in told
    with pytest.raises(DataError, match="holds no tokenizer"):
        start(TrainConfig(start_from=str(tmp_path / "run")), tmp_path / "new")
    assert "Falling back" in capsys.readouterr().err


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_told_with_how_to_go_on(tmp_path):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match=r"has no checkpoint yet\. .* --resume --out"):
        load(tmp_path)
