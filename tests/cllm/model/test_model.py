"""Model: equal to a plain PyTorch transformer, alike in training, prefill and decoding, deterministic, trainable."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.model.memory import RECOMPUTE
from cllm.model.model import Model
from cllm.runtime.errors import UserError

SHAPE = {"vocab_size": 61, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 24}
CONFIGS = {
    "llama": ModelConfig(**SHAPE, num_kv_heads=2, tie_embeddings=False),
    "qwen3": ModelConfig(**SHAPE, num_kv_heads=1, qk_norm=True, head_dim=16, sliding_window=5, softcap=20.0),
    "gpt2": ModelConfig(**SHAPE, norm="layer"),
    "ngrams": ModelConfig(**SHAPE, num_kv_heads=2, bigram_rows=50, trigram_rows=97),
}


def make(name, scale=6.0):
    """A model whose matrices are large enough that every part matters to the result."""
    model = Model(CONFIGS[name], seed=1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("grams.weight"):
                assert not parameter.any(), "a table of n-grams begins with nothing"
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(key)))
            parameter.mul_(scale) if parameter.dim() > 1 else parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel())))
    return model


def random_tokens(batch, length, seed=0):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def ngram_row(text, length, rows):
    """The row of the n-gram that ends a text, as `cllm.model.ngrams` documents it."""
    newest_first = [*reversed(text), *[-1] * length][:length]
    roots = (math.isqrt(number << 128) % 2**64 | 1 for number in (2, 5, 11))
    return (sum(root * token for root, token in zip(roots, newest_first)) % 2**64 >> 33) % rows


def plain_logits(weights, config, tokens):
    """The model in ordinary torch, one document per row: weights by name, tokens (B, T) -> logits (B, T, V)."""
    T = tokens.shape[1]
    H, D, theta = config.num_heads, config.head_dim, config.rope_theta
    t = torch.arange(T)
    hidden = (t[:, None] < t) | (t[:, None] - t >= (config.sliding_window or T))

    def attend(q, k, v):  # (B, T, heads, D) each
        q, k, v = (x.transpose(1, 2).repeat_interleave(H // x.shape[2], 1) for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(D)).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)

    def rms(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weights[name]

    def rotate(x):
        frequency = (1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)).float()
        angle = t.float()[:, None] * frequency
        cos, sin = (f(angle.double()).float().to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    if config.family == "cllm":
        embedding = weights["model.embed_tokens.weight"]
        x = embedding[tokens]
        for length, name in ((2, "bigram"), (3, "trigram")):
            if rows := getattr(config, f"{name}_rows"):
                numbers = [[ngram_row(text[: end + 1].tolist(), length, rows) for end in range(T)] for text in tokens]
                x = x + weights[f"model.embed_{name}s.weight"][torch.tensor(numbers)] / 4
        for i in range(config.num_layers):

            def w(name, i=i):
                return f"model.layers.{i}.{name}.weight"

            y = rms(x, w("input_layernorm"))
            q, k, v = ((y @ weights[w(f"self_attn.{n}_proj")].T).unflatten(-1, (-1, D)) for n in "qkv")
            if config.qk_norm:
                q, k = rms(q, w("self_attn.q_norm")), rms(k, w("self_attn.k_norm"))
            x = x + attend(rotate(q), rotate(k), v) @ weights[w("self_attn.o_proj")].T
            y = rms(x, w("post_attention_layernorm"))
            gate, up = (y @ weights[w(f"mlp.{n}_proj")].T for n in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ weights[w("mlp.down_proj")].T
        x = rms(x, "model.norm.weight")
    else:

        def norm(x, name):
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)

        def conv1d(x, name):
            return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

        embedding = weights["transformer.wte.weight"]
        x = embedding[tokens] + weights["transformer.wpe.weight"][:T]
        for i in range(config.num_layers):
            p = f"transformer.h.{i}"
            q, k, v = (y.unflatten(-1, (-1, D)) for y in conv1d(norm(x, f"{p}.ln_1"), f"{p}.attn.c_attn").chunk(3, -1))
            x = x + conv1d(attend(q, k, v), f"{p}.attn.c_proj")
            x = x + conv1d(F.gelu(conv1d(norm(x, f"{p}.ln_2"), f"{p}.mlp.c_fc"), approximate="tanh"), f"{p}.mlp.c_proj")
        x = norm(x, "transformer.ln_f")
    logits = x @ weights.get("lm_head.weight", embedding).T
    return config.softcap * torch.tanh(logits / config.softcap) if config.softcap else logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_equal_a_plain_float64_transformer(name):
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24, seed=1)
    targets[0, 3:6] = -100
    model = make(name)
    weights = {key: value.detach().double().requires_grad_() for key, value in model.named_parameters()}
    expected = plain_logits(weights, model.config, tokens)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()

    with runtime.use(backend="torch"):
        oracle = make(name).double()
        assert oracle.compute_dtype == torch.float64
        torch.testing.assert_close(oracle(tokens), expected, rtol=1e-9, atol=1e-9)
        oracle.loss(tokens, targets).backward()
    for key, parameter in oracle.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-7, atol=1e-10, msg=key)

    # The backend that this machine would train with, in float32.
    torch.testing.assert_close(model(tokens), expected.float(), rtol=1e-4, atol=1e-4)
    loss = model.loss(tokens, targets)
    torch.testing.assert_close(loss, expected_loss.float(), rtol=1e-5, atol=1e-5)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key
        error = (parameter.grad - weights[key].grad).norm() / weights[key].grad.norm()
        assert error < 1e-4, (key, float(error))


def test_bfloat16_activations_keep_float32_parameters_and_gradients():
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    for name in CONFIGS:
        model = make(name, scale=2.0)
        exact = model.loss(tokens, targets)
        model.compute_dtype = torch.bfloat16
        assert model(tokens).dtype == torch.bfloat16
        loss = model.loss(tokens, targets)
        assert loss.item() == pytest.approx(exact.item(), rel=0.02)
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())
    with pytest.raises(UserError, match="compute_dtype"):
        model.compute_dtype = torch.int8


@pytest.mark.parametrize("name", CONFIGS)
def test_training_forward_prefill_and_decoding_give_the_same_logits(name):
    tokens = random_tokens(2, 20)
    model = make(name)
    whole = model(tokens).detach()
    cache = model.make_cache(2, 20)
    parts = [model(tokens[:, :7], cache=cache), model(tokens[:, 7:12], cache=cache)]
    parts += [model(tokens[:, t : t + 1], cache=cache, last_only=True) for t in range(12, 20)]
    assert cache.length == 20
    stepwise = torch.cat(parts, 1)
    assert not stepwise.requires_grad
    if runtime.plan("attention", ((2, 20, 4, 8), (2, 20, 2, 8)), torch.float32, "cpu", 1e6).backend == "numba":
        assert torch.equal(stepwise, whole)
        assert torch.equal(model(tokens[1:, :9]), whole[1:, :9])
    torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # without and with a norm of queries and keys
def test_a_layer_multiplies_and_rotates_once_in_training_and_gives_the_bits_of_generation(name, dtype):
    model, tokens = make(name), random_tokens(2, 24)
    model.compute_dtype = dtype

    def calls(*operations):
        return [sum(event.operation == each for event in recording.kernels()) for each in operations]

    with runtime.profiler.record() as recording:
        training = model(tokens)
    assert training.requires_grad
    assert calls("rotary", "matmul", "rms_norm") == [2, 2 * 2 + 1, 2 * 2 + 1]  # of two layers; the products of attention and of the logits
    with torch.no_grad(), runtime.profiler.record() as recording:
        generation = model(tokens)
    assert calls("rotary", "matmul", "rms_norm") == [2 * 2, 2 * 4 + 1, 2 * 2 + 1]
    if recording.kernels()[0].backend == "cpu":
        assert torch.equal(training, generation)
    torch.testing.assert_close(training, generation, rtol=0.05, atol=0.05)


def test_cache_rows_can_be_repeated_dropped_and_are_refused_when_they_do_not_fit():
    model = make("llama")
    tokens = random_tokens(3, 6)
    cache = model.make_cache(1, 8)
    model(tokens[:1], cache=cache)
    cache.select([0, 0])
    newest = tokens[1:, :1]
    both = model(newest, cache=cache)
    torch.testing.assert_close(both[1], model(torch.cat((tokens[:1], newest[1:]), 1))[0, -1:])
    cache.select([1])
    assert cache.batch == 1 and cache.num_bytes == 2 * 2 * 8 * 2 * 8 * 4
    with pytest.raises(UserError, match="made for 1 sequences, got 2"):
        model(newest, cache=cache)
    with pytest.raises(UserError, match="2 more do not fit"):
        model(tokens[:1, :2], cache=cache)
    assert cache.length == 7
    with pytest.raises(UserError, match="max_len from 1 to 24"):
        model.make_cache(1, 25)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_do_not_see_each_other(name):
    model = make(name)
    tokens = random_tokens(2, 12)
    cu_seqlens = torch.tensor([0, 5, 12, 12, 20, 24], dtype=torch.int32)
    packed = model(tokens, cu_seqlens=cu_seqlens).detach().flatten(0, 1)
    flat = tokens.flatten()
    for start, end in ((0, 5), (5, 12), (12, 20), (20, 24)):
        torch.testing.assert_close(packed[start:end], model(flat[None, start:end])[0], rtol=1e-4, atol=1e-4)
    changed = tokens.clone()
    changed[0, :5] = (changed[0, :5] + 1) % 61
    again = model(changed, cu_seqlens=cu_seqlens).flatten(0, 1)
    assert torch.equal(again[5:], packed[5:])
    assert not torch.equal(again[:5], packed[:5])

    # With untied output, a loss on the second document reaches only the embeddings of its own tokens.
    if name == "llama":
        targets = torch.full_like(tokens, -100)
        targets[0, 6] = 1
        model.loss(tokens, targets, cu_seqlens=cu_seqlens).backward()
        touched = model.embedding_weight.grad.abs().sum(1).nonzero().flatten().tolist()
        assert set(touched) == set(flat[5:7].tolist())


def test_reported_loss_is_the_cross_entropy_of_the_models_own_logits():
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    targets[1, 8:] = -100
    for name in CONFIGS:
        model = make(name)
        logits = model(tokens).detach().double().flatten(0, 1)
        each = F.cross_entropy(logits, targets.flatten(), reduction="none")
        loss, stats = model.loss(tokens, targets, return_stats=True)
        assert loss.item() == pytest.approx((each.sum() / 24).item(), rel=1e-5)
        assert model.loss(tokens, targets, divisor=48.0).item() == pytest.approx((each.sum() / 48).item(), rel=1e-5)
        torch.testing.assert_close(stats.losses.double(), each, rtol=1e-4, atol=1e-4)
        assert torch.equal(stats.correct, (logits.argmax(1) == targets.flatten()) & (targets.flatten() != -100))
    with pytest.raises(UserError, match="targets must have the shape"):
        model.loss(tokens, targets[:1])


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_one_batch_can_be_overfitted(name):
    model = Model(CONFIGS[name])
    tokens = random_tokens(2, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss = math.inf
    for _ in range(150):
        optimizer.zero_grad()
        result = model.loss(tokens[:, :-1], tokens[:, 1:])
        result.backward()
        optimizer.step()
        loss = result.item()
        if loss < 0.05:
            break
    assert loss < 0.1


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_the_number_of_threads_changes_no_bit_of_loss_and_gradients(name):
    tokens = random_tokens(3, 20)
    runs = []
    for threads in (1, 3):
        model = make(name)
        with runtime.use(threads=threads):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        runs.append((loss.detach(), {key: parameter.grad for key, parameter in model.named_parameters()}))
    assert torch.equal(runs[0][0], runs[1][0])
    for key, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][key]), key


def test_initial_weights_depend_on_the_seed_only():
    config = CONFIGS["gpt2"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Model(config, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = Model(config, seed=3).state_dict()
    finally:
        torch.set_num_threads(threads)
    other = Model(config, seed=4).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name])


def test_initial_weights_have_the_documented_spread_and_the_loss_is_that_of_a_guess():
    model = Model(ModelConfig(vocab_size=512, embed_dim=128, num_layers=8, num_heads=4, max_seq_len=64))
    weights = model.state_dict()
    assert weights["model.layers.3.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert weights[f"model.layers.3.{name}.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert weights["model.norm.weight"].eq(1).all()
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])
    tokens = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(512), rel=0.02)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_backward_in_another_thread_keeps_the_backend_of_the_forward_pass(name, recompute):
    """On a GPU autograd has a thread of its own, and with `recompute` the forward pass runs there a second time."""
    model = Model(CONFIGS[name])
    model.recompute = recompute
    tokens = random_tokens(2, 12)
    with runtime.profiler.record() as recording:
        with runtime.use(backend="torch"):
            loss = model.loss(tokens, tokens)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {kernel.backend for kernel in recording.kernels()} == {"torch"}


def test_tied_embeddings_are_one_tensor():
    tied, untied = Model(CONFIGS["gpt2"]), Model(CONFIGS["llama"])
    assert tied.output_weight is tied.embedding_weight and "lm_head.weight" not in tied.state_dict()
    assert untied.output_weight is untied.lm_head.weight and "lm_head.weight" in untied.state_dict()


def test_wrong_inputs_are_refused_with_advice():
    model = make("llama")
    tokens = random_tokens(1, 12)
    with pytest.raises(UserError, match="longer than the model's context of 24"):
        model(random_tokens(1, 25))
    with pytest.raises(UserError, match="must be \\(batch, tokens\\)"):
        model(tokens[0])
    with pytest.raises(UserError, match="cu_seqlens must rise from 0 to the number of tokens 12"):
        model(tokens, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(UserError, match="a document of 48 tokens"):
        model(random_tokens(4, 12), cu_seqlens=torch.tensor([0, 48], dtype=torch.int32))
    with pytest.raises(UserError, match="cannot hold packed documents"):
        model(tokens, cache=model.make_cache(1), cu_seqlens=torch.tensor([0, 12], dtype=torch.int32))


def test_summary_lists_every_parameter_once_and_its_counts_add_up():
    for name in CONFIGS:
        model = Model(CONFIGS[name])
        lines = model.summary().splitlines()
        counts = [int(line.split()[-1].replace(",", "")) for line in lines[1:]]
        assert sum(counts[:-1]) == counts[-1] == model.num_parameters()
        assert f"{model.num_parameters():,} parameters" in repr(model)
