"""The evaluations of a run: when they come, which part of the validation split they predict, and what they find."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from cllm.config.evaluation_plan import EvaluationPlan, class_rows_of, least_rows
from cllm.evaluate.loss import Evaluation, evaluate_part, unigram_loss
from cllm.evaluate.programs import EvaluationPrograms
from cllm.monitor.records import ActivationsRow, EvaluationRow, FinalRow

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.data import Dataset, TokenSplit
    from cllm.data.tokens.batch import EvaluationBatches
    from cllm.model.model import Model
    from cllm.monitor.diagnostics import Diagnostics
    from cllm.monitor.reporter import Reporter


@dataclass(frozen=True)
class Measured:
    """What an evaluation found, and the loss of token frequencies alone on the same tokens.

    classes: how well each class of tokens is predicted; activations: of each block. Empty and None where they were not asked for.
    """

    evaluation: Evaluation
    unigram_loss: float
    classes: dict[str, Any] = field(default_factory=dict)
    activations: dict[str, dict[str, float]] | None = None


class Evaluations:
    """Measures the weights that lie in `model` on the validation split of `dataset`, as `plan` says.

    Every evaluation during a run predicts the same rows, which depend on the plan and the split alone; so their losses can be compared, and a
    resumed run finds the same numbers. Best checkpoint, early stopping and the plateau schedule go by them.
    """

    def __init__(self, model: Model, dataset: Dataset, config: TrainConfig, diagnostics: Diagnostics) -> None:
        self._model, self._dataset, self._config, self._diagnostics = model, dataset, config, diagnostics
        settings = config.train
        self._whole = dataset.val.windows(settings.seq_len, settings.batch_size, document_mask=config.data.document_mask)
        self.possible = self._whole.num_targets > 0  # without validation text nothing is evaluated
        self.plan = EvaluationPlan.of(config, self._whole.num_rows)
        self.steps = settings.steps  # of the run, which a clock may move
        self._unigram: dict[int, float] = {}
        self._recorded: dict[str, dict[str, Any]] = {}
        self._programs = EvaluationPrograms(model)

    def keep_to(self, rows: int | None) -> None:
        """Takes over the number of rows that the run began with; None: of a run from before there was a plan, which read the whole split."""
        rows = min(self.plan.split_rows, rows or self.plan.split_rows)
        self.plan = replace(
            self.plan, rows=rows, class_rows=class_rows_of(self._config, rows), whole_at_end=self.plan.whole_at_end and rows < self.plan.split_rows
        )

    def recall(self, rows: Iterable[dict[str, Any]]) -> None:
        """Takes over what an earlier start of the run has recorded of the very weights that it goes on with: rows of metrics of this one step."""
        self._recorded = {row["kind"]: row for row in rows}

    def forget(self) -> None:
        """The weights are to change."""
        self._recorded = {}

    def due(self, step: int) -> bool:
        """Whether an evaluation follows the update after which `step` updates are done."""
        settings = self._config.train
        assert settings.eval_every is not None
        return self.possible and step > 0 and (step % settings.eval_every == 0 or step == self.steps)

    def measure(self, report: Reporter, check: Callable[[], None]) -> Measured:
        """One evaluation of the plan's part, with everything that goes with it. `check` is called after each batch and may raise."""
        recorded = self._recalled(EvaluationRow)
        if recorded is not None:
            return recorded
        found = self._predict(report, check, whole=False)
        with report.stage("evaluating classes of tokens", "evaluation") as moved:
            classes = self._diagnostics.classes(self.plan.class_rows, moved)
            activations = self._diagnostics.activations()
        return replace(found, classes=classes, activations=activations)

    def loss(self, report: Reporter, check: Callable[[], None], whole: bool) -> Measured:
        """The loss alone of the weights that a run leaves, on the plan's part or on the whole split."""
        recorded = self._recalled(FinalRow, whole)
        return self._predict(report, check, whole) if recorded is None else recorded

    def _predict(self, report: Reporter, check: Callable[[], None], whole: bool) -> Measured:
        rows = self._rows(whole)
        with report.stage("evaluating", "evaluation") as moved:

            def progress(done: int, total: int) -> None:
                moved(done, total)
                check()

            found = evaluate_part(self._model, rows, self._whole, progress, self._programs)
            return Measured(found, self._unigram_loss(rows))

    def _recalled(self, row: type[EvaluationRow | FinalRow], whole: bool = False) -> Measured | None:
        """What such a row says of these weights; None where there is none, or where it says less than is asked for now."""
        try:
            found = row.from_dict(self._recorded[row.kind])
        except (KeyError, ValueError):
            return None
        if found.num_targets != self._rows(whole).num_targets or found.split_targets is None or found.unigram_loss is None:
            return None
        values = found.values()
        evaluation = Evaluation(**{each.name: values.pop(each.name) for each in fields(Evaluation)})
        classes = {name: value for name, value in values.items() if name not in ("step", "best", "unigram_loss")}
        blocks = self._recorded.get(ActivationsRow.kind, {}).get("blocks")
        log, named = self._config.log, self._diagnostics.tokenizer is not None
        if isinstance(found, EvaluationRow) and (bool(classes), blocks is not None) != (log.classes and named, log.activations):
            return None
        return Measured(evaluation, found.unigram_loss, classes, blocks)

    def _rows(self, whole: bool) -> EvaluationBatches:
        return self._whole if whole or self.plan.rows >= self.plan.split_rows else self._whole.part(self.plan.rows)

    def _unigram_loss(self, rows: EvaluationBatches) -> float:
        if rows.num_rows not in self._unigram:
            train, val = self._dataset.train, self._dataset.val
            self._unigram[rows.num_rows] = val.unigram_nats(train) if rows is self._whole else unigram_loss(rows, train)
        return self._unigram[rows.num_rows]


def predict_seconds(model: Model, split: TokenSplit, config: TrainConfig) -> tuple[EvaluationPlan, float]:
    """The evaluations of a run with this configuration, and how long they will take in all by the measured speed of a few batches."""
    settings = config.train
    whole = split.windows(settings.seq_len, settings.batch_size, document_mask=config.data.document_mask)
    plan, few = EvaluationPlan.of(config, whole.num_rows), whole.part(least_rows(config))
    if not few.num_targets:
        return plan, 0.0
    seconds = []
    for _ in range(2):  # the first one compiles
        began = time.perf_counter()
        evaluate_part(model, few, whole)
        seconds.append(time.perf_counter() - began)
    return plan, min(seconds) / few.num_rows * plan.forward_rows
