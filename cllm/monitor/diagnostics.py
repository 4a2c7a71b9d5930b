"""What a run looks at beside its loss, each at its own pace (`log.layers_every`, `log.classes`, `log.activations`); it changes no bit of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from cllm.evaluate.classes import classify, report_classes
from cllm.monitor.layers import LayerStats, activation_stats

if TYPE_CHECKING:
    import numpy as np

    from cllm.config.train import TrainConfig
    from cllm.data import Dataset
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model


class Diagnostics:
    """The rows `layers` and `activations` of a run's metrics, and what `eval` says about classes of tokens.

    Without parameters it does nothing, as in all but the first of several processes.
    """

    def __init__(
        self, model: Model, parameters: Mapping[str, torch.nn.Parameter], dataset: Dataset, tokenizer: Tokenizer | None, config: TrainConfig
    ) -> None:
        self.model, self.dataset, self.tokenizer, self.config = model, dataset, tokenizer, config
        self.parameters = parameters
        self._layers: LayerStats | None = None
        self._classes: np.ndarray | None = None

    def before_update(self, step: int, scale: Callable[[], float]) -> None:
        """Before update number `step` (from 0) changes a weight; `scale()`: what the gradients were multiplied by, which a GPU is waited for."""
        every = self.config.log.layers_every
        if every and self.parameters and (step + 1) % every == 0:
            self._layers = LayerStats(self.parameters, scale())
            self._layers.before()

    def after_update(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """The row about layers and samples of their gradients for histograms, where this update was due for one."""
        layers, self._layers = self._layers, None
        return None if layers is None else (layers.after(), layers.by_block())

    def classes(self, beat: Callable[[], None]) -> dict[str, Any]:
        """How well each class of tokens is predicted, over a part of the validation text."""
        if not self.config.log.classes or self.tokenizer is None or not self.parameters:
            return {}
        if self._classes is None:
            self._classes = classify(self.tokenizer, self.dataset.train.token_counts())
        settings, mask = self.config.train, self.config.data.document_mask
        sizes = settings.seq_len, settings.batch_size
        return report_classes(self.model, self.dataset.val, self._classes, *sizes, document_mask=mask, beat=beat).to_dict()

    @torch.no_grad()
    def activations(self) -> dict[str, Any] | None:
        """Mean, spread and largest value of the residual stream after each block, over the first batch of the validation text."""
        if not self.config.log.activations or not self.parameters:
            return None
        settings = self.config.train
        batch = self.dataset.val.windows(settings.seq_len, settings.batch_size).batch(0)
        with activation_stats(self.model) as found:
            self.model.hidden(batch.tokens.to(self.model.embedding_weight.device))
        return {"blocks": found}
