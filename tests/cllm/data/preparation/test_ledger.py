"""The ledger: what is done is not done again, and nothing that has changed counts as done."""

import pytest
from here import Here

from cllm.data.preparation.ledger import Ledger, Task, tree
from cllm.runtime.errors import DataError


def stage(ledger, runner, tasks, version=1, **more):
    return ledger.stage("stage", "Testing", "tasks:writes", version, tasks, runner, **more)


def some(*contents):
    return [Task(number, {"number": number, "content": content}, content) for number, content in enumerate(contents)]


def test_only_what_depends_on_a_change_is_done_again(tmp_path):
    ledger, runner = Ledger(tmp_path), Here()
    first = stage(ledger, runner, some("a", "b", "c"))
    assert [each.result["number"] for each in first] == [0, 1, 2]
    assert len(runner.ran) == 3
    assert all(each.was_known for each in stage(ledger, runner, some("a", "b", "c")))
    again = stage(ledger, runner, some("a", "changed", "c"))
    assert len(runner.ran) == 4
    assert (tmp_path / ".ledger/stage/calls").read_text() == "0\n1\n2\n1\n"
    assert [each.digest == other.digest for each, other in zip(first, again)] == [True, False, True]


@pytest.mark.parametrize("damage", ["removed", "cut", "marker", "not intact", "version"])
def test_a_task_whose_files_are_not_as_it_left_them_is_done_again(tmp_path, damage):
    ledger, runner = Ledger(tmp_path), Here()
    (done,) = stage(ledger, runner, some("content"))
    place, marker = tmp_path / ".ledger/stage/000000.txt", tmp_path / ".ledger/stage/000000.json"
    assert done.path(".txt") == str(place)
    if damage == "removed":
        place.unlink()
    elif damage == "cut":
        place.write_text("con")
    elif damage == "marker":
        marker.write_text(marker.read_text()[:-10])
    stage(ledger, runner, some("content"), version=2 if damage == "version" else 1, intact=lambda task, done: damage != "not intact")
    assert len(runner.ran) == 2
    assert place.read_text() == "content"


def test_one_folder_is_prepared_by_one_process_at_a_time(tmp_path):
    with Ledger(tmp_path).held(), pytest.raises(DataError, match="another process prepares"), Ledger(tmp_path).held():
        pass
    with Ledger(tmp_path).held():
        pass


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 65])
def test_a_tree_merges_everything_once(count):
    def merge(level, groups):
        return [[each for part in group for each in part] for _, group in groups]

    merged = tree(merge, [[number] for number in range(count)])
    assert merged == (list(range(count)) if count else None)
