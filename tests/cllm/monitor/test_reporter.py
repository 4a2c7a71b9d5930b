"""What a run says of its own speed and of the time that is left."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch

from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.evaluate.loss import Evaluation
from cllm.monitor.records import StepResult
from cllm.monitor.reporter import Reporter
from cllm.runtime import progress

MODEL = ModelConfig(vocab_size=10, embed_dim=16, num_layers=1, num_heads=1, max_seq_len=8)


@pytest.fixture
def clock(monkeypatch):
    """A time that only passes when a test says so; whatever shows itself beats then, as it does by itself otherwise."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = clock.perf_counter = lambda: clock.now

    def pass_by(seconds):
        whole = int(seconds)
        for part in [1.0] * whole + [seconds - whole]:
            clock.now += part
            for each in list(progress._going_on):
                each._beat()

    clock.pass_by = pass_by
    monkeypatch.setattr("cllm.monitor.reporter.time.perf_counter", clock.perf_counter)
    monkeypatch.setattr("cllm.monitor.reporter._peak_flops", lambda *_: 0.0)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "compilation", progress._Compilation())
    monkeypatch.setattr(progress, "Ticker", lambda *_: SimpleNamespace(stop=lambda: None))
    return clock


def run(folder, clock, steps, first=60.0, each=2.0, evaluation=0.0, compiling=0.0, config=None):
    """A run as the training loop reports it, evaluated after every tenth of its steps."""
    config = config or TrainConfig(steps=steps, watchdog_seconds=0, eval_every=max(1, steps // 10))
    found = Evaluation(loss=1.0, perplexity=2.7, bits_per_byte=1.0, accuracy=0.5, num_targets=10, split_targets=10)
    with Reporter(folder, config) as report:
        report.begin(0, steps, config, MODEL, torch.device("cpu"))
        for step in range(steps):
            with report.step(step):
                if not step:
                    progress.compilation.begin("compiling kernels")
                    clock.pass_by(first)
                    progress.compilation.end()
                clock.pass_by(each)
            report.trained(step + 1, step, StepResult(1.0 / (step + 1), 1.0, 1.0, 0, 100, 1e-3, True), {})
            if (step + 1) % config.train.eval_every == 0:
                with report.stage("evaluating", "evaluation"):
                    if step < config.train.eval_every:
                        progress.compilation.begin("compiling kernels")
                        clock.pass_by(compiling)
                        progress.compilation.end()
                    clock.pass_by(evaluation)
                report.evaluated(step + 1, found, None, best=True)
        report.steps_done()
        with report.stage("evaluating", "evaluation"):  # the whole split
            clock.pass_by(evaluation)


def seconds(words):
    """Of a duration such as 1:05 or 2:03:04."""
    return sum(int(part) * 60**place for place, part in enumerate(reversed(words.split(":"))))


def lines_with_time_left(said):
    """(step, seconds) of each line of a log that tells both."""
    found = re.findall(r"^training .*step (\d+)/.*ETA ([\d:]+)$", said, re.MULTILINE)
    return [(int(step), seconds(words)) for step, words in found]


@pytest.mark.parametrize(("evaluation", "compiling"), [(0.0, 0.0), (12.0, 45.0)])
def test_the_time_left_is_right_from_the_first_line_that_tells_it(evaluation, compiling, tmp_path, clock, capfd):
    run(tmp_path, clock, steps=200, first=90.0, each=2.0, evaluation=evaluation, compiling=compiling)
    told = lines_with_time_left(capfd.readouterr().err)
    assert len(told) >= 5
    for step, left in told:
        evaluations = (200 - step) / 20 if step >= 20 else 0.0  # unknown before the first of them
        assert left == pytest.approx(2.0 * (200 - step) + evaluations * evaluation, abs=evaluation + 3), step


def test_the_first_step_has_one_line_at_a_time_and_no_speed(tmp_path, clock, capfd):
    run(tmp_path, clock, steps=40, first=90.0)
    lines = capfd.readouterr().err.splitlines()
    assert lines[:4] == [f"first step: compiling kernels ... {each} s" for each in (5, 15, 35, 75)]
    first = next(line for line in lines if "step 1/40" in line)
    assert "tok/s" not in first and "ETA" not in first
    assert "tok/s" in next(line for line in lines if "step 3/40" in line or "step 4/40" in line or "step 5/40" in line)


@pytest.mark.parametrize("evaluation", [0.0, 70.0])
def test_the_last_step_is_told_once_and_no_line_twice(evaluation, tmp_path, clock, capfd):
    run(tmp_path, clock, steps=40, evaluation=evaluation)
    lines = capfd.readouterr().err.splitlines()
    assert sum("step 40/40" in line for line in lines) == 1 and sum("training 100%" in line for line in lines) == 1
    assert all(line != before for before, line in itertools.pairwise(lines))


def test_a_run_that_becomes_many_times_slower_says_so_once_and_what_helps(tmp_path, clock, capfd):
    config = TrainConfig(steps=400, watchdog_seconds=0)
    with Reporter(tmp_path, config) as report:
        report.begin(0, 400, config, MODEL, torch.device("cpu"))
        for step in range(400):
            with report.step(step):
                clock.now += 0.1 if step < 200 or step % 20 == 0 else 0.8
            report.trained(step + 1, step, StepResult(1.0, 1.0, 1.0, 0, 100, 1e-3, True), {})
            if step == 199:
                assert "slower" not in (tmp_path / "log.txt").read_text()
    said = (tmp_path / "log.txt").read_text()
    assert said.count("times slower than this run has been") == 1 and "Other programs probably use the cores" in said
    assert "times slower" in capfd.readouterr().err


@pytest.mark.parametrize("parts", [{}, {"optimizer": 0.5}])
def test_on_a_gpu_the_time_includes_computing_and_memory_is_that_of_the_gpu(parts, tmp_path, clock, monkeypatch):
    place = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: {place: 3_000_000_000}[device])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: {place: 7_000_000_000}[device])
    monkeypatch.setattr("cllm.runtime.nvml.utilization", lambda index: {1: 0.97}[index])
    with Reporter(tmp_path, TrainConfig(steps=2, watchdog_seconds=0)) as report:
        report.begin(0, 2, TrainConfig(steps=2), MODEL, place)
        for step in range(2):
            with report.reading(step):
                clock.pass_by(1.0)
            with report.step(step):
                clock.pass_by(9.0)
            row = report.trained(step + 1, step, StepResult(1.0, 1.0, 1.0, 0, 100, 1e-3, True), parts)
        assert row.memory_bytes == 3_000_000_000 and row.gpu_share == 0.97
        figures = {"step": 2, "tokens": 200, "seconds": 20.0, "stopped_early": False, "better_than_unigram": None, "validation": None}
        report.finish(SimpleNamespace(**figures))
    said = (tmp_path / "log.txt").read_text()
    assert ("time: training steps 90 %, data 10 %" if not parts else "time: forward and backward 85 %, data 10 %, optimizer 5 %") in said
    assert "peak memory 7.00 GB on the GPU" in said
