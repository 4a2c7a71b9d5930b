"""What a model and a run are set to, and where each value comes from."""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["ModelConfig", "Schedule", "TrainConfig"]

if TYPE_CHECKING:
    from cllm.config.model import ModelConfig
    from cllm.config.schedule import Schedule
    from cllm.config.train import TrainConfig

__getattr__, __dir__ = exports(
    __name__,
    {
        "ModelConfig": "cllm.config.model",
        "TrainConfig": "cllm.config.train",
        "Schedule": "cllm.config.schedule",
    },
)
