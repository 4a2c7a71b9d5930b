"""A wrong argument is a UserError that says what was wrong and what was expected, before anything is computed."""

import pytest
import torch

from cllm import kernels
from cllm.runtime.errors import UserError

z = torch.zeros
Q, K = z(1, 4, 4, 8), z(1, 4, 2, 8)
LONG = torch.long
DROPOUT = kernels.Dropout.of(0.1, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.attention(Q[0], K, K), r"expected q \(B, T, H, D\)"),
        (lambda: kernels.attention(Q, K, z(1, 5, 2, 8)), "do not fit together"),
        (lambda: kernels.attention(z(1, 4, 3, 8), K, K), "multiple of the number of key-value heads"),
        (lambda: kernels.attention(Q, K.double(), K), "must agree"),
        (lambda: kernels.attention(Q.long(), K.long(), K.long()), "floating point"),
        (lambda: kernels.attention(Q, K, K, window=0), "window must be >= 1"),
        (lambda: kernels.attention(Q, K, K, softcap=-1.0), "softcap must be > 0"),
        (lambda: kernels.attention(Q, K, K, cu_seqlens=torch.tensor([0, 4])), "int32"),
        (lambda: kernels.attention(Q, K, K, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)), "number of tokens, 4"),
        (lambda: kernels.attention(Q, K, K, cu_seqlens=torch.tensor([0, 3, 2, 4], dtype=torch.int32)), "rise from 0"),
        (lambda: kernels.attention(z(2, 4, 4, 8), z(2, 4, 2, 8), z(2, 4, 2, 8), cu_seqlens=z(2).int()), "B = 1"),
        (lambda: kernels.attention(Q, K, K, sinks=z(3)), r"sinks must be floating point \(4,\)"),
        (lambda: kernels.attention_dropout(Q, K, z(1, 5, 2, 8), DROPOUT, 0), "do not fit together"),
        (lambda: kernels.attention_dropout(Q, K, K, DROPOUT, 0, period=-1), "period must be >= 0"),
        (lambda: kernels.attention_dropout(Q, K, K, kernels.Dropout(0.1, z(3)), 0), r"key of dropout must be int64 \(3,\) on cpu, got torch.float32"),
        (lambda: kernels.rms_norm_dropout(z(3, 4), z(5), DROPOUT, 0), "do not fit together"),
        (lambda: kernels.layer_norm_dropout(z(3, 4), z(4), None, kernels.Dropout(0.1, z(2, dtype=LONG)), 0), "key of dropout must be int64"),
        (lambda: kernels.feed_forward(z(3, 4), None, z(5, 4), z(4, 5), activation="swish"), "silu, gelu, gelu_tanh, relu2"),
        (lambda: kernels.feed_forward(z(3, 4), z(6, 4), z(5, 4), z(4, 5)), r"w_gate \(6, 4\)"),
        (lambda: kernels.feed_forward(z(3, 4), None, z(5, 4).double(), z(4, 5)), "w_up is torch.float64"),
        (lambda: kernels.rms_norm(z(3, 4), z(5)), "do not fit together"),
        (lambda: kernels.rms_norm(z(3, 4), z(4), residual=z(3, 4).bfloat16()), "residual is torch.bfloat16"),
        (lambda: kernels.layer_norm(z(3, 4).bfloat16(), z(4), z(4).bfloat16()), "must have one dtype"),
        (lambda: kernels.rotary(z(1, 4, 2, 8), z(9, 3), z(9, 3)), "do not fit together"),
        (lambda: kernels.rotary(z(1, 4, 2, 8), z(3, 4), z(3, 4)), "table holds 3 positions"),
        (lambda: kernels.rotary(z(1, 2, 2, 8), z(3, 4), z(3, 4), torch.tensor([0, 3])), "0 <= positions < 3"),
        (lambda: kernels.rotary(z(1, 2, 2, 8), z(3, 4), z(3, 4), torch.tensor([0])), "positions must be int64"),
        (lambda: kernels.rotary(z(1, 2, 3, 8), z(3, 4), z(3, 4), None, z(8)), r"norm_weight must be \(H, D\) = \(3, 8\).*got \(8,\)"),
        (lambda: kernels.rotary(z(1, 2, 3, 8), z(3, 4), z(3, 4), None, z(3, 8).double()), "norm_weight is torch.float64"),
        (lambda: kernels.softmax(z(3, 4), 2), "dim 2 does not exist"),
        (lambda: kernels.embedding(torch.tensor([0, 5]), z(5, 4)), "0 <= tokens < 5"),
        (lambda: kernels.embedding(torch.tensor([-1]), z(5, 4)), "tokens holds -1"),
        (lambda: kernels.embedding(z(3), z(5, 4)), "expected integer tokens"),
        (lambda: kernels.cross_entropy(z(3, 4), z(2, dtype=LONG)), "targets must be int64 of shape"),
        (lambda: kernels.cross_entropy(z(3, 4), torch.tensor([0, 4, 1])), "targets holds 4"),
        (lambda: kernels.cross_entropy(z(3, 4), torch.tensor([0, -1, 1])), "or -100 where there is nothing to predict"),
        (lambda: kernels.cross_entropy(z(3, 4), z(3, dtype=LONG), reduction="max"), "mean, sum, none"),
        (lambda: kernels.cross_entropy(z(3, 4), z(3, dtype=LONG), label_smoothing=1.0), "label_smoothing"),
        (lambda: kernels.linear_cross_entropy(z(3, 4), z(5, 3), z(3, dtype=LONG)), "do not fit"),
        (lambda: kernels.linear_cross_entropy(z(3, 4), z(5, 4), z(3, dtype=LONG), divisor=0), "divisor must be > 0"),
        (lambda: kernels.linear_cross_entropy(z(3, 4), z(5, 4), z(3, dtype=LONG), divisor=2, reduction="sum"), "divisor"),
        (lambda: kernels.matmul(z(3, 4), z(5, 4)), r"b \(K, N\)"),
        (lambda: kernels.matmul(z(3, 4), z(4, 5), z(4)), r"bias \(4,\)"),
        (lambda: kernels.matmul(z(3, 4), z(4, 5).bfloat16()), "b is torch.bfloat16"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(UserError, match="(?i)" + message):
        call()
