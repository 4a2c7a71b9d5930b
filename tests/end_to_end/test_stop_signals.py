"""Ctrl-C and SIGTERM at every stage of `cllm train`: an answer at once, a checkpoint when there is something to save, and the same bits afterwards.

Each command runs in a process of its own in which one function is made to last (see `command.Lasting`).
"""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import PATIENCE, TINY, Lasting, cllm, wait_until

from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.monitor.stop_signals import AT_ONCE, BEFORE_TRAINING, SAME


class Command(Lasting):
    """The command, until it ends."""

    def end(self, *signals: int) -> tuple[int, str, str]:
        """Sends the signals, each once the one before must count as another, and waits for the end: (status, standard output, standard error)."""
        for number, each in enumerate(signals):
            if number:  # a busy process may answer late, and two in quick succession are one
                wait_until(lambda number=number: len(re.findall(r"^SIG", self.err, re.MULTILINE)) >= number, self)
                self._pass(SAME * 1.2)
            self.send_signal(each)
        out, err = self.communicate()
        assert "Traceback" not in err, err
        return self.wait(), out, err

    def _pass(self, seconds: float) -> None:
        """Lets time pass."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.poll() is None:
            time.sleep(0.01)


BEFORE = {
    "reading": "cllm.data.pipeline:load_corpus",
    "learning a vocabulary": "cllm.data.pipeline:train_on",
    "packing": "cllm.data.pipeline:pack",
    "compiling the first step": "cllm.model.model/Model:loss",
}


@pytest.mark.parametrize("stage, where, number", [
    ("reading", "Python", signal.SIGTERM), ("learning a vocabulary", "C", signal.SIGTERM), ("packing", "C", signal.SIGINT),
    ("compiling the first step", "C", signal.SIGTERM),
])  # fmt: skip
def test_before_training_there_is_nothing_to_save_and_that_is_said(text, tmp_path, stage, where, number):
    out = tmp_path / "run"
    command = Command(BEFORE[stage], 1, where, "train", text, "--out", out, "--steps", 3, *TINY, "--json")
    command.read_until("REACHED")
    status, printed, err = command.end(number)
    assert status == 130 and err.endswith(f"{BEFORE_TRAINING}\n")
    assert printed == f'{{"error": "{BEFORE_TRAINING}", "kind": "Interrupted", "exit_status": 130}}\n'
    assert not (out / "checkpoints").exists() or not CheckpointStore(out / "checkpoints").steps()


def test_ctrl_c_while_modules_are_imported_is_no_traceback():
    script = "import sys, os, signal\nclass Stop:\n    def find_spec(self, name, path=None, target=None):\n        if name == 'typer':\n"
    script += "            os.kill(os.getpid(), signal.SIGINT)\nsys.meta_path.insert(0, Stop())\nfrom cllm.cli import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


SETTINGS = (*TINY, "--steps", 30, "--checkpoint-every", 10, "--eval-every", 7, "--sample-every", 11, "--grad-accum", 2)
DURING = (  # function, call of it in this life of the run, signal, the step after which it comes
    ("cllm.train.evaluations:evaluate_part", 1, signal.SIGTERM, 7),
    ("cllm.monitor.diagnostics:report_classes", 1, signal.SIGINT, 7),  # of the evaluation that the first signal interrupted
    ("cllm.train.trainer:sample_text", 1, signal.SIGTERM, 11),
    ("cllm.train.update_data/UpdateData:microbatches", 3, signal.SIGTERM, 13),
    ("cllm.train.evaluations:unigram_loss", 1, signal.SIGINT, 14),
)


def outcome(out: Path):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    rows = [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(out / "metrics.jsonl")]
    files = (sha256_of(newest.path / name) for name in ("model.safetensors", "optimizer.safetensors"))
    return newest.step, *files, [row for row in rows if row["kind"] != "machine"]


def test_stopped_at_every_stage_of_training_a_run_ends_with_the_bits_of_one_that_was_not(text, tmp_path):
    assert cllm("train", text, "--out", tmp_path / "straight", *SETTINGS).status == 0
    out, seen = tmp_path / "run", 0
    for stage, call, number, step in DURING:
        command = Command(stage, call, "Python", "train", text, "--out", out, *SETTINGS)
        command.read_until("REACHED")
        status, _, err = command.end(number)
        assert status == 130, err
        found = re.search(r"stopped by (\w+) after step (\d+) of 30.*; the checkpoint is (\S+)\. Go on from there with: cllm train --resume", err)
        assert found and found[1] == signal.Signals(number).name and Path(found[3]).is_dir(), err
        assert seen <= int(found[2]) == step, f"{stage}: {err}"
        seen = int(found[2])
        assert CheckpointStore(out / "checkpoints").newest_good().step == seen
    assert cllm("train", text, "--out", out, *SETTINGS).status == 0
    assert outcome(out) == outcome(tmp_path / "straight")


def test_the_evaluation_of_what_a_run_leaves_can_be_interrupted_and_is_made_up_for(text, tmp_path):
    settings = (*TINY, "--steps", 6, "--eval-every", 1, "--set", "train.restore_best=true", "--learning-rate", 1, "--warmup", 0)
    command = Command("cllm.train.trainer/Trainer:_evaluate_what_is_left", 1, "C", "train", text, "--out", tmp_path / "run", *settings)
    command.read_until("REACHED")
    status, _, err = command.end(signal.SIGTERM)
    assert status == 130 and "after step 6 of 6, before it was evaluated to its end" in err
    again = cllm("train", text, "--out", tmp_path / "run", *settings, "--json")
    assert again.status == 0 and again.json["resumed_from"] == 6 and again.json["validation"] is not None


def test_a_sample_after_the_run_can_be_interrupted(text, tmp_path):
    command = Command("cllm.train.samples:sample_text", 1, "C", "train", text, "--out", tmp_path / "run", "--steps", 2, *TINY)
    command.read_until("REACHED")
    status, _, err = command.end(signal.SIGINT)
    assert status == 130 and f"the run in {tmp_path / 'run'} is complete" in err


STUCK = "cllm.train.trainer/Trainer:_record"  # after the update, with nothing saved: the place where a signal has to wait


@pytest.mark.parametrize("signals", [(signal.SIGTERM,) * 3, (signal.SIGINT,) * 2, (signal.SIGTERM, signal.SIGINT, signal.SIGINT)],
                         ids=["three SIGTERMs", "two Ctrl-C", "SIGTERM, then Ctrl-C twice"])  # fmt: skip
def test_no_signal_goes_unanswered_though_the_process_is_stuck(text, tmp_path, signals):
    command = Command(STUCK, 2, "C", "train", text, "--out", tmp_path / "run", "--steps", 9, "--checkpoint-every", 1, *TINY)
    command.read_until("REACHED")
    status, _, err = command.end(*signals)
    assert status == 130 and err.endswith(f"{AT_ONCE}\n")
    answers = [line for line in err.splitlines() if line.startswith("SIG")]
    names = [signal.Signals(each).name for each in signals[:-1]]
    assert answers[0].startswith(f"{names[0]}: finishing this step and writing a checkpoint") and len(answers) == len(names)
    assert [each.startswith(f"{name} again: still finishing") for name, each in zip(names[1:], answers[1:])] == [True] * (len(names) - 1)
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest_good().step == 1


def test_a_signal_while_the_disk_is_waited_for_is_answered_and_everything_is_saved(text, tmp_path):
    """The checkpoint of step 1 lasts until standard error has shown the answer; that of step 2 follows it."""
    gate = tmp_path / "gate"
    slow = (
        "import os, time\nfrom cllm.checkpoint.store import CheckpointStore\nfrom cllm.train.checkpoints import Checkpoints\n"
        "save, finish = CheckpointStore.save, Checkpoints.finish\n"
        "def slow(self, step, *args):\n"
        f"    while step == 1 and not os.path.exists({str(gate)!r}): time.sleep(0.005)\n"
        "    return save(self, step, *args)\n"
        "def told(self): os.write(2, b'REACHED\\n'); finish(self)\n"
        "CheckpointStore.save, Checkpoints.finish = slow, told\n"
    )
    command = Command("", 0, "", "train", text, "--out", tmp_path / "run", "--steps", 9, "--checkpoint-every", 1, *TINY, before=slow)
    command.read_until("REACHED")
    command.send_signal(signal.SIGTERM)
    command.read_until("SIGTERM: finishing this step")
    gate.touch()
    status, _, err = command.end()
    assert status == 130 and "the checkpoint is" in err
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest_good().step == 2
