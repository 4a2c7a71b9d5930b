"""The result has the same bytes for any number of workers, after a kill at any moment, and for files listed in any order."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import wait_until
from made import digest, make, recipe

from cllm.data.preparation.manifest import open_prepared
from cllm.data.preparation.plan import prepare
from cllm.data.preparation.runner import Pool

pytest.importorskip("pyarrow", reason="the data extra is not installed")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def expected(sources, tmp_path_factory):
    """What one worker makes of them."""
    out = tmp_path_factory.mktemp("expected") / "out"
    pool = Pool(1)
    prepare(sources, out, recipe(), pool)
    pool.close()
    prepared = open_prepared(out)
    reasons = prepared.summary["tally"]["sources"]
    assert sum(shard.is_kept for shard in prepared.shards) > 2
    assert all(counts["dropped"].get("near duplicate", 0) and counts["kept"] for counts in reasons.values())
    assert len(parts_of_records(out)) > 3
    return digest(out)


def parts_of_records(out):
    """The finished tasks that have read a part of a large file, but for its first one, by their names."""
    return {place.name: place.stat().st_mtime_ns for place in (out / ".ledger/extract").glob("*.json") if len(place.stem) > 6}


def start(workers, out, sources):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    command = [sys.executable, Path(__file__).parent / "made.py", str(workers), out, *sources]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_kill_at_three_moments(sources, expected, tmp_path):
    out = tmp_path / "out"
    for moment in ("extract/000002.json", "clean/000003.json", "verify/000000.json"):
        process = start(2, out, sources)
        wait_until((out / ".ledger" / moment).exists, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(2, out, sources)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert digest(out) == expected


def test_a_large_file_in_which_it_was_killed_is_read_on_from_there(sources, expected, tmp_path):
    out = tmp_path / "out"
    process = start(2, out, sources)
    wait_until(lambda: len(parts_of_records(out)) > 1, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    read = parts_of_records(out)
    process = start(2, out, sources)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert digest(out) == expected and read.items() <= parts_of_records(out).items()


def test_three_workers_and_files_that_are_listed_in_another_order(sources, expected, tmp_path, monkeypatch):
    others = make(tmp_path / "others", reverse=True)
    listed = os.scandir

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def close(self):
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(sorted(listed(path), key=lambda entry: entry.name, reverse=True)))
    monkeypatch.chdir(tmp_path / "others")
    pool = Pool(3)
    prepare(others[::-1], tmp_path / "out", recipe(), pool)
    pool.close()
    # The places of the sources are told in the mark, and nothing else of them anywhere.
    mark = tmp_path / "out" / "prepared.json"
    mark.write_text(mark.read_text().replace(str(tmp_path / "others"), str(Path(sources[0]).parent)))
    assert digest(tmp_path / "out") == expected
