"""`runtime.explain` says what runs: the backend and the workers that a recorded call of the operation really used."""

import math
import sys

import pytest
import torch

from cllm import kernels, runtime
from cllm.kernels.operations import OPERATIONS, visible_pairs
from cllm.kernels.quantization import quantize
from cllm.kernels.quantized import quantized_matmul

pytest.importorskip("numba")


def _attention(shapes, dtype, causal=False, window=None):
    q, k = (torch.zeros(shape, dtype=dtype) for shape in (shapes if len(shapes) == 2 else shapes * 2))
    kernels.attention(q, k, k, causal=causal, window=window)


def _feed_forward(shapes, dtype, gated=True):
    x, up = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    kernels.feed_forward(x, up if gated else None, up, up.T.contiguous())


def _norm(op):
    def call(shapes, dtype, residual=False):
        x, weight = torch.zeros(shapes[0], dtype=dtype), torch.ones(shapes[0][-1])
        getattr(kernels, op)(x, weight, residual=x if residual else None)

    return call


def _attention_dropout(shapes, dtype, causal=False):
    q = torch.zeros(shapes[0], dtype=dtype)
    kernels.attention_dropout(q, q, q, kernels.Dropout.of(0.1, 0), 0, causal=causal)


def _norm_dropout(shapes, dtype, residual=False):
    x, weight = torch.zeros(shapes[0], dtype=dtype), torch.ones(shapes[0][-1])
    kernels.rms_norm_dropout(x, weight, kernels.Dropout.of(0.1, 0), 0, residual=x if residual else None)


def _rotary(shapes, dtype):
    x = torch.zeros(shapes[0], dtype=dtype)
    kernels.rotary(x, *torch.zeros(2, x.shape[1], x.shape[3] // 2))


def _linear_cross_entropy(shapes, dtype, gradients=False):
    x, weight = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    kernels.linear_cross_entropy(x.requires_grad_(gradients), weight, torch.zeros(x.shape[:-1], dtype=torch.int64))


def _cross_entropy(shapes, dtype):
    kernels.cross_entropy(torch.zeros(shapes[0], dtype=dtype), torch.zeros(shapes[0][:-1], dtype=torch.int64))


def _adamw(shapes, dtype):
    params = [torch.zeros(shape) for shape in shapes]
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decays": [0.0] * len(params), "step": 1}
    kernels.adamw_(params, [torch.zeros(shape, dtype=dtype) for shape in shapes], params, params, learning_rate=0.1, **options)


def _cached_attention(shapes, dtype):
    q, keys = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    kernels.cached_attention(q, keys, keys, torch.ones(len(q), dtype=torch.int64))


def _paged_attention(shapes, dtype):
    """Each query is of a sequence of its own, and together they see as many keys as the pool has places."""
    q, keys = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    rows, per_row = len(q), len(keys) // len(q)
    pages = torch.arange(len(keys), dtype=torch.int32).view(rows, per_row)
    kernels.paged_attention(q, keys, keys, pages, torch.full((rows,), per_row * keys.shape[1]), torch.ones(rows, dtype=torch.int64))


CALLS = {
    "attention": _attention,
    "attention_dropout": _attention_dropout,
    "norm_dropout": _norm_dropout,
    "cached_attention": _cached_attention,
    "paged_attention": _paged_attention,
    "feed_forward": _feed_forward,
    "rms_norm": _norm("rms_norm"),
    "layer_norm": _norm("layer_norm"),
    "rotary": _rotary,
    "softmax": lambda shapes, dtype: kernels.softmax(torch.zeros(shapes[0], dtype=dtype)),
    "embedding": lambda shapes, dtype: kernels.embedding(torch.zeros(shapes[0], dtype=torch.int64), torch.zeros(shapes[1]), dtype),
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "matmul": lambda shapes, dtype: kernels.matmul(torch.zeros(shapes[0], dtype=dtype), torch.zeros(shapes[1][::-1], dtype=dtype).T),
    "quantized": lambda shapes, dtype: quantized_matmul(torch.zeros(shapes[0], dtype=dtype), quantize(torch.zeros(shapes[1]))),
    "adamw": _adamw,
}
CASES = [
    ("attention", ((1, 24, 4, 32),), {"causal": True}),  # too little work for two, though not without the mask
    ("attention", ((1, 24, 4, 32),), {}),
    ("attention", ((1, 300, 4, 32),), {"causal": True}),
    ("attention", ((1, 300, 4, 32),), {"causal": True, "window": 17}),
    ("attention", ((2, 65, 6, 16), (2, 130, 2, 16)), {"causal": True}),
    ("attention", ((1, 1, 8, 64), (1, 300, 2, 64)), {"causal": True}),
    ("attention", ((1, 1, 8, 64), (1, 40, 8, 64)), {"causal": True}),
    ("attention", ((3, 1, 8, 64), (3, 700, 8, 64)), {}),
    ("attention", ((2, 0, 4, 32), (2, 7, 4, 32)), {}),
    ("attention_dropout", ((1, 300, 4, 32),), {"causal": True}),
    ("norm_dropout", ((20, 1500),), {"residual": True}),
    ("norm_dropout", ((5, 40_000),), {}),
    ("cached_attention", ((3, 1, 8, 64), (3, 700, 2, 64)), {}),
    ("paged_attention", ((3, 8, 64), (6, 128, 2, 64)), {}),
    ("paged_attention", ((1, 66, 64), (2, 128, 1, 64)), {}),
    ("paged_attention", ((1, 2, 16), (1, 128, 1, 16)), {}),
    ("softmax", ((64, 400),), {}),
    ("softmax", ((1, 200_000),), {}),  # one row is one task
    ("softmax", ((7, 13, 5),), {}),
    ("softmax", ((3, 0),), {}),
    ("rms_norm", ((5, 40_000),), {}),
    ("rms_norm", ((20, 1500),), {"residual": True}),
    ("rms_norm", ((20, 1500),), {}),
    ("layer_norm", ((2, 100, 300),), {}),
    ("rotary", ((2, 33, 4, 64),), {}),
    ("rotary", ((1, 9, 40, 256),), {}),
    ("embedding", ((10,), (50, 9000)), {}),
    ("embedding", ((4, 100), (50, 600)), {}),
    ("cross_entropy", ((3, 40_000),), {}),
    ("cross_entropy", ((2, 50, 700),), {}),
    ("linear_cross_entropy", ((40, 64), (500, 64)), {}),
    ("linear_cross_entropy", ((40, 64), (500, 64)), {"gradients": True}),
    ("linear_cross_entropy", ((2, 3, 32), (3000, 32)), {}),
    ("linear_cross_entropy", ((1500, 8), (20_000, 8)), {}),  # several blocks of rows
    ("feed_forward", ((2, 5, 64), (192, 64)), {}),
    ("feed_forward", ((10, 64), (96, 64)), {"gated": False}),
    ("feed_forward", ((300, 64), (20, 64)), {}),
    ("matmul", ((1, 600), (600, 900)), {}),
    ("matmul", ((300, 40), (40, 50)), {}),
    ("matmul", ((2, 70, 5000), (5000, 30)), {}),  # several parts of K
    ("matmul", ((9, 10), (10, 11)), {}),
    ("quantized", ((1, 300), (2000, 300)), {}),
    ("quantized", ((2, 20, 128), (300, 128)), {}),
    ("adamw", ((300, 700), (5,)), {}),
    ("adamw", ((100, 150),), {}),
]


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_call_uses_the_backend_and_the_workers_that_explain_names(threads, dtype):
    wrong = []
    for op, shapes, options in CASES:
        with runtime.use(threads=threads):
            said = runtime.explain(op, *shapes, dtype=dtype, **options)
            with runtime.profiler.record() as recording:
                CALLS[op](shapes, getattr(torch, dtype), **options)
        (event,) = recording.kernels()
        used = event.workers if said.backend != "torch" else said.workers  # torch does not tell how many of its threads it used
        if (event.operation, event.backend, used) != (op, said.backend, said.workers):
            wrong.append(f"{op} {shapes} {options}: {event.backend}, {event.workers} workers, and explain says {said}")
    assert not wrong, "\n".join(wrong)
    assert {op for op, _, _ in CASES} == set(OPERATIONS) == set(CALLS)


def test_packed_documents_get_workers_for_what_their_queries_see():
    lengths = [100, 40, 1, 160]
    q = torch.zeros(1, sum(lengths), 8, 4)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    with runtime.use(threads=64):
        with runtime.profiler.record() as recording:
            kernels.attention(q, q, q, causal=True, cu_seqlens=torch.tensor([0, 100, 140, 141, 301], dtype=torch.int32))
        said = runtime.explain("attention", q.shape, causal=True, pairs=pairs)
    assert recording.kernels()[0].workers == said.workers == 4 * 8 * 4 * pairs // 100_000 == 24


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_visible_pairs_are_those_of_the_mask(causal, window):
    for num_queries, num_keys in ((0, 5), (1, 1), (1, 9), (7, 7), (9, 4), (4, 9), (30, 41)):
        seen = 0
        for t in range(num_queries):
            position = t + num_keys - num_queries
            seen += sum((not causal or s <= position) and (window is None or s > position - window) for s in range(num_keys))
        assert visible_pairs(num_queries, num_keys, causal, window) == seen, (num_queries, num_keys)


def test_the_work_of_a_gradient_is_more_than_that_of_the_operation():
    for op, operation in OPERATIONS.items():
        forward = operation.work(operation.example, 4)
        assert forward > 0 and math.isfinite(forward)
        if op not in ("cached_attention", "paged_attention", "matmul", "quantized", "adamw", "linear_cross_entropy"):
            assert operation.work(operation.example, 4, backward=True) >= forward, op


def test_where_torch_serves_explain_leaves_the_threads_to_torch():
    with runtime.use(backend="torch", threads=1):
        said = runtime.explain("softmax", (4000, 4000))
        assert (said.backend, said.workers) == ("torch", torch.get_num_threads())
        said = runtime.explain("matmul", (9, 10), (10, 11))
        assert said.workers == torch.get_num_threads()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("attention", (1, 24, 4)), {}, r"attention takes the shapes of q \(B, T, H, D\)"),
        (("matmul", (8, 9)), {}, r"matmul takes the shapes of a \(\.\.\., K\) and b \(K, N\), got \(8, 9\)"),
        (("matmul", (8, 9), (8, 9)), {}, "a has 9 columns and b 8 rows"),
        (("softmax", (4, 5), (4, 5)), {}, "softmax takes"),
        (("softmax", (4, -5)), {}, "softmax takes"),
        (("softmax", (4, 5)), {"causal": True}, "softmax has no option 'causal'. It has: none"),
        (("attention", (1, 24, 4, 32)), {"windw": 3}, "attention has no option 'windw'. It has: causal, window"),
        (("softmax", (4, 5)), {"dtype": "fp32"}, "unknown dtype 'fp32'. Use one of float64, float32"),
    ],
)
def test_explain_refuses_what_the_operation_does_not_take(arguments, options, message):
    with pytest.raises(runtime.UserError, match=message):
        runtime.explain(*arguments, **options)


@pytest.mark.parametrize("usable", [True, False])
def test_the_report_of_a_machine_with_a_gpu_tells_its_backends_too(usable, monkeypatch):
    describing = sys.modules["cllm.runtime.describe"]
    monkeypatch.setattr(describing, "gpus", lambda: [runtime.device.Device("cuda", "a GPU", 132, 80 << 30)])
    monkeypatch.setattr(describing.toolchain, "obstacle", lambda: "" if usable else "no compiler")
    report = runtime.describe(OPERATIONS)
    there, lines = report.to_dict()["gpu_operations"], str(report).splitlines()
    heading = [number for number, line in enumerate(lines) if line.startswith("operation on the GPU")]
    if not usable:
        assert not there and not heading
        return
    assert there.keys() == set(OPERATIONS) and all(plan["device"] == "cuda" for each in there.values() for plan in each.values())
    assert there["attention"]["bfloat16"]["backend"] == "triton" and there["quantized"]["bfloat16"]["backend"] == "triton"
    assert lines[heading[0] + 1].split()[:3] == ["attention", "triton", "triton"]
    with runtime.use(backend="numba"):
        assert "numba" in runtime.describe(["softmax"]).to_dict()["gpu_operations"]["softmax"]["float32"]["reason"]
