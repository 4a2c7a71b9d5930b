"""What is recorded, what it costs the result (nothing), and the file that Perfetto opens."""

import json
import threading

import pytest
import torch

from cllm import kernels, runtime
from cllm.kernels import _register
from cllm.runtime import profiler


def test_nothing_stands_between_a_call_and_its_kernel_while_nothing_records():
    arguments = ("softmax", ((2, 3),), torch.float32, "cpu")
    module = _register.backend(*arguments)
    assert module.__name__.startswith("cllm.kernels.")
    with profiler.record():
        assert _register.backend(*arguments) is not module
    assert _register.backend(*arguments) is module
    with profiler.span("anything"):
        assert profiler.recording is None


def test_kernels_are_recorded_by_name_forward_and_backward_with_the_same_bits():
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def both() -> tuple[torch.Tensor, ...]:
        y = kernels.rms_norm(kernels.matmul(x, torch.eye(16)), weight)
        return y.detach(), *torch.autograd.grad(y.sum(), (x, weight))

    with runtime.use(backend="torch"):
        silent = both()
        with profiler.record() as recording:
            observed = both()
    assert all(torch.equal(a, b) for a, b in zip(silent, observed))
    assert [event.name for event in recording.kernels()] == ["matmul", "rms_norm forward", "rms_norm backward", "matmul"]
    first = recording.kernels()[0]
    assert first.operands[:2] == (profiler.Operand((5, 16), 4), profiler.Operand((16, 16), 4)) and first.operands[0].numel == 80
    assert (first.backend, first.flops) == ("torch", None) and first.end_ns >= first.start_ns


def test_a_kernel_that_fails_is_recorded_and_its_error_passed_on():
    with profiler.record() as recording, pytest.raises(IndexError):
        _register.backend("softmax", ((2,),), torch.float32, "cpu").forward(torch.zeros(()))
    assert [event.name for event in recording.events] == ["softmax forward"]


def test_spans_nest_and_threads_are_told_apart(tmp_path):
    def work(name):
        with profiler.span(name):
            pass

    with profiler.record() as recording:
        with profiler.span("outer"):
            work("inner")
        other = threading.Thread(target=work, args=("elsewhere",), name="helper")
        other.start()
        other.join()
    recording.events[0].flops, recording.events[0].bytes = 8.0, 2.0
    trace = json.loads(recording.save(tmp_path / "trace.json", {"commit": "abc"}).read_text())
    ranges = {each["name"]: each for each in trace["traceEvents"] if each["ph"] == "X"}
    inner, outer = ranges["inner"], ranges["outer"]
    assert outer["ts"] == 0 and outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert inner["args"]["FLOP"] == 8.0 and inner["tid"] == outer["tid"] != ranges["elsewhere"]["tid"]
    assert {each["args"]["name"] for each in trace["traceEvents"] if each["ph"] == "M"} >= {"cllm", "helper"}
    assert trace["otherData"] == {"commit": "abc"}


def test_a_second_recording_is_refused_and_the_first_one_ends_in_order():
    with profiler.record(), pytest.raises(runtime.UserError, match="already running"), profiler.record():
        pass
    assert profiler.recording is None
    with profiler.record() as recording:
        pass
    assert recording.to_trace()["traceEvents"][0]["args"] == {"name": "cllm"}


@pytest.mark.parametrize(
    ("operation", "function", "name"),
    [
        ("attention", "backward", "attention backward"),
        ("layer_norm", "layer_norm_forward", "layer_norm forward"),
        ("matmul", "matmul", "matmul"),
        ("rotary", "apply", "rotary"),
        ("adamw", "step", "adamw"),
        ("linear_cross_entropy", "forward_with_grads", "linear_cross_entropy forward with grads"),
    ],
)
def test_names_are_those_of_the_operations(operation, function, name):
    assert profiler.kernel_name(operation, function) == name
