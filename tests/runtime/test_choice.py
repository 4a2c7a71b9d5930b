"""Measured choices between backends: recorded, read back for neighbouring shapes, and followed by the plan with the figures."""

import pytest

from cllm import runtime
from cllm.runtime import choice, tuning

SHAPES = ((1, 1000, 16, 64), (1, 1000, 4, 64))


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    choice.best.cache_clear()
    yield
    choice.best.cache_clear()


def test_shapes_of_one_class_share_a_measurement():
    assert choice.shape_class(SHAPES) == choice.shape_class(((1, 1024, 16, 64), (1, 513, 3, 33)))
    choice.record("attention", "cpu", "bfloat16", SHAPES, {"ours": 0.004, "theirs": 0.003})
    assert choice.best("attention", "cpu", "bfloat16", ((1, 900, 16, 64), (1, 900, 4, 64)), ("ours", "theirs"))[0] == "theirs"
    assert choice.best("attention", "cpu", "bfloat16", ((1, 2000, 16, 64), (1, 900, 4, 64)), ("ours", "theirs")) is None
    assert choice.best("attention", "cpu", "float32", SHAPES, ("ours", "theirs")) is None


def test_a_loss_within_a_twentieth_changes_nothing():
    choice.record("softmax", "cpu", "float32", ((8, 8),), {"ours": 0.00104, "theirs": 0.001})
    assert choice.best("softmax", "cpu", "float32", ((8, 8),), ("ours", "theirs"))[0] == "ours"
    choice.record("softmax", "cpu", "float32", ((8, 8),), {"ours": 0.00106, "theirs": 0.001})
    chosen, why = choice.best("softmax", "cpu", "float32", ((8, 8),), ("ours", "theirs"))
    assert chosen == "theirs" and "theirs 1 ms, ours 1.06 ms" in why


@pytest.mark.parametrize("damaged", [{"seconds": {"ours": "quick"}, "date": ""}, {"seconds": None}, [1], {"seconds": {"ours": 0.0}, "date": "x"}])
def test_a_damaged_record_is_as_good_as_none(damaged):
    tuning.store(choice._key("softmax", "cpu", "float32", ((8, 8),)), damaged)
    assert choice.best("softmax", "cpu", "float32", ((8, 8),), ("ours",)) is None


def test_the_plan_follows_a_measurement_and_says_the_figures(monkeypatch):
    op = "an_operation_that_was_measured"
    monkeypatch.setattr(choice, "_device", lambda device: "a GPU")
    for priority, name in ((10, "ours"), (0, "theirs")):
        runtime.register_backend(op, name, "cuda", priority, lambda shapes, dtype, device: (True, "serves"))
    assert runtime.plan(op, ((64, 64),), "float32", "cuda").backend == "ours"
    choice.record(op, "cuda", "float32", ((64, 64),), {"ours": 0.002, "theirs": 0.001})
    runtime.register_backend(op, "theirs", "cuda", 0, lambda shapes, dtype, device: (True, "serves"))  # forgets the plans made so far
    plan = runtime.plan(op, ((64, 64),), "float32", "cuda")
    assert plan.backend == "theirs" and "measured here on" in plan.reason and "ours 2 ms" in str(plan)
    with runtime.use(backend="ours"):
        assert runtime.plan(op, ((64, 64),), "float32", "cuda").backend == "ours"


def test_where_torchs_own_attention_was_faster_the_plan_calls_it_and_says_so():
    from cllm.runtime.plan import _plan

    shapes = ((1, 2048, 64, 128), (1, 2048, 8, 128))
    choice.record("attention", "cuda", "bfloat16", shapes, {"triton": 2e-3, "sdpa": 1e-3})
    _plan.cache_clear()
    try:
        plan = runtime.explain("attention", *shapes, dtype="bfloat16", device="cuda")
        assert plan.backend == "sdpa" and "sdpa 1 ms, triton 2 ms" in str(plan)
    finally:
        _plan.cache_clear()
