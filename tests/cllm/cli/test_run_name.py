"""The default folder of a run: readable, safe, and never that of other data."""

import os
import subprocess
import sys
import unicodedata
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cllm.cli.run_name import data_of, default_run, same_place, take_folder
from cllm.config.train import TrainConfig
from cllm.monitor.guards import RunLock
from cllm.runtime.errors import CheckpointError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(data, run=None):
    """What a training leaves first: its folder, and in it whose it is."""
    run = run or default_run(str(data))
    run.mkdir(parents=True)
    (run / "config.toml").write_text(TrainConfig(path=str(data)).to_toml())
    return run


def folder(path):
    path.mkdir(parents=True)
    return path


NAMES = {
    "books": "books",
    "v1.2": "v1.2",
    "Größe und Maß": "Größe-und-Maß",
    "小説": "小説",
    "हिन्दी": "हिन्दी",
    "книги": "книги",
    ".hidden": "hidden",
    "-rf": "rf",
    "a b; rm $HOME": "a-b-rm-HOME",
    "\x1b[31mred\n": "31mred",
    "\u202eabc": "abc",
    "...": "run",
    "🙂": "run",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_keep_the_letters_of_any_script_and_nothing_that_needs_care(here, name):
    assert default_run(str(folder(here / "data" / name))) == Path("runs") / unicodedata.normalize("NFC", NAMES[name])


def test_a_file_gives_its_name_without_the_ending_and_the_root_a_name_at_all(here):
    (here / "books.txt").touch()
    assert default_run("books.txt") == default_run(str(here / "books.txt")) == Path("runs/books")
    assert default_run("/") == Path("runs/run")


def test_data_of_one_name_gets_a_run_of_its_own_and_finds_it_again(here):
    places = [folder(here / "a" / "books"), folder(here / "b" / "books"), here / "books.txt", folder(here / "小説"), folder(here / "数学")]
    (here / "books.txt").touch()
    runs = [begin(place) for place in places]
    assert runs[0] == Path("runs/books") and runs[1].name.startswith("books-") and len(set(runs)) == 5
    for place, run in zip(places, runs):
        assert default_run(str(place)) == run == default_run(os.path.relpath(place)) and data_of(run) == str(place)
    (runs[0] / "config.toml").unlink()
    assert default_run(str(places[1])) == runs[1], "the free name does not draw a run away from its own folder"


def test_two_spellings_of_one_place_are_one_run(here):
    folder(here / "books")
    (here / "link").symlink_to(here / "books", target_is_directory=True)
    run = begin(here / "books")
    assert same_place("books/../books/", str(here / "link"))
    assert default_run("./books/") == default_run("books") == run


def test_runs_of_older_versions_are_found_under_their_old_names(here):
    for name, old in (("小説", "run"), ("my.data", "my"), ("Maß", "Ma")):
        folder(here / name)
        begin(name, here / "runs" / old)  # with the path as it was given then
        assert default_run(name) == Path("runs") / old


@settings(max_examples=200, deadline=None)
@example("a" * 255)
@example("字" * 85)
@example("e\u0301" * 60)
@example("a\udcff")
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=255))
def test_any_name_gives_a_folder_that_can_be_made_and_typed(name):
    run = default_run(f"/nowhere/{name}")
    assert run.parent == Path("runs") and run == default_run(f"/nowhere/{name}")
    assert 0 < len(os.fsencode(run.name)) <= 80 and run.name[0] not in "-." and run.name.isprintable()
    assert not set(run.name) & set(" \t\n'\"\\$`;&|<>(){}[]*?!#~") and run.name == unicodedata.normalize("NFC", run.name)


def test_names_that_are_cut_stay_apart(here):
    long = ["字" * 70 + end for end in "ab"]
    runs = [begin(folder(here / name)) for name in long]
    assert runs[0] != runs[1] and [default_run(name) for name in long] == runs


# -- taking it -------------------------------------------------------------------------------------------------------------


def test_a_name_that_another_command_takes_at_the_same_moment_is_left_to_it(here, monkeypatch):
    """Between the look at runs/books and its lock, another command begins there."""
    import cllm.cli.run_name as module

    others, mine = folder(here / "a" / "books"), folder(here / "b" / "books")
    first = default_run

    def beaten(data):
        chosen = first(data)
        if chosen == Path("runs/books") and not chosen.exists():
            begin(others, chosen)
        return chosen

    monkeypatch.setattr(module, "default_run", beaten)
    with ExitStack() as held:
        run, lock = take_folder(None, str(mine), held)
        assert run.name.startswith("books-") and lock.path.parent == run
        with pytest.raises(CheckpointError), RunLock(run):
            pass
        with RunLock(Path("runs/books")):
            pass


def test_a_run_that_is_being_prepared_is_waited_for_until_it_says_whose_it_is(here):
    others, mine = folder(here / "a" / "books"), folder(here / "b" / "books")
    code = (
        "import sys, time; from pathlib import Path; from cllm.monitor.guards import RunLock; from cllm.config.train import TrainConfig\n"
        "with RunLock(Path('runs/books')):\n"
        "    print('locked', flush=True); time.sleep(0.3)\n"
        "    Path('runs/books/config.toml').write_text(TrainConfig(path=sys.argv[1]).to_toml()); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(others)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with ExitStack() as held:
            assert take_folder(None, str(mine), held)[0].name.startswith("books-")
        with pytest.raises(CheckpointError, match="is being trained by process"), ExitStack() as held:
            take_folder(None, str(others), held)
    finally:
        process.communicate("")


def test_a_folder_that_was_named_is_taken_as_it_is(here):
    begin(folder(here / "a" / "books"))
    with ExitStack() as held:
        assert take_folder(Path("runs/books"), str(folder(here / "b" / "books")), held)[0] == Path("runs/books")
