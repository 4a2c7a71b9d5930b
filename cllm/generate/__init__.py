"""Text from a model: the decoding loop and how a token is chosen."""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["Sampling", "generate", "stream"]

if TYPE_CHECKING:
    from cllm.generate.decoding import generate, stream
    from cllm.generate.sampling import Sampling

__getattr__, __dir__ = exports(
    __name__,
    {
        "generate": "cllm.generate.decoding",
        "stream": "cllm.generate.decoding",
        "Sampling": "cllm.generate.sampling",
    },
)
