"""What the GPU suite does when something goes wrong, and that it measures what it says. The GPU itself is played."""

import gc
import importlib
import json
import sys
import types
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from cllm.runtime import choice
from cllm.runtime.errors import UserError

PROFILING = Path(__file__).parents[2] / "profiling"


@pytest.fixture(scope="module")
def suite():
    sys.path.insert(0, str(PROFILING))
    try:
        yield importlib.import_module("gpu_suite")
    finally:
        sys.path.remove(str(PROFILING))


@pytest.fixture
def tiny(suite):
    return suite.Machine(tiny=True)


def _steps(suite, monkeypatch, **failing):
    """All steps replaced: each says that it ran, or raises."""
    ran = []

    def step(name):
        def run(machine, state, *more):
            ran.append(name)
            if name in failing:
                raise failing[name]
            return {"ran": name}

        return run

    for table in ("CORRECTNESS", "MEASUREMENTS", "STEPS"):
        monkeypatch.setattr(suite, table, {name: step(name) for name in getattr(suite, table)})
    return ran


def test_cheap_proofs_come_first_and_whole_steps_last(suite):
    assert list(suite.STEPS) == [
        "versions", "captured", "optimizer", "accuracy", "hopper", "instrumented", "determinism", "training", "gpu", "ceilings", "operations",
        "steps",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["versions", "accuracy", "gpu"])
@pytest.mark.parametrize("kind", ["wrong", "crash"])
def test_nothing_runs_behind_a_wrong_result_and_the_next_start_goes_on_there(suite, tiny, monkeypatch, capsys, name, kind):
    error = suite.Wrong("bits differ", {"bitwise": False}) if kind == "wrong" else RuntimeError("bits differ")
    kept = []
    ran = _steps(suite, monkeypatch, **{name: error})
    state = {"about": {}}
    suite.run_all(tiny, state, lambda state: kept.append(json.loads(json.dumps(state))))
    assert ran == list(suite.STEPS)[: list(suite.STEPS).index(name) + 1]
    assert "bits differ" in state[name]["failed"] and kept[-1] == state and len(kept) == len(ran)
    assert state[name].get("bitwise", False) is False and "Nothing behind a wrong result is run" in capsys.readouterr().err
    ran = _steps(suite, monkeypatch)
    suite.run_all(tiny, state, kept.append)
    assert ran == list(suite.STEPS)[list(suite.STEPS).index(name) :] and not [each for each in state.values() if "failed" in each]
    ran.clear()
    suite.run_all(tiny, state, kept.append)
    assert not ran
    suite.run_all(tiny, state, kept.append, only="determinism")
    assert ran == ["determinism"]


def test_a_measurement_that_fails_costs_only_itself(suite, tiny, monkeypatch):
    ran = _steps(suite, monkeypatch, ceilings=RuntimeError("out of memory"))
    state = {}
    suite.run_all(tiny, state, lambda state: None)
    assert ran == list(suite.STEPS) and state["ceilings"] == {"failed": "RuntimeError: out of memory"}


def test_tests_that_fail_hang_or_are_not_there_are_a_wrong_result(suite, tiny, tmp_path):
    (tmp_path / "test_here.py").write_text(
        "import time, pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_slow(): time.sleep(1000)\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    here = str(tmp_path / "test_here.py")
    assert suite._pytest(tiny, here, "-k", "good", seconds=600) == {"status": 0, "tests": 1, "skipped": 0}
    with pytest.raises(suite.Wrong, match="status 1") as failed:
        suite._pytest(tiny, here, "-k", "good or bad", seconds=600)
    assert failed.value.found["tests"] == 2 and any("assert 1 == 2" in line for line in failed.value.found["tail"])
    with pytest.raises(suite.Wrong, match="no test ran"):
        suite._pytest(tiny, here, "-k", "skipped", seconds=600)
    with pytest.raises(suite.Wrong, match="took longer than 3 s"):
        suite._pytest(tiny, here, "-k", "slow", seconds=3)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_a_loss_that_is_not_finite_is_not_timed(suite, tiny, loss):
    with pytest.raises(suite.Wrong, match=r"the loss of a step is (nan|inf)"):
        suite.time_step(tiny, lambda: lambda: loss)


def test_a_step_that_refers_to_itself_is_freed_before_the_next_is_timed(suite, tiny):
    alive = []

    class Step:
        def __init__(self):
            self.again = self  # as a graph refers to the function that it captured
            alive.append(weakref.ref(self))

        def __call__(self):
            return 1.0

    gc.disable()
    try:
        assert suite.time_step(tiny, Step)["seconds"] >= 0
        assert alive[0]() is None
    finally:
        gc.enable()


class _CUDA:
    """What of torch.cuda a capture uses; remembers what happened in which order."""

    def __init__(self, monkeypatch):
        self.happened = happened = []

        def stream(name):
            return types.SimpleNamespace(wait_stream=lambda other: happened.append(f"{name} waits for {other.name}"), name=name)

        main = stream("main")
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())


@pytest.mark.parametrize("error", [RuntimeError("capture"), UserError("adamw_ cannot be captured"), AssertionError(), KeyError("x")])
@pytest.mark.parametrize("at", [0, 3])
def test_a_call_that_cannot_be_captured_is_timed_without_a_graph(suite, monkeypatch, error, at):
    calls = iter(range(10))

    def call():
        if next(calls) >= at:
            raise error

    _CUDA(monkeypatch)
    assert importlib.import_module("gpu_benches")._graph(call) is None


def test_a_capture_waits_for_what_the_call_reads(suite, monkeypatch):
    cuda, calls = _CUDA(monkeypatch), []
    assert importlib.import_module("gpu_benches")._graph(lambda: calls.append(list(cuda.happened))) == "a graph"
    assert len(calls) == 4 and calls[0] == ["side waits for main"] and calls[3] == ["side waits for main", "main waits for side", "synchronize"]


def test_a_backend_is_recorded_by_the_time_of_the_contestant_that_was_forced_to_it(suite, tiny, monkeypatch):
    benches = list(suite.attention_benches(tiny))
    recorded = []
    monkeypatch.setattr(choice, "record", lambda *what: recorded.append(what))
    for bench in benches:
        bench.record({"cllm triton": 2.0, "cllm gluon": 1.0, "sdpa": 3.0, "sdpa cudnn": 0.5}, torch.bfloat16)
    shapes = ((1, 40, 2, 16), (1, 40, 1, 16))
    assert recorded == [
        ("attention", "cuda", "bfloat16", shapes, {"triton": 2.0, "gluon": 1.0, "sdpa": 3.0}),
        ("attention", "cuda", "bfloat16", shapes, {"triton": 2.0}),  # packed documents, which torch's kernels cannot
    ]
    assert [bench.name.split()[1] for bench in benches if bench.choose] == ["forward+backward"] * 2
    from cllm import runtime

    with runtime.use(backend="torch"), runtime.profiler.record() as recording:  # whatever else is in force
        for bench in benches:
            bench.calls["cllm triton"]()
    assert len(benches) == 3 and {kernel.backend for kernel in recording.kernels()} == {"triton"}


def test_the_plain_gpt_makes_nothing_on_the_wrong_device(suite):
    peers = importlib.import_module("peers")
    model, tokens = peers.PlainGPT(suite.Shape("tiny", 1, 2, 32, 97, 16, 2)), torch.zeros(2, 16, dtype=torch.int64)
    with torch.device("meta"):
        assert torch.isfinite(model(tokens, tokens))
