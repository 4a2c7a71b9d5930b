"""CLLM: train small and medium language models from scratch on your own text, on a GPU or on nothing but a CPU.

Names are loaded on first use, so that `import cllm` compiles nothing and starts nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Model": "cllm.model",
    "ModelConfig": "cllm.config",
    "Tokenizer": "cllm.tokenizer",
    "Trainer": "cllm.train",
    "TrainConfig": "cllm.train_config",
    "TrainStep": "cllm.step",
    "load": "cllm.checkpoint",
    "save": "cllm.checkpoint",
}
__all__ = ["Model", "ModelConfig", "Tokenizer", "TrainConfig", "TrainStep", "Trainer", "load", "save"]

if TYPE_CHECKING:
    from cllm.checkpoint import load, save
    from cllm.config import ModelConfig
    from cllm.model import Model
    from cllm.step import TrainStep
    from cllm.tokenizer import Tokenizer
    from cllm.train import Trainer
    from cllm.train_config import TrainConfig


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
