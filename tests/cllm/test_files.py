"""What a user reads when a file cannot be written: one line with the place, the reason, what is still there and what to do."""

import errno
import os

import pytest
from disk import file_size_limit

from cllm.checkpoint.model_file import save
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.weights import weights_of
from cllm.config.model import ModelConfig
from cllm.data.pipeline import prepare
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.files import Appender, Wording, check_writable, new_file, new_folder, write_file
from cllm.interop.gguf import save_gguf
from cllm.interop.hf import save_hf
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, CLLMError, DataError


class OfTheCaller(CLLMError):
    pass


WORDING = Wording(OfTheCaller, "another shelf", "The books are safe.")


def refusing(number, **names):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), *names.values())

    return refuse


ROOM = r" \(it needs 3\.00 MB, [\d,.]+ MB are free\)"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, rf", the disk is full: No space left on device{ROOM}\. The books are safe\. Free some space or choose"),
        (errno.EDQUOT, rf", the disk is full: Disk quota exceeded{ROOM}\. The books are safe\. Free some space or choose"),
        (errno.EFBIG, rf": File too large{ROOM}\. The books are safe\. Free some space or choose"),
        (errno.EACCES, r": Permission denied\. The books are safe\. Make the folder writable or choose"),
        (errno.EROFS, r": Read-only file system\. The books are safe\. Choose"),
        (errno.EIO, r": Input/output error\. The books are safe\. Choose"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_the_caller_chooses_the_class_and_the_words(tmp_path, monkeypatch, number, expected, call):
    monkeypatch.setattr(os, call, refusing(number))
    with pytest.raises(OfTheCaller, match=rf"^could not write {tmp_path}/shelf/book{expected} another shelf\.$"):
        write_file(tmp_path / "shelf" / "book", bytes(3_000_000), WORDING)
    assert not list(tmp_path.glob("shelf/*"))


def test_every_way_of_writing_reports_alike(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    below = tmp_path / "file" / "below"
    with pytest.raises(OfTheCaller, match=f"^could not write {below}: Not a directory. The books"):
        write_file(below, b"x", WORDING)
    with pytest.raises(OfTheCaller, match=f"^could not write {below}: Not a directory. The books"), new_file(below, WORDING):
        pytest.fail("not reached")
    with pytest.raises(OfTheCaller, match=f"^could not write {below}: Not a directory. The books"), new_folder(below, WORDING):
        pytest.fail("not reached")
    with pytest.raises(OfTheCaller, match="No space left"), new_folder(tmp_path / "folder", WORDING) as beside:
        (beside / "half").write_bytes(b"x")
        refusing(errno.ENOSPC)()
    with pytest.raises(OfTheCaller, match=f"^could not write {tmp_path}/folder: Is a directory"), new_folder(tmp_path / "folder", WORDING) as beside:
        (beside / "inside").mkdir()
        (beside / "inside").write_bytes(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_about_another_file_is_not_blamed_on_the_destination(tmp_path):
    source = tmp_path / "source"
    with pytest.raises(FileNotFoundError) as caught, new_folder(tmp_path / "folder", WORDING):
        source.read_bytes()
    assert caught.value.filename == str(source) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError), new_file(tmp_path / "file", WORDING):
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_lines_are_added_whole_and_a_line_that_was_cut_off_is_ended(tmp_path):
    with Appender(tmp_path / "log", WORDING) as file:
        file.write("one\ntwo\n")
        assert (tmp_path / "log").read_text() == "one\ntwo\n"
        file.write("\ud800\n")  # half a character
    with open(tmp_path / "log", "a") as other:
        other.write("cut o")
    with Appender(tmp_path / "log", WORDING) as file:
        file.write("three\n")
    assert (tmp_path / "log").read_text() == "one\ntwo\n?\ncut o\nthree\n"
    with pytest.raises(OfTheCaller, match=f"^could not write {tmp_path}/absent/log: No such file or directory. The books"):
        Appender(tmp_path / "absent" / "log", WORDING)


# -- every way of writing a model or tokens, under a limit that the real system call meets in the middle of a file ----------------------


def save_as_gguf(model, tokenizer, place):
    pytest.importorskip("gguf")
    save_gguf(model, place, tokenizer)


WRITERS = {
    "model.cllm": lambda model, tokenizer, place: save(model, place, tokenizer),
    "folder": lambda model, tokenizer, place: save_hf(model, place, tokenizer),
    "model.gguf": save_as_gguf,
    "tokenizer.json": lambda model, tokenizer, place: tokenizer.save(place),
    "step-00000001": lambda model, tokenizer, place: CheckpointStore(place.parent).save(1, weights_of(model), {}, {}),
    "tokens": lambda model, tokenizer, place: prepare(place.parents[1] / "text", place, tokenizer=tokenizer, val_fraction=0.0),
}


@pytest.mark.parametrize(("name", "write"), WRITERS.items())
def test_a_file_that_the_disk_cuts_short_is_told_and_leaves_nothing(tmp_path, name, write):
    tokenizer = Tokenizer.train(["some long text to learn from " * 20], vocab_size=320)
    model = Model(ModelConfig(vocab_size=320, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=16))
    (tmp_path / "text").write_text("long text " * 10_000)
    with file_size_limit(4096), pytest.raises((CheckpointError, DataError), match=r"could not write .* MB are free\)\. .*Free some space or choose"):
        write(model, tokenizer, tmp_path / "out" / name)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(name == "tokens" and path.name in ("sources.bin", "sources.json", "tokenizer.json", "training.json") for path in left), left
    write(model, tokenizer, tmp_path / "out" / name)
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_place_that_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "new.txt", tmp_path / "a" / "b" / "new.txt", tmp_path / "file"):
        check_writable(place, WORDING)
    for below in ("file/new.txt", "file/a/new.txt"):
        with pytest.raises(OfTheCaller, match=f"could not write {tmp_path}/{below}: Not a directory. The books are safe. Choose another shelf"):
            check_writable(tmp_path / below, WORDING)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # also for a user who may write everywhere
    for place in (tmp_path, tmp_path / "a" / "new.txt"):
        with pytest.raises(OfTheCaller, match=r"Permission denied\. The books are safe\. Make the folder writable or choose another shelf"):
            check_writable(place, WORDING)
