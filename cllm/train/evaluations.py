"""The evaluations of a run: when they come, what they measure, and which weights they leave to be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cllm.evaluate.loss import Evaluation, evaluate

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.data import Dataset
    from cllm.model.model import Model
    from cllm.monitor.diagnostics import Diagnostics


@dataclass(frozen=True)
class Measured:
    """What one evaluation found: the loss, how well classes of tokens are predicted, and the activations of each block where asked for."""

    evaluation: Evaluation
    classes: dict[str, Any]
    activations: dict[str, dict[str, float]] | None


class Evaluations:
    """Measures the weights that lie in `model` on the validation split of `dataset`."""

    def __init__(self, model: Model, dataset: Dataset, config: TrainConfig, diagnostics: Diagnostics) -> None:
        self._model, self._config, self._diagnostics = model, config, diagnostics
        self._split = dataset.val
        self.possible = dataset.val.has_targets(config.train.seq_len)  # without validation text nothing is evaluated
        self.unigram_loss = dataset.val.unigram_nats(dataset.train) if self.possible else None

    def due(self, step: int) -> bool:
        """Whether an evaluation follows the update after which `step` updates are done."""
        settings = self._config.train
        assert settings.eval_every is not None
        return self.possible and step > 0 and (step % settings.eval_every == 0 or step == settings.steps)

    def measure(self, beat: Callable[..., None]) -> Measured:
        """One evaluation with everything that goes with it. `beat` is called after each batch."""
        return Measured(self.loss(beat), self._diagnostics.classes(beat), self._diagnostics.activations())

    def loss(self, beat: Callable[..., None]) -> Evaluation:
        """The loss over the whole split."""
        settings, mask = self._config.train, self._config.data.document_mask
        return evaluate(self._model, self._split, settings.seq_len, settings.batch_size, document_mask=mask, progress=beat)
