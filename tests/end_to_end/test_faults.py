"""The fault campaign: the command that a user types, killed at random moments, on a full disk, with flipped bytes, and what is left of it.

A run that was disturbed must end with the bits of one that was not, whatever the number of threads in each life of it. `pytest
tests/end_to_end/test_faults.py --kills 100` is the long form; the seed of a failing campaign is printed with it.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command import TINY, Started, cllm, lines

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.monitor.metrics import TIME_FIELDS, read_metrics

STEPS = 120
SETTINGS = (*TINY[:-2], "--steps", STEPS, "--grad-accum", 2, "--checkpoint-every", 9, "--eval-every", 30, "--set", "log.tensorboard=false")


def start(text, out, threads=2) -> Started:
    return Started("train", text, "--out", out, *SETTINGS, "--threads", threads)


def finish(process: Started) -> tuple[int, str]:
    printed, errors = process.communicate()
    assert "Traceback" not in errors, errors
    return process.returncode, printed + errors


def outcome(out: Path):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    rows = [
        {key: value for key, value in row.items() if key not in TIME_FIELDS}
        for row in read_metrics(out / "metrics.jsonl") if row["kind"] != "machine"
    ]  # fmt: skip
    return newest.step, sha256_of(newest.path / "model.safetensors"), sha256_of(newest.path / "optimizer.safetensors"), rows


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """The run that nobody disturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    status, said = finish(start(text, out))
    assert status == 0, said
    return outcome(out)


def killed(process: Started, out: Path, chance: random.Random) -> bool:
    """Kills a training somewhere: while it begins, so many steps later, or while it writes a checkpoint. False when it had ended before."""
    metrics, folder = out / "metrics.jsonl", out / "checkpoints"
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0.0, 2.0))
        process.kill()
    else:
        rows, writing = lines(metrics) + chance.randint(1, STEPS // 2), chance.random() < 0.5
        while lines(metrics) < rows and process.poll() is None:
            if writing and folder.is_dir() and any(folder.glob(".step-*.tmp")):
                break
            time.sleep(0.001)
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    status, said = finish(process)
    assert status in (0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT), said
    return status != 0


def flip(out: Path, chance: random.Random) -> None:
    """One flipped bit in one file of the newest checkpoint, when there is one before it to fall back to."""
    store = CheckpointStore(out / "checkpoints")
    if len(store.steps()) > 1:
        file = chance.choice(sorted(store.path(store.steps()[-1]).iterdir()))
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)


@pytest.mark.timeout(7200)
def test_killed_again_and_again_a_run_loses_nothing_and_ends_with_the_same_bits(text, straight, tmp_path, request):
    wanted, seed = request.config.getoption("--kills"), random.randrange(2**32)
    chance = random.Random(seed)
    kills = runs = 0
    while kills < wanted:
        out, seen, lives = tmp_path / f"run-{runs}", 0, 0
        while True:
            lives += 1
            process = start(text, out, threads=chance.choice([1, 2, 3, 5]))
            if kills < wanted and killed(process, out, chance):
                kills += 1
            else:
                status, said = finish(process)
                assert status == 0, f"seed {seed}: {said}"
                break
            store = CheckpointStore(out / "checkpoints")
            good = store.newest_good() if store.latest() else None  # `latest` may still name one with a flipped bit, which the run passed over
            newest = good.step if good else 0
            assert newest >= seen, f"seed {seed}: the run fell back from step {seen} to {newest}"
            seen = newest
            if chance.random() < 0.2:
                flip(out, chance)
                seen = 0
        assert outcome(out) == straight, f"seed {seed}, run {runs} of {lives} lives"
        assert not list((out / "checkpoints").glob(".*"))
        runs += 1
    print(f"{kills} kills in {runs} runs, all with the same bits (seed {seed})")


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_one_clear_line_and_the_run_goes_on_when_there_is_room(text, straight, small_disk):
    status, said = finish(start(text, small_disk / "run"))
    assert status == 1 and "Free some space" in said, said
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    status, said = finish(start(text, small_disk / "run"))
    assert status == 0, said
    assert outcome(small_disk / "run")[:3] == straight[:3]


def test_flipped_bytes_anywhere_in_a_run_are_noticed_or_change_nothing(text, straight, tmp_path):
    """Every file of a run but what people read: its damage is found and repaired from the text, passed over, or refused by name."""
    process = start(text, tmp_path / "run")
    while process.poll() is None and (CheckpointStore(tmp_path / "run" / "checkpoints").latest() or 0) < 50:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130
    chance = random.Random(3)
    files = [each for each in sorted((tmp_path / "run").rglob("*")) if each.is_file() and each.suffix not in (".txt", ".lock", ".jsonl", ".toml")]
    files = [each for each in files if each.name not in (".lock", "latest", "best") and each.stat().st_size]
    assert len(files) > 8
    for file in chance.sample(files, 3):
        good = file.read_bytes()
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 4
        file.write_bytes(bad)
        ran = cllm("evaluate", tmp_path / "run", text / "bisect.py", "--json")
        assert ran.status in (0, 1), ran.err
        assert ran.status == 0 or str(file.name) in ran.err, f"{file}: {ran.err}"
        file.write_bytes(good)
    status, said = finish(start(text, tmp_path / "run", threads=3))
    assert status == 0, said
    assert outcome(tmp_path / "run") == straight
