"""CLLM: train small and medium language models from scratch on your own text, on a GPU or on nothing but a CPU.

Names are loaded on first use, so that `import cllm` compiles nothing and starts nothing.
"""

from typing import TYPE_CHECKING

from cllm._lazy import exports
from cllm._version import __version__ as __version__

_HOME = {
    "Model": "cllm.model.model",
    "ModelConfig": "cllm.config.model",
    "Tokenizer": "cllm.data.tokens.tokenizer",
    "Trainer": "cllm.train.trainer",
    "TrainConfig": "cllm.config.train",
    "TrainStep": "cllm.train.step",
    "load": "cllm.checkpoint.model_file",
    "save": "cllm.checkpoint.model_file",
}
__all__ = ["Model", "ModelConfig", "Tokenizer", "TrainConfig", "TrainStep", "Trainer", "load", "save"]

if TYPE_CHECKING:
    from cllm.checkpoint.model_file import load, save
    from cllm.config.model import ModelConfig
    from cllm.config.train import TrainConfig
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model
    from cllm.train.step import TrainStep
    from cllm.train.trainer import Trainer


__getattr__, __dir__ = exports(__name__, _HOME)
