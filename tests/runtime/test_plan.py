"""The plan: who serves, with how many workers, and how it answers for it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import runtime
from cllm.runtime import device

OP = "an_operation_of_this_test"


@pytest.fixture(autouse=True)
def _two_backends(monkeypatch):
    for name in ("CLLM_BACKEND", "CLLM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    runtime.register_backend(OP, "quick", "cpu", 10, lambda shapes, dtype, device: (dtype == "float32", f"{dtype} it is"))
    runtime.register_backend(OP, "plain", "cpu", 0, lambda shapes, dtype, device: (True, "serves all"))


def test_the_highest_priority_that_can_serve_is_taken():
    assert runtime.plan(OP, ((4, 4),), "float32").backend == "quick"
    plan = runtime.plan(OP, ((4, 4),), "float64")
    assert plan.backend == "plain" and ("quick", "float64 it is") in plan.rejected


def test_a_backend_asked_for_by_name_serves_or_is_an_error():
    with runtime.use(backend="plain"):
        assert runtime.plan(OP, ((4, 4),), "float32").backend == "plain"
    with runtime.use(backend="quick"), pytest.raises(runtime.BackendError, match=r"'quick' cannot serve .* float64 it is"):
        runtime.plan(OP, ((4, 4),), "float64")
    with pytest.raises(runtime.UserError, match="unknown backend 'quik'"), runtime.use(backend="quik"):
        pass
    with pytest.raises(runtime.BackendError, match=f"did you mean {OP}"):
        runtime.plan("the_operation_of_this_test", ((1,),), "float32")
    with pytest.raises(runtime.BackendError, match="no backend can serve"):
        runtime.plan("nothing", ((1,),), "float32")


@given(st.integers(1, 4096), st.floats(0, 1e15))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_workers_stay_within_what_was_asked_and_grow_with_the_work(threads, work):
    with runtime.use(threads=threads):
        workers = runtime.plan(OP, ((4, 4),), "float32", work=work).workers
        assert 1 <= workers <= threads
        assert workers <= runtime.plan(OP, ((4, 4),), "float32", work=work * 2).workers


def test_a_tiny_operation_gets_one_worker_and_a_large_one_all():
    assert runtime.plan(OP, ((4, 4),), "float32", work=100).workers == 1
    assert runtime.plan(OP, ((4, 4),), "float32", work=1e12).workers == device.usable_cores()
    with runtime.use(threads=1741):
        assert runtime.plan(OP, ((4, 4),), "float32", work=1e12).workers == 1741


def test_scopes_nest_and_are_restored_after_an_error():
    before = runtime.settings()
    with pytest.raises(RuntimeError), runtime.use(threads=3):
        with runtime.use(backend="plain"):
            assert (runtime.settings().threads, runtime.settings().backend) == (3, "plain")
        assert runtime.settings().backend is None
        raise RuntimeError
    assert runtime.settings() == before


def test_the_environment_sets_what_no_scope_sets(monkeypatch):
    monkeypatch.setenv("CLLM_THREADS", "7")
    assert runtime.settings().threads == 7
    with runtime.use(threads=2):
        assert runtime.settings().threads == 2
    monkeypatch.setenv("CLLM_THREADS", "many")
    with pytest.raises(runtime.UserError, match="CLLM_THREADS must be a whole number"):
        runtime.settings()


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, 10**9])
def test_a_wrong_thread_count_is_refused_with_what_was_expected(threads):
    with pytest.raises(runtime.UserError, match="whole number from 1 to"), runtime.use(threads=threads):
        pass


def test_explain_says_who_runs_and_why_not_the_others():
    text = str(runtime.explain(OP, (64, 64), dtype="float64"))
    assert "plain" in text and "not quick: float64 it is" in text
