"""The folder of a run under commands that are given at the same time, at the wrong time, or that are killed: nothing of it is lost or mixed up."""

import hashlib
import signal

import pytest
from command import Lasting, Started, cllm, wait_until

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore

TINY = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 32, "--batch-size", 2, "--vocab-size", 320, "--precision", "fp32",
        "--threads", 1, "--set", "log.tensorboard=false")  # fmt: skip
ENDLESS = ("--steps", 1_000_000, "--checkpoint-every", 10, "--eval-every", 1_000_000, *TINY)


def stop(process, how=signal.SIGINT):
    process.send_signal(how)
    printed, errors = process.communicate()
    assert "Traceback" not in errors, errors
    return process.returncode, printed + errors


def newest(out):
    return CheckpointStore(out / "checkpoints").latest() or 0


def content(folder):
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in sorted(folder.rglob("*")) if each.is_file()}


@pytest.fixture
def books(tmp_path):
    """Two folders of one name with other text in each."""
    for name, words in (("a", "the quick brown fox jumps over the lazy dog "), ("b", "all the king's horses and all the king's men ")):
        (tmp_path / name / "books").mkdir(parents=True)
        for number in range(2):
            (tmp_path / name / "books" / f"{number}.txt").write_text(f"{words}{number}\n" * 200)
    return tmp_path / "a" / "books", tmp_path / "b" / "books"


def test_while_a_run_trains_no_other_command_touches_it_and_it_can_be_resumed(books, tmp_path):
    out = tmp_path / "runs" / "two"
    process = Started("train", books[0], *ENDLESS, "--out", out)
    wait_until(lambda: newest(out) >= 10, process)
    tokens = content(out / "data")
    planned = cllm("train", books[1], *TINY, "--plan", "--out", out)
    assert planned.status == 0 and f"this command names {books[1]}" in planned.out
    refused = cllm("train", books[1], *TINY, "--out", out)
    assert refused.status == 1 and f"{out} is being trained by process {process.pid}" in refused.err
    status, said = stop(process)
    assert status == 130 and "cllm train --resume" in said and content(out / "data") == tokens
    (books[0] / "1.txt").write_text((books[0] / "1.txt").read_text() + "a line more\n")
    step = newest(out)
    process = Started("train", "--resume", "--out", out, cwd="/")
    wait_until(lambda: newest(out) > step, process)
    status, said = stop(process)
    assert status == 130 and f"resuming after step {step:,}" in said and "has changed since this run began" in said


CHARACTERS = ("--tokenizer", "char", "--steps", 2, "--set", "data.val_fraction=0", *(each for each in TINY if each not in ("--vocab-size", 320)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A text, and the weights of a run on it that nobody disturbed."""
    place = tmp_path_factory.mktemp("undisturbed")
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 2_000)
    assert cllm("train", place / "text.txt", *CHARACTERS, "--out", place / "run").status == 0
    return place / "text.txt", sha256_of(CheckpointStore(place / "run" / "checkpoints").path(2) / "model.safetensors")


MOMENTS = {  # a function that is being called then, and what is there already
    "reading": ("cllm.data.pipeline:load_corpus", "config.toml"),
    "packing": ("cllm.data.tokens.shards/ShardWriter:close", "data/.tokens-*.tmp"),
    "packed": ("cllm.cli.training:with_data", "data/tokens-*/dataset.json"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_prepares_a_run_begins_again_with_the_same_command(undisturbed, tmp_path, moment):
    """SIGKILL leaves no chance to clean up."""
    text, weights = undisturbed
    out = tmp_path / "run"
    function, there = MOMENTS[moment]
    process = Lasting(function, 1, "Python", "train", text, *CHARACTERS, "--out", out)
    process.read_until("REACHED")
    assert list(out.glob(there))
    process.kill()
    process.wait()
    again = cllm("train", *(("--resume",) if moment == "reading" else (text, *CHARACTERS)), "--out", out)
    assert again.status == 0, again.err
    assert sha256_of(CheckpointStore(out / "checkpoints").path(2) / "model.safetensors") == weights
    assert len(list((out / "data").glob("tokens-*"))) == 1
    assert not [each.name for each in (out / "data").iterdir() if each.name.startswith(".")] and not (out / ".lock").exists()


def test_two_runs_of_one_name_begun_at_the_same_moment_get_a_folder_each(books, tmp_path):
    both = [Started("train", each, "--steps", 2, *TINY, cwd=tmp_path) for each in books]
    for process in both:
        printed, errors = process.communicate()
        assert process.returncode == 0, printed + errors
    names = sorted(each.name for each in (tmp_path / "runs").iterdir())
    assert len(names) == 2 and names[0] == "books" and names[1].startswith("books-")
