"""Products with weights packed for inference on a GPU (strips.py, quantization.py). M rows, K inputs, N outputs.

A product of a few rows waits for the weights, so that it is to read no more of them than there is: words of 32 bits, which lie side by side for
neighbouring outputs, each with four or eight neighbours along K. Element t of all words of a tile makes one product with the x that belong to it.
Weights become q * s, rounded to x's dtype, in registers. Many rows read each weight many times: there the matrix is made once, for dense products.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.quantization import SCALE_BLOCK, SCALE_GROUP, Quantized, Quantized4
from cllm.kernels.stack import Packed
from cllm.kernels.strips import STRIP
from cllm.kernels.triton import feed_forward as dense
from cllm.kernels.triton.activation import KINDS, activate
from cllm.kernels.triton.launch import Calls, launch
from cllm.kernels.triton.matmul import matmul as dense_matmul
from cllm.kernels.triton.matmul import precision_of
from cllm.runtime.gpu import GPU

MOST_ROWS = 64  # beyond it dense products, which use the matrix units better, should be worth the copy: not measured
STEP_WORDS = 16  # of each output in a step: matrix units sum over no fewer elements
BLOCK_ROWS = 16  # of a tile, however many rows there are: a row has the same bits beside any others
LANES = tl.constexpr(STRIP)


@triton.jit
def product_of_words(
    x_ptr, x_row, row, num_rows, values_ptr, scales_ptr, column, num_columns, depth, num_words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr, PER_WORD: tl.constexpr, SCALE_WORDS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[row, :] W[column, :]^T, WORDS words of each column at a time."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    strip, lane = (column // LANES).to(tl.int64), column % LANES
    for first in range(0, num_words, WORDS):
        word = first + tl.arange(0, WORDS)
        inside = (word < num_words)[:, None] & (column < num_columns)[None, :]
        words = tl.load(values_ptr + strip[None, :] * (num_words * LANES) + word[:, None] * LANES + lane[None, :], mask=inside, other=0)
        scale_at = strip[None, :] * (num_words // SCALE_WORDS * LANES) + (word // SCALE_WORDS)[:, None] * LANES + lane[None, :]
        scale = tl.load(scales_ptr + scale_at, mask=inside, other=0.0).to(tl.float32)
        for t in tl.static_range(PER_WORD):
            if PER_WORD == 4:
                element = t
                q = (words << (24 - 8 * t)) >> 24  # with its sign
            else:
                element = t // 2 % 2 * 4 + t // 4 * 2 + t % 2  # the bytes of eight elements are those of (0, 1), (4, 5), (2, 3), (6, 7)
                q = ((words >> (4 * t)) & 15) - 8
            k = word * PER_WORD + element
            x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + k[None, :], mask=(row < num_rows)[:, None] & (k < depth)[None, :], other=0.0)
            acc = tl.dot(x, (q.to(tl.float32) * scale).to(DTYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def packed_kernel(
    x_ptr, gate_ptr, gate_scales_ptr, values_ptr, scales_ptr, bias_ptr, out_ptr, x_row, num_rows, num_columns, depth, num_words,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, PER_WORD: tl.constexpr, SCALE_WORDS: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x W^T (+ bias); with KIND >= 0 its activation, or that of x G^T times it where there is a gate G. What is activated is rounded first."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    acc = product_of_words(
        x_ptr, x_row, row, num_rows, values_ptr, scales_ptr, column, num_columns, depth, num_words, BLOCK_M, BLOCK_N, WORDS, PER_WORD, SCALE_WORDS,
        DTYPE, PRECISION,
    )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    if KIND >= 0:
        acc = acc.to(DTYPE).to(tl.float32)
        if gate_ptr is not None:  # a loop of its own: both at once would take more registers than there are
            gate = product_of_words(
                x_ptr, x_row, row, num_rows, gate_ptr, gate_scales_ptr, column, num_columns, depth, num_words, BLOCK_M, BLOCK_N, WORDS, PER_WORD,
                SCALE_WORDS, DTYPE, PRECISION,
            )  # fmt: skip
            acc = activate(gate.to(DTYPE).to(tl.float32), KIND) * acc
        else:
            acc = activate(acc, KIND)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * num_columns + column[None, :], acc, mask=inside)


def _packed(x: Tensor, weight: Packed) -> bool:
    """Whether the rows are so few that the kernel reads the weight as it is packed."""
    return x.shape[0] <= MOST_ROWS and isinstance(weight, Quantized | Quantized4)


def _words(weight: Packed) -> Tensor:
    """int32 (strips, words, STRIP, 1)."""
    return weight.values.view(torch.int32).flatten(1, 2)


def _product(x: Tensor, weight: Packed, bias: Tensor | None, gate: Packed | None = None, kind: int = -1) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype. `weight` and `gate` are of one kind of integers."""
    assert isinstance(weight, Quantized | Quantized4) and (gate is None or isinstance(gate, type(weight)))
    x = x if x.stride(1) == 1 else x.contiguous()
    (num_rows, depth), num_columns = x.shape, weight.shape[0]
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    words = _words(weight)
    per_word, scaled = (4, SCALE_BLOCK) if isinstance(weight, Quantized) else (8, SCALE_GROUP)
    block_n = 32 if num_columns <= 8192 else 64  # all processors of a GPU first, then large tiles
    wide = x.dtype == torch.float32  # whose products no matrix unit makes: they take the registers of more threads
    gates = (None, None) if gate is None else (_words(gate), gate.scales)
    launch(
        packed_kernel, (-(-num_columns // block_n), -(-num_rows // BLOCK_ROWS)), x, *gates, words, weight.scales, bias, out, x.stride(0), num_rows,
        num_columns, depth, words.shape[1], BLOCK_M=BLOCK_ROWS, BLOCK_N=block_n, WORDS=STEP_WORDS, PER_WORD=per_word,
        SCALE_WORDS=scaled // per_word, KIND=kind, PRECISION=precision_of(x.dtype), num_warps=8 if wide else 2, num_stages=2 if wide else 4,
    )  # fmt: skip
    return out


def matmul(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype."""
    return _product(x, weight, bias) if _packed(x, weight) else dense_matmul(x, weight.dense(x.dtype).T, bias, x.dtype)


def feed_forward(
    x: Tensor, w_gate: Packed | None, w_up: Packed, w_down: Packed, activation: str, b_up: Tensor | None, b_down: Tensor | None
) -> Tensor:
    """x (M, E) -> (M, E_out)."""
    if not _packed(x, w_up):
        gate = None if w_gate is None else w_gate.dense(x.dtype)
        return dense.forward(x, gate, w_up.dense(x.dtype), w_down.dense(x.dtype), activation, b_up, b_down, False)[0]
    return _product(_product(x, w_up, b_up, w_gate, KINDS[activation]), w_down, b_down)


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    x, bias = empty(8, 768, of=dtype), empty(2048, of=torch.float32)
    int8 = Quantized(empty(128, 12, SCALE_BLOCK // 4, STRIP, 4, of=torch.int8), empty(128, 12, STRIP, of=torch.float32), (2048, 768))
    int4 = Quantized4(empty(128, 24, SCALE_GROUP // 8, STRIP, 4, of=torch.uint8), empty(128, 24, STRIP, of=torch.bfloat16), (2048, 768))
    for name, weight in (("int8", int8), ("int4", int4)):
        yield f"{name}", partial(_product, x, weight, bias)
        yield f"{name} gated", partial(_product, x, weight, None, weight, KINDS["silu"])
