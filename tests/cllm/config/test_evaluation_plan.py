"""How much a run evaluates: within the budget wherever it can be kept, and a function of the settings alone."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.evaluation_plan import CLASSES_COST, EvaluationPlan, least_eval_every, least_rows
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig

SIZES = {
    "steps": st.integers(1, 5000), "batch_size": st.integers(1, 64), "grad_accum": st.integers(1, 8), "seq_len": st.sampled_from([1, 32, 256, 4096]),
    "eval_budget": st.sampled_from([0.001, 0.05, 0.5, 3.0]), "classes": st.booleans(),
}  # fmt: skip


def share(plan: EvaluationPlan, config: TrainConfig) -> float:
    """The work of all evaluations over that of training; a forward pass is a third of forward and backward."""
    trained = config.train.steps * config.train.batch_size * config.train.grad_accum
    during = plan.num_evaluations * (plan.rows + CLASSES_COST * plan.class_rows)
    return (during + (plan.split_rows if plan.whole_at_end else 0)) / 3 / trained


@settings(deadline=None)
@given(st.fixed_dictionaries(SIZES), st.integers(1, 10**6), st.integers(1, 5000))
def test_all_evaluations_together_keep_to_the_budget_or_are_as_small_as_may_be(settings_, split_rows, eval_every):
    config = TrainConfig(**settings_, eval_every=min(eval_every, settings_["steps"]))
    plan = EvaluationPlan.of(config, split_rows)
    assert plan == EvaluationPlan.of(config, split_rows)
    assert min(split_rows, least_rows(config)) <= plan.rows <= split_rows == plan.split_rows
    assert plan.num_evaluations == sum(step % config.train.eval_every == 0 or step == config.train.steps for step in range(1, config.train.steps + 1))
    assert not (plan.whole_at_end and plan.rows == split_rows), "then the last evaluation has read all of it"
    assert plan.class_rows <= max(1, plan.rows // 4) if config.log.classes else plan.class_rows == 0
    if plan.rows > least_rows(config):
        assert share(plan, config) <= config.train.eval_budget * 1.0001 or plan.class_rows == 1


@settings(deadline=None)
@given(st.fixed_dictionaries(SIZES), st.integers(1, 10**6))
def test_the_derived_pace_lets_the_smallest_evaluation_keep_to_the_budget(settings_, split_rows):
    config = TrainConfig(**settings_).resolve(ModelConfig(vocab_size=300, embed_dim=8, num_layers=1, num_heads=1, max_seq_len=4096), 10**6)
    steps, every = config.train.steps, config.train.eval_every
    assert 1 <= every <= max(1000, least_eval_every(config)) and every <= steps
    plan = EvaluationPlan.of(config, split_rows)
    most_rows_of_classes = 1 if config.log.classes else 0  # one row at least is looked at, whatever its cost
    if every < steps and plan.class_rows > most_rows_of_classes:
        assert share(plan, config) <= config.train.eval_budget * (1 + 1 / math.floor(steps / every))  # the last interval may be shorter


def test_long_runs_are_evaluated_ten_times_and_short_ones_less_often():
    def derived(steps):
        config = TrainConfig(steps=steps).resolve(ModelConfig(vocab_size=300, embed_dim=8, num_layers=1, num_heads=1, max_seq_len=256), 10**6)
        return config.train.eval_every, config.train.checkpoint_every, config.sources["train.eval_every"]

    assert derived(2000) == (200, 200, "derived: a tenth of the steps, at most 1000")
    assert derived(50_000)[:2] == (1000, 1000)
    assert derived(60) == (20, 6, "derived: as often as eval_budget allows")
    assert derived(12)[:2] == (12, 1)


def test_the_whole_split_is_read_where_it_fits_each_time_or_once_at_the_end():
    config = TrainConfig(steps=1000, eval_every=100, batch_size=10, classes=False)  # 10,000 rows of training: 1,500 rows of evaluation
    assert EvaluationPlan.of(config, 100) == EvaluationPlan(10, 100, 0, False, 100)
    assert EvaluationPlan.of(config, 500) == EvaluationPlan(10, 100, 0, True, 500)
    assert EvaluationPlan.of(config, 5000) == EvaluationPlan(10, 150, 0, False, 5000)
    assert EvaluationPlan.of(config.replace("", eval_budget=100.0), 5000) == EvaluationPlan(10, 5000, 0, False, 5000)
