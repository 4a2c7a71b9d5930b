"""Training: the loop, one step of it in its forms, the optimizers, and what happens when something goes wrong."""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["Microbatch", "StepResult", "TrainResult", "TrainStep", "Trainer"]

if TYPE_CHECKING:
    from cllm.train.step import Microbatch, StepResult, TrainStep
    from cllm.train.trainer import Trainer, TrainResult

__getattr__, __dir__ = exports(
    __name__,
    {
        "Trainer": "cllm.train.trainer",
        "TrainResult": "cllm.train.trainer",
        "TrainStep": "cllm.train.step",
        "StepResult": "cllm.train.step",
        "Microbatch": "cllm.train.step",
    },
)
