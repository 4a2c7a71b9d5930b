"""The emulator of CUDA graphs keeps to their rules: each breach is found."""

import threading
from operator import methodcaller

import pytest
import torch
from gpu_emulation.graphs import EmulatedGraphs, GraphError

CPU = torch.device("cpu")


def test_a_replay_computes_again_from_what_the_tensors_hold_then():
    x, y = torch.tensor([1.0, 2.0]), torch.zeros(2)

    def body():
        y.add_((x * 2).view(2))

    replay = EmulatedGraphs(CPU).capture(body)
    assert y.tolist() == [6.0, 12.0]  # the three runs before the capture, and nothing of the capture
    x.copy_(torch.tensor([10.0, 20.0]))
    replay()
    replay()
    assert y.tolist() == [46.0, 92.0]


def test_numbers_of_the_host_stay_those_of_the_capture():
    rate, y = 1.0, torch.zeros(1)
    replay = EmulatedGraphs(CPU).capture(lambda: y.add_(rate))
    rate = 5.0
    replay()
    assert y.tolist() == [4.0]


def test_what_a_graph_made_is_garbage_once_any_graph_is_replayed():
    graphs, made = EmulatedGraphs(CPU), []
    x = torch.ones(3)
    first = graphs.capture(lambda: made.append(x + 1))
    second = graphs.capture(lambda: x.mul_(1))
    first()
    assert made[-1].tolist() == [2.0] * 3
    second()
    assert made[-1].isnan().all()


@pytest.mark.parametrize("look", [bool, torch.nonzero, torch.unique, *map(methodcaller, ("item", "tolist", "numpy", "__index__"))])
def test_the_host_looks_at_nothing_during_a_capture(look):
    x = torch.ones(1, dtype=torch.int64)
    with pytest.raises(GraphError, match="reads values"):
        EmulatedGraphs(CPU).capture(lambda: look(x * 2))
    assert x.tolist() == [1]  # afterwards it may


def test_memory_that_was_freed_after_the_capture_is_missed():
    x, taken = torch.ones(2), [torch.ones(2)]
    replay = EmulatedGraphs(CPU).capture(lambda: x.add_(taken[0]))
    replay()
    taken.clear()
    with pytest.raises(GraphError, match="freed"):
        replay()


def test_another_thread_may_read_tensors_of_its_own_meanwhile():
    """As one that writes a checkpoint does."""
    x, other, read = torch.ones(1), torch.ones(1), []

    def body():
        thread = threading.Thread(target=lambda: read.append(other.numpy().tolist() + other.tolist()))
        thread.start()
        thread.join()
        x.add_(1)

    EmulatedGraphs(CPU).capture(body)
    assert read == [[1.0, 1.0]] * 4
