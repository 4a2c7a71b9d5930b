"""A process that leaves reporting to the first one: whatever the real reporter and metrics offer, the silent ones offer too."""

import inspect

import pytest

from cllm.monitor.metrics import Metrics
from cllm.monitor.records import MachineRow, StepTiming
from cllm.monitor.reporter import Reporter
from cllm.monitor.silent import SilentMetrics, SilentReporter

PAIRS = [(Reporter, SilentReporter), (Metrics, SilentMetrics)]


@pytest.mark.parametrize(("real", "silent"), PAIRS)
def test_every_public_method_has_a_silent_form_with_the_same_parameters(real, silent):
    offered = {name: each for name, each in vars(real).items() if name in ("__enter__", "__exit__") or not name.startswith("_")}
    assert len(offered) > 5
    for name, each in offered.items():
        assert name in vars(silent), f"{silent.__name__} inherits {name}, which would do what {real.__name__} does"
        if callable(each):
            own = inspect.signature(vars(silent)[name]).parameters
            assert [(p.name, p.kind, p.default) for p in own.values()] == [
                (p.name, p.kind, p.default) for p in inspect.signature(each).parameters.values()
            ]


@pytest.mark.parametrize(("real", "silent"), PAIRS)
def test_a_misspelt_call_is_an_error(real, silent):
    with pytest.raises(AttributeError):
        silent().wriite  # noqa: B018


def test_what_runs_inside_a_silent_block_runs_and_may_fail(tmp_path):
    ran = []
    with SilentReporter() as report, SilentMetrics() as metrics:
        for block in (report.reading(0), report.step(0), report.stage("evaluating", "evaluation")):
            with block:
                ran.append(report.trained(1, 2, None, {}))
        metrics.write(MachineRow(step=1, event="slow_disk", action="wait", text="", seconds=1.0))
        with pytest.raises(ZeroDivisionError), report.stage("x"):
            1 / 0  # noqa: B018
    assert ran == [StepTiming()] * 3 and report.seconds > 0 and report.tokens_per_second == 0.0
    assert not list(tmp_path.iterdir())
