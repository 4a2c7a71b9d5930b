"""The fused operations: torch tensors in, torch tensors out, each with a gradient, the same names on every device.

Each is a `torch.library` operator (`torch.ops.cllm.*`), so that `torch.compile` and `torch.export` work on them. `cllm.runtime` chooses the
backend of a call: numba on a CPU; Triton, Gluon on Hopper, or torch's own attention on a GPU; and plain torch, the reference that all others are
tested against, for every other dtype and device.
"""

from cllm.kernels._register import add_backend
from cllm.kernels.adamw import adamw_, gradient_statistics
from cllm.kernels.attention import attention
from cllm.kernels.attention_dropout import attention_dropout
from cllm.kernels.backend import Backend
from cllm.kernels.cached_attention import cached_attention
from cllm.kernels.cross_entropy import cross_entropy
from cllm.kernels.dropout import Dropout
from cllm.kernels.embedding import embedding
from cllm.kernels.feed_forward import feed_forward
from cllm.kernels.linear_cross_entropy import LossStats, linear_cross_entropy
from cllm.kernels.matmul import matmul
from cllm.kernels.norm import layer_norm, rms_norm
from cllm.kernels.norm_dropout import layer_norm_dropout, rms_norm_dropout
from cllm.kernels.operations import OPERATIONS
from cllm.kernels.paged_attention import paged_attention
from cllm.kernels.rotary import rotary
from cllm.kernels.softmax import softmax

__all__ = [
    "OPERATIONS",
    "Backend",
    "Dropout",
    "LossStats",
    "adamw_",
    "add_backend",
    "attention",
    "attention_dropout",
    "cached_attention",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "gradient_statistics",
    "layer_norm",
    "layer_norm_dropout",
    "linear_cross_entropy",
    "matmul",
    "paged_attention",
    "rms_norm",
    "rms_norm_dropout",
    "rotary",
    "softmax",
]
