"""The reduction tree: its sums depend on the parts alone."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.runtime import tree


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(2, 13))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_tree_sum_is_the_sum(values, fanout):
    assert tree.sum(values, fanout) == pytest.approx(np.sum(np.array(values)), rel=1e-9, abs=1e-6)


@given(st.integers(1, 3000))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_levels_shrink_twelvefold_to_one_root(n):
    levels = tree.levels(n)
    assert levels[0] == n and levels[-1] == 1
    assert all(after == -(-before // 12) for before, after in itertools.pairwise(levels))


@given(st.integers(1, 200))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_complete_subtrees_summed_apart_give_the_same_bits(n):
    """Whoever holds twelve neighbours may add them alone: this is what lets workers share a sum."""
    parts = list(np.random.default_rng(n).standard_normal(n).astype(np.float32))
    apart = [tree.sum(parts[start : start + 12]) for start in range(0, n, 12)]
    assert tree.sum(apart) == tree.sum(parts)


@given(st.integers(1, 500), st.integers(1, 40), st.randoms())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_any_workers_in_any_order_give_the_bits_of_the_tree(n, workers, order):
    """Each level's nodes are dealt to workers, who finish in any order: only the grouping decides the bits."""
    parts = list(np.random.default_rng(n).standard_normal(n).astype(np.float32))
    nodes = parts
    while len(nodes) > 1:
        above = [np.float32(0)] * -(-len(nodes) // tree.FANOUT)
        dealt = [range(worker, len(above), workers) for worker in range(workers)]
        order.shuffle(dealt)
        for node in itertools.chain.from_iterable(dealt):
            total = nodes[node * tree.FANOUT]
            for child in nodes[node * tree.FANOUT + 1 : (node + 1) * tree.FANOUT]:
                total = total + child
            above[node] = total
        nodes = above
    assert nodes[0].tobytes() == tree.sum(parts).tobytes()


def test_the_tree_is_described_from_its_root():
    assert tree.describe(1) == "1" and tree.describe(1741) == "1 <- 2 <- 13 <- 146 <- 1,741"


def test_tensors_are_summed_and_left_alone():
    parts = [torch.full((3,), float(i)) for i in range(30)]
    assert torch.equal(tree.sum(parts), torch.full((3,), 435.0))
    assert torch.equal(parts[0], torch.zeros(3))


def test_nothing_has_no_sum():
    with pytest.raises(ValueError, match="at least one"):
        tree.sum([])


@given(st.integers(1, 70), st.integers(1, 9), st.randoms())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_runs_of_leaves_summed_apart_give_the_bits_of_the_binary_tree(n, workers, order):
    """Also where n is no power of two and runs are cut anywhere: what each worker keeps are complete subtrees."""
    parts = list(np.random.default_rng(n).standard_normal(n).astype(np.float32))
    cuts = [0, *sorted(order.randrange(n + 1) for _ in range(workers - 1)), n]
    whole = tree.Binary()
    for first, last in itertools.pairwise(cuts):
        mine = tree.Binary()
        for leaf in range(first, last):
            mine.push(leaf, parts[leaf])
        assert [node[:2] for node in mine.nodes] == tree.subtrees(first, last)
        assert len(mine.nodes) <= 2 * max(1, n.bit_length())
        for level, index, value in mine.nodes:
            whole.push(index, value, level)
    assert whole.total().tobytes() == tree.sum(parts, fanout=2).tobytes()


def test_an_order_of_leaves_that_is_not_the_trees_gives_other_bits():
    """The test above can fail: a plain running sum has another rounding."""
    found = 0
    for seed in range(20):
        parts = list(np.random.default_rng(seed).standard_normal(50).astype(np.float32))
        running = parts[0]
        for part in parts[1:]:
            running = running + part
        found += running.tobytes() != tree.sum(parts, fanout=2).tobytes()
    assert found > 10
