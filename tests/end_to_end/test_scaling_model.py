"""The model of shared launches, where it can be worked out by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "profiling"))

from scaling_model import Costs, Launch, in_a_step, launch_seconds, losses, saturating, step_seconds


def launch(tasks, even=True, workers=1 << 30, share=0.0, name="k"):
    return Launch(name, tuple(tasks), even, workers, share)


@pytest.mark.parametrize("even", [True, False])
def test_equal_tasks_take_as_many_rounds_as_there_are_tasks_for_each_worker(even):
    for workers in (1, 2, 3, 7, 8, 64, 1741):
        assert launch_seconds(launch([2.0] * 24, even), workers) == pytest.approx(2.0 * -(-24 // min(workers, 24)))


def test_a_long_task_holds_up_no_other():
    assert launch_seconds(launch([8.0, 1, 1, 1, 1, 1, 1, 1]), 2) == 8.0  # the other worker takes all seven
    assert launch_seconds(launch([4.0, 3, 3, 2], even=False), 2) == 6.0  # 4 + 2 and 3 + 3
    assert launch_seconds(launch([1.0, 1, 8], even=False), 2) == 9.0  # the longest was claimed last


def test_no_more_workers_than_the_launch_allows():
    assert launch_seconds(launch([1.0] * 8, workers=2), 64) == 4.0
    assert launch_seconds(launch([1.0] * 8, workers=1), 64, Costs(launch=5, join=5, claim=5)) == 8.0  # alone it costs nothing


def test_workers_join_in_a_tree_and_each_claim_and_launch_has_its_cost():
    costs = Costs(launch=0.5, join=1.0, claim=0.25)
    assert launch_seconds(launch([10.0] * 2), 2, costs) == 0.5 + 1.0 + 0.25 + 10.0
    assert launch_seconds(launch([10.0] * 7), 7, costs) == 0.5 + 2.0 + 0.25 + 10.0  # 1, then 2, then 4 more
    assert launch_seconds(launch([1.0] * 2), 2, Costs(join=5.0)) == 2.0  # who comes late finds nothing left


def test_what_memory_stretches_is_the_share_that_waits_for_it():
    assert saturating(2.0)(64) == 1.0 and saturating(1.0)(64) == 64.0 and saturating(1.6)(2) == pytest.approx(1.25)
    bound = launch([1.0] * 64, share=1.0)
    assert launch_seconds(bound, 64, curve=saturating(1.0)) == 64.0  # one worker has all of the bandwidth already
    assert launch_seconds(launch([1.0] * 64, share=0.5), 2, curve=saturating(1.6)) == pytest.approx(32 * 1.125)


def test_a_step_follows_amdahl_and_names_what_it_loses():
    launches = [launch([1.0] * 90, name="wide"), launch([10.0], name="one task")]
    assert step_seconds(launches, 5.0, 1) == 105.0
    assert step_seconds(launches, 5.0, 90) == 1.0 + 10.0 + 5.0
    (first, lost, count), (second, outside, _), *_ = losses(launches, 5.0, 90)
    assert (first, count) == ("one task", 1) and lost == pytest.approx(10 - 10 / 90)
    assert second == "outside of launches" and outside == pytest.approx(5 - 5 / 90)


def test_tasks_are_as_long_as_inside_of_a_step_so_that_only_what_is_outside_of_launches_is_not_shared():
    by_themselves = [launch([1.0] * 8), launch([2.0] * 4)]
    found = in_a_step(by_themselves, 20.0)  # a step of 23 seconds on one worker, 3 of them outside of launches
    assert [each.tasks for each in found] == [(1.25,) * 8, (2.5,) * 4]
    assert step_seconds(found, 3.0, 1) == 23.0 and step_seconds(found, 3.0, 2) == 13.0
