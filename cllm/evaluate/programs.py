"""Evaluations on a CPU as recorded programs: the losses of a batch with no Python between the kernels.

Which batches are replayed, and when a program is believed, says `cllm/model/programs.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cllm.data.tokens.batch import Batch
from cllm.model.programs import Programs, Results

if TYPE_CHECKING:
    from cllm.model.model import Model
    from cllm.runtime.workers.program import Recorder

FORWARD = "forward"


class EvaluationPrograms(Programs):
    """The programs of one model's evaluations, which need no gradient."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, "evaluations", (FORWARD,), differentiated=False)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(the loss of each target, whether it is the token that the model ranks first), there until the next call; without gradients, on the model's
        device."""
        with self.taken() as taken:
            recordable = self._model.is_ours() and not self._model.is_packed and self._model.kv_cache is None
            kind = self.kind_of(batch, ()) if taken and recordable else None
            losses, correct = self.computed(batch, kind, {}, self._run, {FORWARD: 0.0})
        assert losses is not None and correct is not None
        return losses, correct

    def _run(self, batch: Batch, recorder: Recorder | None) -> Results:
        _, stats = self._model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions, return_stats=True)
        return [stats.losses, stats.correct]
