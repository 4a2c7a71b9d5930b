"""How good a model is: loss over a split, by document, by class of token, by lm-evaluation-harness."""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["Evaluation", "evaluate"]

if TYPE_CHECKING:
    from cllm.evaluate.loss import Evaluation, evaluate

__getattr__, __dir__ = exports(
    __name__,
    {
        "evaluate": "cllm.evaluate.loss",
        "Evaluation": "cllm.evaluate.loss",
    },
)
