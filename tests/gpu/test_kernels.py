"""What needs a GPU: every case of every operation there, captured as a graph, and the same bits again and again. Run by profiling/gpu_suite.py."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("these tests need a GPU, and PyTorch sees none", allow_module_level=True)

from cllm import Model, ModelConfig, TrainStep, kernels, load, runtime
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.generate.decoding import generate
from cllm.kernels.quantization import quantize, quantize4
from cllm.kernels.quantized import quantized_matmul


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "window": 100}, {"causal": True, "softcap": 20.0}])
def test_attention_agrees_with_float64(backend, dim, options):
    q, k, v = normal(2, 300, 8, dim, grad=True), normal(2, 300, 2, dim, grad=True), normal(2, 300, 2, dim, grad=True)
    if backend == "gluon" and not runtime.gpu.gpu_of(q.device).is_hopper:
        pytest.skip("the Gluon kernels are for Hopper")
    with runtime.use(backend=backend):
        out = kernels.attention(q, k, v, **options)
        found = torch.autograd.grad(out, (q, k, v), out.detach())
    wide = [each.detach().double().requires_grad_() for each in (q, k, v)]
    with runtime.use(backend="torch"):
        exact = kernels.attention(*wide, **options)
        expected = torch.autograd.grad(exact, wide, out.detach().double())
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.double(), theirs, atol=4e-2 * theirs.abs().max().item(), rtol=0)


def test_the_backward_of_attention_gives_the_same_bits_a_thousand_times():
    q, k, v = (normal(2, 512, 4, 64, grad=True) for _ in range(3))
    dout = normal(2, 512, 4, 64)
    first = torch.autograd.grad(kernels.attention(q, k, v, causal=True), (q, k, v), dout)
    for _ in range(1000):
        again = torch.autograd.grad(kernels.attention(q, k, v, causal=True), (q, k, v), dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_the_operators_are_registered_rightly_on_a_gpu():
    """opcheck: shapes of the fakes, no aliasing, gradients registered, and what torch.compile asks for."""
    q = normal(1, 40, 4, 64, grad=True)
    angles, head_weight = torch.randn(40, 32, device="cuda"), torch.randn(4, 64, device="cuda", requires_grad=True)
    k = normal(1, 40, 2, 64, grad=True)
    x, weight = normal(6, 64, grad=True), normal(64, grad=True)
    logits, targets = normal(6, 97, grad=True), torch.tensor([0, 96, -100, 3, 3, 1], device="cuda")
    calls = {
        "attention": (q, k, k, True, 0.125, 0, 0.0, None), "rms_norm": (x, weight, 1e-6), "layer_norm": (x, weight, None, 1e-5), "softmax": (x,),
        "cross_entropy": (logits, targets, -100, 0.1, 1e-3, 5.0, "mean"),
        "feed_forward": (x, normal(96, 64, grad=True), normal(96, 64, grad=True), normal(64, 96, grad=True), "silu", None, None, True),
        "matmul": (x, normal(64, 48, grad=True), None), "norm_rotary": (q, head_weight, 1e-6, angles.cos(), angles.sin(), None),
    }  # fmt: skip
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.cllm, name).default, arguments, test_utils=utilities)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_may_be_torchs_own(backward):
    q, k, v = normal(2, 300, 8, 64, grad=backward), normal(2, 300, 2, 64, grad=backward), normal(2, 300, 2, 64, grad=backward)
    with runtime.use(backend="sdpa", deterministic=False):
        out = kernels.attention(q, k, v, causal=True)
    with runtime.use(backend="triton"):
        torch.testing.assert_close(out, kernels.attention(q, k, v, causal=True), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", "adamw"), ("bf16", "adamw"), ("fp16", "adamw"), ("bf16", "muon"), ("fp32", "lion"), ("fp32", "schedule_free")],
)
def test_the_captured_step_does_what_the_cpu_does(precision, optimizer):
    sizes = {"vocab_size": 257, "embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128, "max_seq_len": 64}
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(257, (4, 64), generator=generator) for _ in range(2)]
    here = TrainStep(Model(ModelConfig(**sizes)), learning_rate=1e-3, optimizer=optimizer)
    there = TrainStep(Model(ModelConfig(**sizes)).to("cuda"), precision=precision, learning_rate=1e-3, optimizer=optimizer)
    for _ in range(5):
        expected, found = float(here(*data)), float(there(*data))
        assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 1e-2)


def test_rows_beyond_two_to_the_31_elements():
    needed = 3 * 2 * (1 << 31)
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    x = torch.zeros((1 << 19) + 8, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = normal(4096)
    y = kernels.softmax(x)
    torch.testing.assert_close(y[-1], torch.softmax(x[-1].float(), -1).bfloat16())
    normed = kernels.rms_norm(x, torch.ones(4096, device="cuda"))
    torch.testing.assert_close(normed[-1], torch.nn.functional.rms_norm(x[-1].float(), (4096,)).bfloat16(), atol=2e-2, rtol=2e-2)


def test_generation_by_a_graph_writes_what_the_host_chooses():
    model = Model(ModelConfig.preset("cllm-1m", vocab_size=64, max_seq_len=128), seed=1).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    tokenizer = Tokenizer.train(["It was the best of times"], kind="char")
    for options in ({"temperature": 0}, {"temperature": 1.0, "samples": 3, "seed": 4}):
        by_host = generate(model, tokenizer, "It was", max_tokens=60, use_cache=False, **options)
        by_graph = generate(model, tokenizer, "It was", max_tokens=60, **options)
        assert [each.tokens for each in by_graph] == [each.tokens for each in by_host]


def test_an_engine_by_graphs_gives_the_tokens_of_one_without(monkeypatch):
    from cllm.generate.engine import Engine
    from cllm.generate.request import Request
    from cllm.model import model as models

    model = Model(ModelConfig.preset("cllm-1m", vocab_size=64, max_seq_len=256), seed=1).cuda()
    answers = []
    for by_graphs in (True, False):
        monkeypatch.setattr(models, "_is_on_a_gpu", lambda pool, by_graphs=by_graphs: by_graphs)
        engine, tokens = Engine(model, vocab_size=64), {}
        for number in range(5):
            told = lambda _, chosen, mine=tokens.setdefault(number, []): mine.append(chosen.token) or True  # noqa: E731
            engine.submit(Request([1 + number] * (3 + 30 * number), 40, on_token=told))
            engine.step()
        while engine.step():
            pass
        answers.append(tokens)
    assert answers[0] == answers[1] and all(len(each) == 40 for each in answers[0].values())


def test_training_through_the_command_line(tmp_path):
    from command import TINY, cllm

    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 2000)
    run = tmp_path / "run"
    done = cllm("train", tmp_path / "text.txt", "--out", run, *TINY, "--steps", 6, "--device", "cuda", "--json")
    assert done.status == 0, done.err
    model, _ = load(run)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("quantize", [quantize, quantize4], ids=["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_products_with_weights_of_few_bits_agree_with_float64(quantize, rows):
    x, weight = normal(rows, 1000), quantize(torch.randn(4100, 1000)).moved(lambda each: each.cuda())
    exact = x.double() @ weight.dense(torch.float64).T
    found = quantized_matmul(x, weight)
    torch.testing.assert_close(found.double(), exact, atol=2e-2 * exact.abs().max().item(), rtol=0)
    assert torch.equal(found[-1:], quantized_matmul(x[-1:], weight)) or rows > 64, "few rows: the same bits beside any others"
