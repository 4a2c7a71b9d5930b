"""What a command does to the folder of a run and to its data: compared first, written after, and going on with the tokens that it began with."""

import hashlib
import json
import os
import re
import shutil

import pytest

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.cli.app import parser
from cllm.data import Dataset
from cllm.data.tokens.shards import ShardWriter
from cllm.monitor.guards import RunLock
from cllm.monitor.stop_signals import Interrupted
from cllm.runtime.errors import CheckpointError, CLLMError, DataError, UserError
from cllm.train import lr_finder

TINY = ("--embed-dim", 16, "--num-layers", 1, "--num-heads", 2, "--seq-len", 16, "--batch-size", 2, "--vocab-size", 320, "--precision", "fp32",
        "--threads", 1, "--set", "log.tensorboard=false", "--set", "log.classes=false")  # fmt: skip
STEPS = 6
TRAIN = ("--steps", STEPS, "--checkpoint-every", 2, "--eval-every", 3, "--learning-rate", "1e-2", *TINY)
WORDS = "the quick brown fox jumps over the lazy dog and comes back to sleep\n"


def cllm(*arguments):
    """The command inside this process; its errors as they are."""
    parser()(args=[str(each) for each in arguments], prog_name="cllm", standalone_mode=False)


def content(folder):
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in sorted(folder.rglob("*")) if each.is_file()}


def bits(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    return newest.step, sha256_of(newest.path / "model.safetensors"), sha256_of(newest.path / "optimizer.safetensors")


def books(folder, word="fox"):
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.txt").write_text(WORDS.replace("fox", word + str(number)) * 20)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with books/, other/ and the finished run `run`."""
    place = tmp_path_factory.mktemp("finished")
    books(place / "books")
    books(place / "other", "cat")
    cllm("train", place / "books", "--out", place / "run", *TRAIN)
    return place


@pytest.fixture
def place(finished, tmp_path):
    """The same for one test to change, as if it had been made there."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    name_data(tmp_path / "run", finished / "books", tmp_path / "books")
    return tmp_path


def name_data(out, before, after):
    """Makes a run say that its data is in another place, in its settings and in all its checkpoints."""
    config = out / "config.toml"
    config.write_text(config.read_text().replace(str(before), str(after)))
    store = CheckpointStore(out / "checkpoints", keep=9)
    best, latest = store.best(), store.latest()
    for step in store.steps():
        found = store.read(step)
        found.state["config"]["data"]["path"] = str(after)
        store.save(step, found.weights, found.optimizer, {key: value for key, value in found.state.items() if key != "step"})
    store.mark_best(best)
    assert store.latest() == latest


def stopped(place):
    """The run as it was before its last steps."""
    store = CheckpointStore(place / "run" / "checkpoints")
    first, *others = store.steps()
    for step in others:
        shutil.rmtree(store.path(step))
    for name in ("latest", "best"):
        (store.folder / name).write_text(f"{store.path(first).name}\n")
    assert first < STEPS
    return place / "run"


# -- looks write nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", ["--plan", "--find-lr"])
@pytest.mark.parametrize("data", ["the same", "other", "changed", "gone", "of other settings"])
def test_a_look_writes_nothing_into_a_run(place, look, data, capfd, monkeypatch):
    monkeypatch.setattr(lr_finder, "NUM_UPDATES", 3)
    text = place / ("other" if data == "other" else "books")
    if data == "changed":
        (text / "0.txt").write_text("another text altogether " * 30)
    if data == "gone":
        shutil.rmtree(text)
    before = content(place / "run")
    settings = (*TINY, "--vocab-size", 384) if data == "of other settings" else TINY
    given = ("--resume",) if data == "gone" else (text,)
    cllm("train", *given, "--out", place / "run", *settings, "--steps", STEPS, look)
    said = capfd.readouterr().out
    assert content(place / "run") == before
    assert ("A training there would be refused" in said) == (data == "other")
    if data == "the same":
        assert "(cached)" in said and "files:" not in said
    if look == "--find-lr" and "The curve is in" in said:
        assert (place / "run-find-lr.png").exists()


def test_a_look_before_the_run_leaves_its_tokens_for_it(tmp_path, capfd):
    text = books(tmp_path / "books")
    cllm("train", text, "--out", tmp_path / "run", *TRAIN, "--plan")
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["data"]
    cllm("train", text, "--out", tmp_path / "run", *TRAIN)
    assert capfd.readouterr().out.count("(cached)") == 3


def test_pictures_of_the_finder_never_replace_each_other(tmp_path):
    from cllm.cli.train_looks import _free_place

    for name in ("find-lr.png", "find-lr-2.png", "find-lr-3.png"):
        assert _free_place(tmp_path / "find-lr.png") == tmp_path / name
        (tmp_path / name).touch()


# -- refused commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), ("--steps", STEPS + 1)])
def test_other_data_is_refused_in_plain_words_and_touches_nothing(place, settings):
    before = content(place / "run")
    with pytest.raises(UserError) as refused:
        cllm("train", place / "other", "--out", place / "run", *TRAIN, *settings)
    words = str(refused.value)
    assert f"{place / 'run'} learns from " in words and f"this command names {place / 'other'}" in words
    assert f"cllm train {place / 'other'} --out NEW" in words and f"cllm train {place / 'other'} --from {place / 'run'} --out NEW" in words
    assert content(place / "run") == before


@pytest.mark.parametrize("change", [("--vocab-size", 384), ("--set", "data.val_fraction=0.3"), ("--tokenizer", "char"), ("--learning-rate", "1e-3"),
                                    ("--steps", 9), ("--embed-dim", 32), ("--seed", 3)], ids=lambda change: change[0])  # fmt: skip
def test_other_settings_are_refused_and_touch_nothing(place, change):
    before = content(place / "run")
    with pytest.raises(UserError, match="another configuration"):
        cllm("train", place / "books", "--out", place / "run", *TRAIN, *change)
    assert content(place / "run") == before


def test_a_run_that_is_being_trained_is_refused_at_once_and_may_be_looked_at(place, capfd):
    with RunLock(place / "run"):
        before = content(place / "run")
        for data in ("books", "other"):
            with pytest.raises(CheckpointError, match=f"is being trained by process {os.getpid()}"):
                cllm("train", place / data, "--out", place / "run", *TRAIN)
        with pytest.raises(CheckpointError, match="is being trained"):
            cllm("train", "--resume", "--out", place / "run")
        cllm("train", place / "books", "--out", place / "run", *TRAIN, "--plan")
        assert content(place / "run") == before
        (place / "new").mkdir()
        with RunLock(place / "new"):  # a run that has only just begun
            cllm("train", place / "other", "--out", place / "new", *TRAIN, "--plan")
            assert [each.name for each in (place / "new").iterdir()] == [".lock"]


@pytest.mark.parametrize("data", ["missing", "empty", "byte.txt"])
def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "byte.txt").write_text("x")
    with pytest.raises(DataError):
        cllm("train", data, *TRAIN)
    assert (tmp_path / "runs").exists() == (data == "byte.txt")  # its one byte was read and is remembered


def test_data_whose_name_is_no_text_is_refused_in_words(tmp_path):
    books(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UserError, match=r"caf\\udce9: the name is not UTF-8"):
        cllm("train", tmp_path / os.fsdecode(b"caf\xe9"), "--out", tmp_path / "run", *TRAIN)
    assert not (tmp_path / "run").exists()


# -- going on --------------------------------------------------------------------------------------------------------------

DISTURBED = {
    "a line more": lambda text: (text / "1.txt").write_text((text / "1.txt").read_text() + "one more line\n"),
    "a file less": lambda text: (text / "1.txt").unlink(),
    "deleted": shutil.rmtree,
    "renamed": lambda text: text.rename(text.with_name("renamed")),
    "other text": lambda text: [each.write_text("nothing of it is left " * 50) for each in text.iterdir()],
}


@pytest.mark.parametrize("how", ["--resume", "the first command"])
@pytest.mark.parametrize("change", DISTURBED)
def test_an_interrupted_run_goes_on_with_its_own_tokens_whatever_became_of_the_text(place, finished, change, how, capfd):
    out, text = stopped(place), place / "books"
    tokens = content(out / "data")
    DISTURBED[change](text)
    cllm("train", *(("--resume",) if how == "--resume" else (text, *TRAIN)), "--out", out)
    printed, errors = capfd.readouterr()
    assert bits(out) == bits(finished / "run") and content(out / "data") == tokens
    assert "resuming after step" in errors
    if change in ("deleted", "renamed"):
        assert f"the text in {text} is not there any more; the run goes on with the tokens it began with" in printed
    else:
        assert f"the text in {text} has changed since this run began; it goes on with the tokens it began with." in printed
        assert f"cllm train {text} --from {out} --out NEW" in printed


def test_unchanged_text_is_not_said_to_have_changed(place, capfd):
    cllm("train", place / "books", "--out", place / "run", *TRAIN)
    printed = capfd.readouterr().out
    assert "has changed" not in printed and "not there" not in printed


def test_what_was_left_out_of_the_text_is_said_again_in_one_line_when_the_run_goes_on(tmp_path, capfd):
    books(tmp_path / "books")
    (tmp_path / "books" / "photo.png").write_bytes(b"x")
    for name in ("1.csv", "2.csv"):
        (tmp_path / "books" / name).write_text("id\n1\n")
    (tmp_path / "books" / "r.jsonl").write_text(json.dumps({"text": WORDS}) + "\nbroken\n")
    command = ("train", tmp_path / "books", "--out", tmp_path / "run", *TRAIN)
    cllm(*command)
    first = capfd.readouterr().out
    told = [line.strip() for line in first[first.index("left out 4:") :].splitlines()[1:4]]
    for resume in (command, ("train", "--resume", "--out", tmp_path / "run")):
        cllm(*resume)
        lines = [line.strip() for line in capfd.readouterr().out.splitlines()]
        assert [line for line in lines if "left out" in line] == ["left out 4: " + "; ".join(told)]


def test_the_same_text_elsewhere_is_the_same_run(place, finished, capfd):
    out = stopped(place)
    (place / "books").rename(place / "moved")
    cllm("train", place / "moved", "--out", out, *TRAIN)
    assert f"{place / 'moved'} holds the text that {out} learns from" in capfd.readouterr().out
    assert bits(out) == bits(finished / "run")
    assert f'path = "{place / "moved"}"' in (out / "config.toml").read_text()


def test_other_fields_of_the_same_records_are_other_data(tmp_path, capfd):
    rows = [{"body": f"The body of number {n}: {WORDS}", "title": f"The title of number {n}, which is long: {WORDS[::-1]}"} for n in range(30)]
    for name in ("a.jsonl", "copy.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ("--out", tmp_path / "run", *TRAIN)
    cllm("train", tmp_path / "a.jsonl", *out, "--set", "data.text_field=body")
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match="which is other data"):
        cllm("train", tmp_path / "copy.jsonl", *out, "--set", "data.text_field=title")
    assert content(tmp_path / "run") == before
    capfd.readouterr()
    cllm("train", tmp_path / "copy.jsonl", *out, "--set", "data.text_field=body")
    assert "holds the text that" in capfd.readouterr().out
    for field, known in (("body", True), ("title", False)):
        cllm("evaluate", tmp_path / "run", tmp_path / "copy.jsonl", "--text-field", field, "--threads", 1)
        assert ("was trained on" in capfd.readouterr().out) == known


@pytest.mark.parametrize("relative", [False, True])
def test_a_run_is_resumed_from_any_folder(place, finished, tmp_path_factory, monkeypatch, relative, capfd):
    out = stopped(place)
    if relative:  # as older versions stored it
        name_data(out, place / "books", "books")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    cllm("train", "--resume", "--out", out)
    assert bits(out) == bits(finished / "run")
    assert f'path = "{"books" if relative else place / "books"}"' in (out / "config.toml").read_text()


def test_a_run_of_the_older_layout_goes_on(place, finished):
    out = stopped(place)
    (tokens,) = (out / "data").glob("tokens-*")
    tokens.rename(out / "data" / "tokens")
    cllm("train", "--resume", "--out", out)
    assert bits(out) == bits(finished / "run") and not list((out / "data").glob("tokens-*"))


@pytest.mark.parametrize("damage", ["missing", "cut off", "all data"])
def test_lost_tokens_are_packed_again_from_the_same_text(place, finished, damage, capfd):
    out = stopped(place)
    (tokens,) = (out / "data").glob("tokens-*")
    shard = tokens / "train" / "shard-00000.bin"
    if damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:-4])
    else:
        shutil.rmtree(tokens if damage == "missing" else out / "data")
    cllm("train", "--resume", "--out", out)
    assert "are missing" in capfd.readouterr().out
    assert bits(out) == bits(finished / "run") and content(tokens) == content(finished / "run" / "data" / tokens.name)
    assert not list((out / "data").glob(".*"))


@pytest.mark.parametrize("text", ["changed", "gone"])
def test_where_text_and_tokens_are_lost_the_error_says_exactly_what(place, text):
    out, own = stopped(place), place / "books"
    shutil.rmtree(next((out / "data").glob("tokens-*")))
    if text == "gone":
        shutil.rmtree(own)
    else:
        (own / "0.txt").write_text("another text altogether " * 30)
    before = content(out)
    with pytest.raises(DataError) as lost:
        cllm("train", "--resume", "--out", out)
    words = str(lost.value)
    assert f"the packed tokens that {out} began with" in words and f"{out / 'data'} holds no packed tokens" in words
    assert f"{own} does not give them again" in words and ("does not exist" if text == "gone" else "other tokens than then") in words
    assert f"cllm train {own} --from {out} --out NEW" in words
    assert content(out) == before


def test_packed_tokens_elsewhere_are_used_and_missed_by_name(place, tmp_path):
    (tokens,) = (place / "run" / "data").glob("tokens-*")
    shutil.copytree(tokens, tmp_path / "packed")
    cllm("train", tmp_path / "packed", "--out", tmp_path / "new", *TRAIN[:-8], "--threads", 1, "--set", "log.tensorboard=false")
    assert not (tmp_path / "new" / "data").exists()
    (tmp_path / "packed").rename(tmp_path / "away")
    with pytest.raises(DataError, match=f"{tmp_path / 'packed'} does not exist"):
        cllm("train", "--resume", "--out", tmp_path / "new")


# -- a run that was stopped before its first checkpoint -------------------------------------------------------------------


def killed_while_packing(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(Interrupted):
            cllm(*arguments)


def test_a_run_stopped_while_it_is_prepared_is_found_and_begins_again(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    killed_while_packing(monkeypatch, "train", finished / "books", *TRAIN)
    left = tmp_path / "runs" / "books"
    assert (left / "config.toml").exists() and not list((left / "data").glob("tokens-*"))
    (left / "data" / ".tokens-0123456789abcdef.0123456789abcdef.tmp").mkdir()  # of another attempt, which was killed
    cllm("train", "--resume", "--out", "runs/books")
    assert "was stopped before its first checkpoint and starts from the beginning" in capfd.readouterr().out
    assert bits(left) == bits(finished / "run") and not list((left / "data").glob(".*"))


def test_another_text_may_take_a_run_without_checkpoints_and_leaves_no_tokens_of_the_first(finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cllm("train", finished / "books", "--out", out, *TRAIN, "--plan")
    (first,) = (out / "data").glob("tokens-*")
    cllm("train", finished / "other", "--out", out, *TRAIN)
    (second,) = (out / "data").glob("tokens-*")
    assert second != first


# -- what is said ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_names_both_ways(place, finished, capfd):
    cllm("train", place / "books", "--out", place / "run", *TRAIN)
    printed = capfd.readouterr().out
    assert f"{place / 'run'} is finished: all {STEPS} steps are done." in printed and f"--from {place / 'run'} --out NEW" in printed
    cllm("train", place / "books", "--out", place / "flat", *TRAIN, "--schedule", "constant")
    cllm("train", place / "books", "--out", place / "flat", *TRAIN, "--schedule", "constant")
    assert f"cllm train --resume --out {place / 'flat'} --steps MORE" in capfd.readouterr().out
    cllm("train", "--resume", "--out", place / "flat", "--steps", 8)
    assert f"the run ends after 8 steps instead of {STEPS}" in capfd.readouterr().err
    assert CheckpointStore(place / "flat" / "checkpoints").newest_good().step == 8
    cllm("train", "--resume", "--out", place / "flat")
    assert f"{place / 'flat'} is finished: all 8 steps are done." in capfd.readouterr().out


def settings_said(printed):
    lines = printed.split("settings that are not defaults:\n")[1].split("\n\n")[0].splitlines()
    return {key: (value, source) for key, value, source in (line.split(maxsplit=2) for line in lines if line.startswith("  "))}


def test_resume_lists_what_is_no_default_with_its_true_source(place, capfd):
    config = place / "run" / "config.toml"
    config.write_text(config.read_text().replace("keep = 2 ", "keep = 5 "))
    cllm("train", "--resume", "--out", place / "run", "--threads", 2)
    said = settings_said(capfd.readouterr().out)
    assert said["train.keep"] == ("5", f"file {config}")
    assert said["train.threads"] == ("2", "--threads")
    assert said["train.steps"] == (str(STEPS), "--steps") and said["optim.min_lr"] == ("0.001", "derived: learning_rate / 10")
    assert [key for key, (_, source) in said.items() if source.startswith("file ")] == ["train.keep"]


def test_evaluating_the_training_text_says_so(place, finished, tmp_path, capfd):
    shutil.copy(place / "books" / "0.txt", tmp_path / "copy.md")
    for data, files in ((place / "books", 3), (tmp_path / "copy.md", 1), (place / "other", 0)):
        for checkpoint in (place / "run", CheckpointStore(place / "run" / "checkpoints").path(STEPS)):
            cllm("evaluate", checkpoint, data, "--threads", 1, "--json")
            printed, errors = capfd.readouterr()
            assert json.loads(printed)["trained_on_files"] == files
            assert ("was trained on: the figures tell how well the model remembers it" in errors) == (files > 0)
            assert ("On the part kept for validation its loss was" in errors) == (files > 0)


def test_the_next_commands_do_not_evaluate_the_training_text(place, capfd):
    cllm("train", place / "books", "--out", place / "run", *TRAIN)
    (evaluate,) = [line for line in capfd.readouterr().out.splitlines() if "cllm evaluate" in line]
    assert "OTHER-TEXT" in evaluate and str(place / "books") not in evaluate


def test_a_copied_run_belongs_to_itself(place):
    """Nothing in a run names the folder that it lies in."""
    (place / "run").rename(place / "renamed run")
    cllm("train", "--resume", "--out", place / "renamed run")
    assert Dataset.open(next((place / "renamed run" / "data").glob("tokens-*"))).train.num_tokens > 0
    with pytest.raises(CLLMError, match="no run to continue"):
        cllm("train", "--resume", "--out", place / "run")


def test_the_shape_that_a_preset_gives_is_told_in_one_line(finished, tmp_path, capfd):
    chosen = ("--preset", "cllm-1m", "--num-heads", 2, *TINY[6:])
    cllm("train", finished / "books", "--out", tmp_path / "run", "--steps", 2, *chosen, "--plan")
    printed = capfd.readouterr().out
    assert re.search(r"model    cllm family, .* 2 heads .* \(preset cllm-1m\)\n", printed)
    assert {key for key in settings_said(printed) if key.startswith("model.")} == {"model.preset", "model.num_heads"}
    cllm("train", finished / "other", "--from", finished / "run", "--out", tmp_path / "more", "--steps", 2, "--batch-size", 2, *TINY[12:])
    said = settings_said(capfd.readouterr().out)
    assert not [key for key in said if key.startswith("model.")] and said["finetune.start_from"] == (str(finished / "run"), "--from")


def test_a_model_that_writes_nothing_is_said_to(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("cllm.train.samples.sample_text", lambda *given, **more: "")
    cllm("train", finished / "books", "--out", tmp_path / "run", *TRAIN)
    assert "A sample, starting from nothing:\n\n    (none: the model ended its text at once)\n" in capfd.readouterr().out
