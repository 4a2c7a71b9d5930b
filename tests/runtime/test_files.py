"""Files and folders appear whole or not at all: whichever call fails, and wherever the process is killed."""

import errno
import os
import signal
import threading
import warnings

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cllm.runtime import files

CALLS = ("open", "mkdir", "listdir", "fsync", "rename", "replace")  # of os, by which an entry is written


class Stop(Exception):
    pass


def write_file(place, content):
    files.write_file(place, content)


def write_folder(place, content):
    with files.new_folder(place) as beside:
        (beside / "inside").mkdir()
        (beside / "inside" / "file").write_bytes(content)
        (beside / "other").write_bytes(content)


def content_of(place):
    """What a file or folder holds; a folder must be whole."""
    if place.is_dir():
        first, second = (place / "inside" / "file").read_bytes(), (place / "other").read_bytes()
        assert first == second
        return first
    return place.read_bytes() if place.exists() else None


def at_call(number, monkeypatch, do):
    """Calls `do` at the given number of the calls that write; returns how many there have been so far."""
    count = [0]

    def watched(call):
        def watch(*arguments, **options):
            count[0] += 1
            if count[0] == number:
                do()
            return call(*arguments, **options)

        return watch

    for name in CALLS:
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    return count


def fail():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("before", [None, b"old"])
def test_whichever_call_fails_the_old_or_the_new_content_is_there_and_no_temporary_entry(tmp_path, monkeypatch, write, before):
    place, failures = tmp_path / "deep" / "place", 0
    for number in range(1, 100):
        if before is not None:
            write(place, before)
        with monkeypatch.context() as patch:
            count = at_call(number, patch, fail)
            try:
                write(place, b"new")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failures += 1
            else:  # nothing failed, or only the removal of the old folder
                assert content_of(place) == b"new"
                patch.undo()
                files.clean(place.parent, "place")
        assert content_of(place) in (before, b"new")
        assert [path.name for path in place.parent.glob("*")] in ([], ["place"])
        if count[0] < number:
            assert failures >= 6
            return
        if content_of(place) == b"new":
            files.remove_folder(place) if place.is_dir() else place.unlink()
    pytest.fail("it never ended")


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("before", [None, b"old"])
def test_wherever_the_writer_is_killed_the_next_one_finds_the_old_or_the_new_content(tmp_path, monkeypatch, write, before):
    place = tmp_path / "place"
    for number in range(1, 100):
        if before is not None:
            write(place, before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads: the child only writes files
            child = os.fork()
        if child == 0:
            count = at_call(number, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
            write(place, b"new")
            os._exit(1 if count[0] < number else 2)
        status = os.waitpid(child, 0)[1]
        files.clean(tmp_path, "place")
        assert content_of(place) in (before, b"new")
        assert [path.name for path in tmp_path.glob("*")] in ([], ["place"])
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 1 and number > 6 and content_of(place) == b"new"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        if place.exists():
            files.remove_folder(place) if place.is_dir() else place.unlink()
    pytest.fail("it never ended")


def test_a_block_that_raises_leaves_what_was_there(tmp_path):
    files.write_file(tmp_path / "file", b"old")
    write_folder(tmp_path / "folder", b"old")
    for error in (Stop, KeyboardInterrupt):
        with pytest.raises(error), files.new_file(tmp_path / "file") as beside:
            beside.write_bytes(b"new")
            raise error
        with pytest.raises(error), files.new_folder(tmp_path / "folder") as beside:
            (beside / "file").write_bytes(b"new")
            raise error
    assert content_of(tmp_path / "file") == content_of(tmp_path / "folder") == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_whose_old_content_cannot_be_put_back_is_put_back_later(tmp_path, monkeypatch):
    """Not even two failures in a row lose anything."""
    write_folder(tmp_path / "folder", b"old")
    rename, calls = os.rename, []

    def only_the_first(*arguments):
        calls.append(arguments)
        return rename(*arguments) if len(calls) == 1 else fail()

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", only_the_first)
        with pytest.raises(OSError):
            write_folder(tmp_path / "folder", b"new")
    assert len(calls) == 3
    files.clean(tmp_path)
    assert content_of(tmp_path / "folder") == b"old" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_the_dead_are_removed_and_the_entries_of_the_living_are_kept(tmp_path):
    dead = [tmp_path / ".place.0123456789abcdef.tmp", tmp_path / ".place.77.tmp"]
    others = [tmp_path / ".other.0123.tmp", tmp_path / ".place.tmp", tmp_path / "place.0123.tmp", tmp_path / ".place.xyz.tmp"]
    for path in (*dead, *others):
        path.mkdir()
        (path / "content").write_bytes(b"x")
    with files.new_file(tmp_path / "place") as alive:
        assert not any(path.exists() for path in dead)
        files.clean(tmp_path)
        assert alive.exists()
        files.clean(tmp_path, alone=True)
        assert not alive.exists()
        alive.touch()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "place", *others[1:]])


def test_a_folder_that_was_moved_aside_is_put_back_unless_another_took_its_place(tmp_path):
    for name in ("lost", "replaced"):
        (tmp_path / f".{name}.12ab.old.tmp").mkdir()
        (tmp_path / f".{name}.12ab.old.tmp" / "old").touch()
    (tmp_path / "replaced").mkdir()
    files.clean(tmp_path)
    assert (tmp_path / "lost" / "old").exists() and not (tmp_path / "replaced" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lost", "replaced"]


def test_many_writers_of_one_place_do_not_disturb_each_other(tmp_path):
    place, failed = tmp_path / "place", []
    contents = [bytes([number]) * 10_000 for number in range(6)]

    def write(content):
        try:
            for _ in range(15):
                files.write_file(place, content)
                assert place.read_bytes() in contents
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [path.name for path in tmp_path.iterdir()] == ["place"]


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=255))
@example("x" * 255)
@example("\u2603" * 85)
@example("*[a]?.\n.old.tmp")
@settings(max_examples=20, deadline=None)
def test_any_name_that_the_file_system_takes_is_written(tmp_path_factory, name):
    assume(name not in (".", "..") and len(name.encode()) <= 255)
    folder = tmp_path_factory.mktemp("x")
    for content in (b"old", b"new"):
        files.write_file(folder / "a" / name, content)
        write_folder(folder / "b" / name, content)
        for place in (folder / "a" / name, folder / "b" / name):
            assert content_of(place) == content and os.listdir(place.parent) == [name]


def test_a_link_is_followed_and_what_is_no_file_is_never_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    for content in (b"one", b"two"):
        files.write_file(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path / "far"):
        with pytest.raises(OSError, match="not a regular file"):
            files.write_file(place, b"x")
    for place in (tmp_path / "pipe", tmp_path / "far" / "file"):
        with pytest.raises(OSError, match="not a folder"):
            write_folder(place, b"x")
    with pytest.raises(NotADirectoryError):
        files.write_file(tmp_path / "far" / "file" / "below", b"x")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "far" / "file").read_bytes() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link", "pipe"]


def test_new_entries_have_the_permissions_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_file(tmp_path / "file", b"x")
        write_folder(tmp_path / "folder", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640 and (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_file_system_that_cannot_flush_folders_is_no_failure(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    write_folder(tmp_path / "a" / "b" / "folder", b"x")
    assert content_of(tmp_path / "a" / "b" / "folder") == b"x"
