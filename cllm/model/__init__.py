"""The model: blocks, rotary positions, key-value cache, adapters, and what it costs in memory."""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["Model"]

if TYPE_CHECKING:
    from cllm.model.model import Model

__getattr__, __dir__ = exports(
    __name__,
    {
        "Model": "cllm.model.model",
    },
)
