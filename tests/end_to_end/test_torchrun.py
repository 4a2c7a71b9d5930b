"""`torchrun -m cllm train` as a user starts it: it trains, a process that is killed or fails ends all with one message, a restart goes on."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from command import PATIENCE, Started, cllm, wait_until

from cllm.checkpoint.store import CheckpointStore

WORDS = "one two three many more words to learn\nfrom by heart "
SETTINGS = ("--tokenizer", "char", "--embed-dim", 16, "--num-layers", 1, "--num-heads", 2, "--seq-len", 16, "--batch-size", 2, "--grad-accum", 2,
            "--eval-every", 100000, "--checkpoint-every", 5, "--threads", 1, "--precision", "fp32", "--set", "log.tensorboard=false",
            "--set", "train.deterministic=true", "--device", "cpu")  # fmt: skip


PROGRAM = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import torchrun_program; del sys.path[0]; torchrun_program.main()"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(WORDS * 60)
    return path


class Torchrun:
    """The launcher and the processes that it starts, all forked from one that has imported torch; those of the README are a user's."""

    def __init__(self, text, out, *extra, steps, processes=2, launcher=()):
        self.out, self._numbers = out, Path(tempfile.mkdtemp(dir=out.parent))
        launched = ("--nproc-per-node", processes, "--standalone", *launcher, "-m", "cllm")
        trained = ("train", text, "--out", out, "--steps", steps, *SETTINGS, *extra)
        self.process = Started(self._numbers, *launched, *trained, program=PROGRAM, is_command=True)

    def worker(self, rank):
        return psutil.Process(int((self._numbers / str(rank)).read_text()))

    @property
    def step(self):
        return CheckpointStore(self.out / "checkpoints").latest() or 0

    @property
    def log(self):
        return self.process.out + self.process.err

    def wait_for_step(self, step):
        wait_until(lambda: self.step >= step, self.process)

    def end(self):
        try:
            status = self.process.wait()
        except BaseException:
            for each in self._numbers.iterdir():
                with suppress(psutil.NoSuchProcess):
                    self.worker(each.name).kill()
            raise
        self.process.communicate()
        return status, self.log


def errors(log):
    return re.findall(r"^error: .*", log, flags=re.M)


def bits(out):
    newest = CheckpointStore(out / "checkpoints").newest_good()
    digest = hashlib.sha256()
    for tensors in (newest.weights, newest.optimizer):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].numpy().tobytes())
    return newest.step, digest.hexdigest()


def test_killed_processes_are_restarted_and_the_bits_are_those_of_one_undisturbed_process(text, tmp_path):
    steps = 120
    run = Torchrun(text, tmp_path / "run", steps=steps, launcher=("--max-restarts", 2))
    run.wait_for_step(10)
    run.worker(1).kill()
    wait_until(lambda: "resuming after step" in run.log, run.process)
    run.wait_for_step(run.step + 5)  # which the restarted processes have made
    run.worker(0).kill()
    status, log = run.end()
    assert status == 0, log[-3000:]
    assert log.count("resuming after step") == 2
    assert len(errors(log)) == 2 and all("another process of this run ended without a word" in line for line in errors(log))
    alone = cllm("train", text, "--out", tmp_path / "alone", "--steps", steps, *SETTINGS)
    assert alone.status == 0, alone.err
    assert bits(tmp_path / "run") == bits(tmp_path / "alone") and bits(tmp_path / "run")[0] == steps


def test_an_error_in_one_process_ends_all_with_its_one_message(text, tmp_path):
    """The disk of the checkpoints fails for process 1 alone: its part cannot be written."""
    run = Torchrun(text, tmp_path / "run", "--set", "train.parallel=fsdp", steps=100000)
    run.wait_for_step(5)
    try:
        psutil.Process(run.worker(1).pid).rlimit(psutil.RLIMIT_FSIZE, (100, 100))
    except (psutil.Error, PermissionError, AttributeError):
        run.process.terminate()
        pytest.skip("limits of another process cannot be set here")
    status, log = run.end()
    assert status != 0
    assert len(errors(log)) == 1, log[-3000:]
    assert "process 1 of 2: could not write" in errors(log)[0]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest_good().step >= 5


def test_a_stop_signal_to_one_process_stops_all_with_a_checkpoint_and_the_run_goes_on_with_its_own_tokens(text, tmp_path):
    """After the same step in all. Then the run is compared with what a command names, and goes on though its text has gone."""
    mine, other = tmp_path / "mine.txt", tmp_path / "other.txt"
    mine.write_bytes(text.read_bytes())
    other.write_text(WORDS.upper() * 60)
    run = Torchrun(mine, tmp_path / "run", steps=100000)
    run.wait_for_step(5)
    run.worker(1).terminate()
    status, log = run.end()
    assert status != 0
    assert len(errors(log)) == 1 and "stopped by SIGTERM after step" in errors(log)[0]
    step = int(re.search(r"after step ([\d,]+)", errors(log)[0])[1].replace(",", ""))
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest_good().step == step
    mine.unlink()
    before = {each: each.read_bytes() for each in (tmp_path / "run").rglob("*") if each.is_file()}
    status, log = Torchrun(other, tmp_path / "run", steps=100000).end()
    assert status != 0 and len(errors(log)) == 1 and f"learns from {mine}, and this command names {other}" in errors(log)[0]
    assert {each: each.read_bytes() for each in (tmp_path / "run").rglob("*") if each.is_file()} == before
    run = Torchrun(mine, tmp_path / "run", steps=100000)
    run.wait_for_step(run.step + 5)
    run.worker(0).terminate()
    status, log = run.end()
    assert "goes on with the tokens it began with" in log and "resuming after step" in log and "stopped by SIGTERM" in errors(log)[0]


def test_a_wrong_option_is_told_once(text, tmp_path):
    status, log = Torchrun(text, tmp_path / "run", "--set", "train.parallell=fsdp", steps=5).end()
    assert status != 0 and len(errors(log)) == 1 and "Did you mean 'train.parallel'?" in errors(log)[0]


def test_one_process_imports_nothing_of_torch_distributed():
    """What `import torch` brings along itself is there anyway; none of ours is added."""
    code = (
        "import sys, torch; before = set(sys.modules); import cllm.train.trainer;"
        "print([name for name in set(sys.modules) - before if name.startswith(('torch.distributed', 'cllm.distributed.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, env=dict(os.environ))
    loaded = set(re.findall(r"'([^']+)'", done.stdout))
    assert done.returncode == 0, done.stderr
    assert not loaded
