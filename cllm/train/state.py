"""How far a run has come, beside its tensors: what `state.json` of a checkpoint carries from one life of a run to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cllm.config.schedule import Plateau
from cllm.monitor.guards import BestLoss
from cllm.runtime.errors import CheckpointError
from cllm.train.faults import Faults

if TYPE_CHECKING:
    from cllm.checkpoint.folder import Checkpoint
    from cllm.config.train import TrainConfig


@dataclass
class RunState:
    """`step`: updates done. `tokens`: targets learnt from. `last_evaluation`: the step whose evaluation `best` and `plateau` have taken in.

    `evaluation_rows`: the rows of the validation split that each evaluation predicts, fixed when the run starts. None: all of them.
    """

    faults: Faults
    plateau: Plateau | None = None
    best: BestLoss = field(default_factory=BestLoss)
    step: int = 0
    tokens: int = 0
    last_evaluation: int = 0
    evaluation_rows: int | None = None

    @classmethod
    def first(cls, config: TrainConfig) -> RunState:
        """The state of a run before its first update."""
        settings, optim = config.train, config.optim
        plateau = Plateau(optim.plateau_factor, optim.plateau_patience) if optim.schedule == "plateau" else None
        return cls(Faults(settings.on_nonfinite, settings.on_spike, settings.on_gradient, settings.spike_sigmas), plateau)

    def take_evaluation(self, loss: float) -> bool:
        """Takes in the validation loss at this step; True when it is the lowest so far. A resumed run may evaluate the same step again, which
        counts once."""
        if self.last_evaluation == self.step:
            return self.best.step == self.step
        self.last_evaluation = self.step
        if self.plateau is not None:
            self.plateau.update(loss)
        return self.best.update(self.step, loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for state.json, which adds the step itself."""
        return {
            "tokens": self.tokens,
            "best": self.best.to_dict(),
            "faults": self.faults.to_dict(),
            "last_evaluation": self.last_evaluation,
            "evaluation_rows": self.evaluation_rows,
            "plateau": None if self.plateau is None else self.plateau.to_dict(),
        }

    def load(self, found: Checkpoint) -> None:
        """Takes over what a checkpoint holds; CheckpointError where that is not the state of a run."""
        values = found.state
        try:
            self.tokens, self.last_evaluation = int(values["tokens"]), int(values["last_evaluation"])
            self.evaluation_rows = None if values.get("evaluation_rows") is None else int(values["evaluation_rows"])
            self.best = BestLoss.from_dict(values["best"])
            self.faults.load(values.get("faults") or values)
            if self.plateau is not None:
                self.plateau.restore(values["plateau"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the state of {found.path} is not that of a run ({type(error).__name__}: {error}).") from error
        self.step = found.step
