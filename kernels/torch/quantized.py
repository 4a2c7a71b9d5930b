"""Products with weights packed for inference in plain torch: with the matrices that they stand for. M rows, K inputs, N outputs."""

from torch import Tensor

from cllm.kernels.stack import Packed
from cllm.kernels.torch import feed_forward as dense
from cllm.kernels.torch import matmul as product


def matmul(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype."""
    return product.matmul(x, weight.dense(x.dtype).T, bias, x.dtype)


def feed_forward(
    x: Tensor, w_gate: Packed | None, w_up: Packed, w_down: Packed, activation: str, b_up: Tensor | None, b_down: Tensor | None
) -> Tensor:
    """x (M, E) -> (M, E_out)."""
    gate = None if w_gate is None else w_gate.dense(x.dtype)
    return dense.forward(x, gate, w_up.dense(x.dtype), w_down.dense(x.dtype), activation, b_up, b_down, False)[0]
