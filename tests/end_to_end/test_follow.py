"""`cllm train --follow` as a user types it: text that grows, rounds that are kept or undone, a kill in the middle."""

import json
import shutil

import pytest
from command import Started, cllm, wait_until

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore

SETTINGS = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 32, "--batch-size", 4, "--vocab-size", 320, "--threads", 2,
            "--steps", 30, "--checkpoint-every", 5, "--round-bytes", 1000, "--set", "log.tensorboard=false")  # fmt: skip


def grow(docs, numbers, words="The lamp of the village was lit again in the evening"):
    docs.mkdir(exist_ok=True)
    for number in numbers:
        (docs / f"{number:02d}.txt").write_text("".join(f"{words}, said number {number * line}. " for line in range(60)))


def follow(docs, out, *more):
    return cllm("train", docs, "--follow", "--once", "--out", out, *SETTINGS, *more, "--json")


def told(ran):
    assert ran.status == 0, ran.err
    return [{key: value for key, value in row.items() if key != "seconds"} for row in ran.json["rounds"]]


def weights_of(out):
    store = CheckpointStore((out / "model").resolve() / "checkpoints")
    return sha256_of(store.path(store.latest()) / "model.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Text and the folder that has learnt it in a first round."""
    folder = tmp_path_factory.mktemp("follow")
    grow(folder / "docs", range(20))
    (row,) = told(follow(folder / "docs", folder / "out"))
    assert row["accepted"] and row["documents"] == 20 and row["new_after"] < 6
    return folder


@pytest.fixture
def grown(first, tmp_path):
    """The same in a folder of its own, with more text than was learnt, of the same kind."""
    shutil.copytree(first / "out", tmp_path / "out", symlinks=True)
    grow(first / "docs", range(20, 40))
    return first / "docs", tmp_path / "out"


def test_a_killed_round_ends_with_the_bits_of_one_that_never_stopped(grown, tmp_path):
    docs, out = grown
    shutil.copytree(out, tmp_path / "killed", symlinks=True)
    rows = told(follow(docs, out))
    assert len(rows) == 2 and rows[1]["documents"] == 20 and rows[1]["replayed_bytes"] > 0

    killed = tmp_path / "killed"
    process = Started("train", docs, "--follow", "--once", "--out", killed, *SETTINGS)
    wait_until(lambda: CheckpointStore(killed / "rounds" / "0002" / "run" / "checkpoints").latest() in range(5, 30), process)
    process.kill()
    process.wait()
    grow(docs, range(40, 41))  # what comes meanwhile belongs to the next round
    again = told(follow(docs, killed, "--round-bytes", 100_000))
    assert again == rows and weights_of(killed) == weights_of(out)
    (docs / "40.txt").unlink()

    page = cllm("report", out)
    assert page.status == 0 and "Rounds" in (out / "report.html").read_text("utf-8")
    assert cllm("generate", out / "model", "--prompt", "The lamp", "--max-tokens", 4).status == 0


def test_a_round_that_makes_old_text_worse_is_undone(grown, tmp_path):
    docs, out = grown
    strange = tmp_path / "docs"
    shutil.copytree(docs, strange)
    about = out / "follow.json"
    about.write_text(json.dumps({"data": str(strange)}))
    grow(strange, range(20, 60), words="".join(chr(0x3041 + place % 80) for place in range(50)))
    before = weights_of(out)
    rows = told(follow(strange, out, "--replay", 0, "--tolerance", 0, "--learning-rate", 1.0))
    assert [row["accepted"] for row in rows] == [True, False] and "old text lost" in rows[1]["reason"]
    assert weights_of(out) == before and not (out / "rounds" / "0002" / "run").exists()


def test_what_does_not_go_with_following_is_refused(first):
    docs = first / "docs"
    for arguments, words in (
        (("--follow", "--plan"), "--follow excludes"),
        (("--replay", "0.5"), "--replay belongs to --follow"),
        (("--once",), "--once belongs to --follow"),
        (("--follow", "--replay", "1.5"), "replay must be"),
    ):
        ran = cllm("train", docs, "--out", first / "new", *arguments)
        assert ran.status == 2 and words in ran.err, ran.err
    other = cllm("train", first, "--follow", "--once", "--out", first / "out", *SETTINGS)
    assert other.status == 2 and "follows" in other.err
