"""What a run measures beside its loss, when the settings of [log] ask for it. Measuring changes no bit of training."""

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
    from cllm.monitor.records import LayersRow


class Diagnostics:
    """Layers at every `log.layers_every` updates; at evaluations the classes of tokens (`log.classes`) and the activations (`log.activations`).

    parameters: the weights that are trained, by name. Without any, nothing is measured: of several processes only the first one measures.
    """

    def __init__(
        self, model: Model, parameters: Mapping[str, torch.nn.Parameter], dataset: Dataset, tokenizer: Tokenizer | None, config: TrainConfig
    ) -> None:
        self.model, self.dataset, self.tokenizer, self.config = model, dataset, tokenizer, config
        self.parameters = parameters
        self._layers: LayerStats | None = None
        self._classes: np.ndarray | None = None

    def before_update(self, step: int, scale: Callable[[], float]) -> None:
        """To be called when the gradients of update number `step` (from 0) are complete and no weight has changed.

        `scale()` gives the factor that the gradients carry (the loss scale of fp16). It is only called when it is needed, since on a GPU it
        waits for the device.
        """
        every = self.config.log.layers_every
        if every and self.parameters and (step + 1) % every == 0:
            self._layers = LayerStats(self.parameters, scale())
            self._layers.before()

    def after_update(self, step: int) -> tuple[LayersRow, dict[str, torch.Tensor]] | None:
        """After the update by which `step` updates are done: its row and samples of the gradients by block, where it was one to look at."""
        layers, self._layers = self._layers, None
        return None if layers is None else (layers.after(step), layers.by_block())

    def classes(self, num_rows: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """The fields of `EvaluationRow` about classes of tokens, over about `num_rows` rows of the validation text; none where they are not asked
        for."""
        if not self.config.log.classes or self.tokenizer is None or not self.parameters:
            return {}
        if self._classes is None:
            self._classes = classify(self.tokenizer, self.dataset.train.token_counts())
        settings, mask = self.config.train, self.config.data.document_mask
        sizes, most = (settings.seq_len, settings.batch_size), num_rows * settings.seq_len
        val = self.dataset.val
        return report_classes(self.model, val, self._classes, *sizes, document_mask=mask, max_targets=most, progress=progress).to_dict()

    @torch.no_grad()
    def activations(self) -> dict[str, dict[str, float]] | None:
        """The blocks of an `ActivationsRow`, over the first batch of the validation text; None where they are not asked for."""
        if not self.config.log.activations or not self.parameters:
            return None
        settings = self.config.train
        batch = self.dataset.val.windows(settings.seq_len, settings.batch_size).batch(0)
        with activation_stats(self.model) as found:
            self.model.hidden(batch.tokens.to(self.model.embedding_weight.device))
        return found
