"""The rounds of a training that follows text which grows: what each draws, what it holds out, what it replays, and what is left of it."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.config.follow import FollowSettings
from cllm.data.documents.scan import Reading
from cllm.monitor.records import RoundRow
from cllm.monitor.rounds import read_rounds
from cllm.runtime.errors import CheckpointError, UserError
from cllm.train.rounds import Losses, Rounds, verdict

SETTINGS = FollowSettings(round_bytes=100, replay=0.5)


def write(folder, numbers):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number:03d}.txt").write_text(f"The story of number {number}. " + "It goes on for a while. " * (10 + number % 7))


def texts(folder):
    return [json.loads(line)["text"] for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]


def row_of(now, accepted=True):
    return RoundRow(
        round=now.number,
        documents=now.documents,
        bytes=now.bytes,
        held_out=now.held_out,
        replayed_bytes=now.replayed_bytes,
        sources=now.sources,
        accepted=accepted,
        reason="as the test says",
        steps=1,
    )


@pytest.fixture
def followed(tmp_path):
    """A folder of 40 documents and the rounds that follow it."""
    write(tmp_path / "docs", range(40))
    return tmp_path / "docs", Rounds(tmp_path / "out", str(tmp_path / "docs"))


def begin(rounds, docs, settings=SETTINGS):
    return rounds.begin(docs, settings, Reading(), None)


def end(rounds, now, accepted=True, keep_text=10**9):
    now.run.mkdir()
    rounds.end(row_of(now, accepted), keep_text)


def test_each_document_is_learnt_or_held_out_once(followed):
    docs, rounds = followed
    now = begin(rounds, docs)
    everything = sorted((docs / f"{number:03d}.txt").read_text() for number in range(40))
    assert sorted(texts(now.text) + texts(now.held_out_text)) == everything
    assert (now.number, now.documents, now.replayed_bytes) == (1, 40, 0) and 1 <= now.held_out <= 12
    end(rounds, now)
    assert begin(rounds, docs) is None, "there was nothing new"


def test_a_round_takes_what_is_new_and_replays_what_is_old(followed):
    docs, rounds = followed
    first = begin(rounds, docs)
    learnt, held_out = texts(first.text), texts(first.held_out_text)
    end(rounds, first)
    write(docs, range(40, 60))
    (docs / "copy.txt").write_text((docs / "001.txt").read_text())  # the same text under another name is not new
    now = begin(rounds, docs)
    new = texts(now.text)
    replayed = [json.loads(line)["text"] for line in (now.text / "replay.jsonl").read_text("utf-8").splitlines()]
    assert now.documents == 20
    assert set(replayed) <= set(learnt) and not set(held_out) & set(new), "held-out text is never learnt"
    assert 0 < now.replayed_bytes <= now.bytes, "a half of replay is as much as is new"


def test_a_round_that_has_begun_is_found_again_whatever_has_come_since(followed):
    docs, rounds = followed
    now = begin(rounds, docs)
    write(docs, range(40, 50))
    again = Rounds(rounds.out, str(docs)).begun()
    assert again == now and len(texts(again.text) + texts(again.held_out_text)) == 40


def test_the_same_documents_draw_the_same_round_in_any_folder(followed, tmp_path):
    docs, rounds = followed
    shutil.copytree(docs, tmp_path / "elsewhere")
    other = Rounds(tmp_path / "other", str(tmp_path / "elsewhere"))
    for _ in range(2):
        here, there = begin(rounds, docs), begin(other, tmp_path / "elsewhere")
        for name in ("text/new.jsonl", "held_out/held_out.jsonl", "keys.bin"):
            assert (here.folder / name).read_bytes() == (there.folder / name).read_bytes(), name
        assert texts(here.text) == texts(there.text)
        end(rounds, here), end(other, there)
        write(docs, range(60, 80)), write(tmp_path / "elsewhere", range(60, 80))


def test_a_round_that_was_undone_is_not_begun_from_and_its_text_does_not_come_again(followed):
    docs, rounds = followed
    first = begin(rounds, docs)
    end(rounds, first)
    write(docs, range(40, 60))
    bad = begin(rounds, docs)
    end(rounds, bad, accepted=False)
    assert rounds.previous() == first.run and rounds.old_held_out() == [first.held_out_text]
    assert not bad.run.exists() and not bad.text.exists()
    assert begin(rounds, docs) is None
    write(docs, range(60, 80))
    third = begin(rounds, docs)
    undone = {f"The story of number {number}." for number in range(40, 60)}
    assert not any(text.split(".")[0] + "." in undone for text in texts(third.text))


def test_a_single_document_is_cut_so_that_its_end_is_held_out(tmp_path):
    (tmp_path / "docs").mkdir()
    book = "".join(f"Chapter {number}. Something happens here. " for number in range(200))
    (tmp_path / "docs" / "book.txt").write_text(book)
    now = begin(Rounds(tmp_path / "out", "docs"), tmp_path / "docs")
    (learnt,), (held_out,) = texts(now.text), texts(now.held_out_text)
    assert learnt + held_out == book and len(held_out) < len(learnt) and now.documents == now.held_out == 1


def test_few_new_bytes_wait_for_more(followed):
    docs, rounds = followed
    end(rounds, begin(rounds, docs))
    write(docs, [40])
    assert begin(rounds, docs, FollowSettings(round_bytes=10_000)) is None
    write(docs, range(41, 100))
    assert begin(rounds, docs, FollowSettings(round_bytes=10_000)).documents > 40


def test_the_disk_stays_bounded(followed):
    docs, rounds = followed
    for number in range(5):
        write(docs, range(100 * number, 100 * number + 20))
        end(rounds, begin(rounds, docs), keep_text=9_000)
    runs = [path.parent.name for path in (rounds.out / "rounds").glob("*/run")]
    assert sorted(runs) == ["0004", "0005"], "the last two that were kept"
    kept = sum(path.stat().st_size for path in (rounds.out / "rounds").glob("*/text/*.jsonl"))
    assert 0 < kept <= 9_000
    assert (rounds.out / "model").resolve() == rounds.previous().resolve()


def test_rows_survive_a_restart_and_a_damaged_file_is_told(followed):
    docs, rounds = followed
    end(rounds, begin(rounds, docs))
    assert Rounds(rounds.out, str(docs)).rows == rounds.rows == read_rounds(rounds.out)
    with open(rounds.out / "rounds.jsonl", "a") as file:
        file.write('{"round": 2, "docu')
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl is damaged"):
        Rounds(rounds.out, str(docs))


def test_a_folder_follows_one_text(followed):
    _, rounds = followed
    with pytest.raises(UserError, match=r"follows .*docs, not other"):
        Rounds(rounds.out, "other")


loss = st.floats(0.01, 20, allow_nan=False)


@given(loss, loss, loss, loss, st.floats(0, 1))
def test_the_verdict_is_what_the_losses_say(old_before, old_after, new_before, new_after, tolerance):
    kept, why = verdict(Losses(old_before, new_before), Losses(old_after, new_after), tolerance)
    assert kept == (old_after <= old_before * (1 + tolerance) and new_after < new_before) and why


def test_text_that_is_not_there_decides_nothing():
    assert verdict(None, Losses(math.nan, 3.0), 0.01)[0]
    assert verdict(Losses(math.nan, math.nan), Losses(math.nan, math.nan), 0.01)[0]
    assert not verdict(Losses(1.0, math.nan), Losses(2.0, math.nan), 0.01)[0]


def test_keys_of_a_round_are_those_of_its_documents(followed):
    docs, rounds = followed
    now = begin(rounds, docs)
    keys = np.fromfile(now.folder / "keys.bin", "<u8")
    assert len(keys) == 40 and (np.diff(keys.astype(object)) > 0).all()
