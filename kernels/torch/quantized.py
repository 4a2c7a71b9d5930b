"""Products with int8 weights in plain torch: with the weights that they dequantise to. M rows, K inputs, N outputs."""

from torch import Tensor

from cllm.kernels.quantization import Quantized
from cllm.kernels.torch import feed_forward as dense
from cllm.kernels.torch import matmul as product


def matmul(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype."""
    return product.matmul(x, weight.dequantize(x.dtype).T, bias, x.dtype)


def feed_forward(
    x: Tensor, w_gate: Quantized | None, w_up: Quantized, w_down: Quantized, activation: str, b_up: Tensor | None, b_down: Tensor | None
) -> Tensor:
    """x (M, E) -> (M, E_out)."""
    gate = None if w_gate is None else w_gate.dequantize(x.dtype)
    return dense.forward(x, gate, w_up.dequantize(x.dtype), w_down.dequantize(x.dtype), activation, b_up, b_down, False)[0]
