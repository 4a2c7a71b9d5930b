"""Training: the loop, one step of it in its forms, the optimizers, and what happens when something goes wrong."""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["Microbatch", "StepResult", "TrainResult", "TrainStep", "Trainer"]

if TYPE_CHECKING:
    from cllm.monitor.records import StepResult, TrainResult
    from cllm.train.step import Microbatch, TrainStep
    from cllm.train.trainer import Trainer

__getattr__, __dir__ = exports(
    __name__,
    {
        "Trainer": "cllm.train.trainer",
        "TrainResult": "cllm.monitor.records",
        "TrainStep": "cllm.train.step",
        "StepResult": "cllm.monitor.records",
        "Microbatch": "cllm.train.step",
    },
)
