"""Recorded work gives, replayed, what it gives as it is; what cannot be replayed is refused with its reason."""

import gc
import random
import threading
from array import array

import pytest
import torch

pytest.importorskip("numba")

from cllm import kernels, runtime
from cllm.runtime import profiler, workers
from cllm.runtime.workers.arena import LINE, Arena
from cllm.runtime.workers.program import record

MOST = 1 << 24


@pytest.fixture(autouse=True)
def few_threads():
    with runtime.use(threads=2):
        yield


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# ---- the arena ------------------------------------------------------------------------------------------------------


def test_what_is_given_back_is_given_out_again_and_nothing_twice():
    arena, generator, held = Arena(1 << 20), random.Random(0), []
    for turn in range(3000):
        if held and generator.random() < 0.5:
            tensor, number = held.pop(generator.randrange(len(held)))
            assert bool((tensor == number).all())
        else:
            tensor = arena.tensor((generator.randrange(1, 40), 30), (30, 1), torch.float32)
            if tensor is not None:
                assert arena.holds(tensor) and tensor.data_ptr() % LINE == 0
                held.append((tensor.fill_(turn), turn))
        del tensor
    assert len(held) > 10
    held.clear()
    gc.collect()
    assert arena._free == [(0, 1 << 20)]


def test_memory_is_held_by_whoever_holds_the_tensor_in_any_form():
    arena = Arena(1 << 16)
    x = arena.tensor((4, 8), (1, 4), torch.bfloat16)
    twin = arena.twin(x[1:])
    x.fill_(1.0)
    assert x.stride() == (1, 4) and torch.equal(twin, torch.ones(3, 8, dtype=torch.bfloat16)) and twin.data_ptr() == x.data_ptr() + 2
    view = x.view(torch.int16)[2:]
    del x
    assert arena._free != [(0, 1 << 16)]
    del view  # a twin holds nothing
    assert arena._free == [(0, 1 << 16)] and arena.peak == LINE
    assert arena.tensor((1 << 16,), (1,), torch.float32) is None


# ---- the recorder ---------------------------------------------------------------------------------------------------


def test_a_replay_computes_anew_what_its_inputs_hold_now():
    x, w, scale, bias = (weights(*shape, seed=seed) for seed, shape in enumerate(((20, 30), (12, 30), (30,), (12,))))
    parameters = x, w, scale, bias

    def work():
        y = kernels.matmul(kernels.rms_norm(x, scale), w.T, bias)
        z = torch.cat((y, y * 2.0)).sum(dim=0)  # computed by torch, in between
        return (z * torch.arange(12)).sin().clamp(max=0.5).sum() + torch.full((), 2.0)

    def gradients():
        return torch.autograd.grad(work(), parameters)

    with record(MOST) as recorder:
        loss = work()
        recorder.part("backward")
        found = torch.autograd.grad(loss, parameters)
    program = recorder.program()
    assert recorder.reason is None and program is not None and 0 < program.bytes < MOST
    for turn in range(3):
        with torch.no_grad():
            for each in parameters:
                each.mul_(0.9).add_(0.01 * turn)
        gc.collect()
        program.run("forward")
        assert loss.item() == work().item()
        program.run("backward")
        for ours, theirs in zip(found, gradients()):
            assert torch.equal(ours, theirs)
    with runtime.use(threads=3), profiler.record() as recording:
        program.run("forward")
        program.run("backward")
    assert [each.name for each in recording.kernels()] == [
        "rms_norm forward",
        "matmul",
        "matmul",
        "matmul",
        "matmul column sums",
        "rms_norm backward",
    ]
    assert all(each.seconds > 0 and each.operands for each in recording.kernels())


@pytest.mark.parametrize(
    ("reason", "work"),
    [
        ("depends on values or on chance", lambda x: x.sum().item()),
        ("depends on values or on chance", lambda x: x[x > 0]),
        ("depends on values or on chance", lambda x: torch.rand_like(x)),
        ("changes what was there before", lambda x: x.detach().add_(1.0)),
        ("too much memory", lambda x: [x + number for number in range(1000)]),
    ],
)
def test_what_cannot_be_replayed_is_refused_and_computed_all_the_same(reason, work):
    x = torch.ones(100, 100)
    with record(MOST) as recorder:
        work(x)
        again = kernels.softmax(x)
    assert recorder.program() is None and reason in recorder.reason
    assert torch.equal(again, kernels.softmax(x))


@pytest.mark.parametrize("known", [True, False])
def test_an_address_that_nobody_has_made_known_is_refused(known):
    """Its memory would be somebody else's at the next replay."""
    x = torch.zeros(64)
    arguments = array("q", [x.data_ptr()])
    table = workers.table_of([workers.Launch(0, arguments.buffer_info()[0], 0, 0, 1, 1)])
    with record(MOST) as recorder:
        if known:
            workers.recorder().hold(x)
        workers.recorder().launches(table.buffer_info()[0], 1, 1, (arguments,))
    assert (recorder.program() is not None) == known
    assert known or "an address that nobody has made known" in recorder.reason


def test_arguments_that_nobody_hands_over_are_refused():
    arguments = array("q", [1])
    table = workers.table_of([workers.Launch(0, arguments.buffer_info()[0], 0, 0, 1, 1)])
    with record(MOST) as recorder:
        workers.recorder().launches(table.buffer_info()[0], 1, 1, None)
    assert recorder.program() is None and "where its arguments lie" in recorder.reason


def test_constants_may_be_looked_at():
    x, w, targets = weights(3, 8), weights(5, 8), torch.tensor([1, 2, 3])
    with record(MOST) as recorder:
        loss = kernels.linear_cross_entropy(x, w, targets, divisor=3.0)
        loss.backward()  # looks whether it is given 1
    assert recorder.program() is not None, recorder.reason


def test_other_threads_are_not_recorded():
    x = torch.ones(10, 10)
    with record(MOST) as recorder:
        thread = threading.Thread(target=lambda: kernels.softmax(x))
        thread.start()
        thread.join()
    assert recorder._items == [] and recorder.program() is not None
