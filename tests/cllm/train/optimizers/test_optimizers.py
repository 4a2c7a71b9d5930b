"""Muon, Lion and schedule-free AdamW: the numbers of their papers in float64, states that go on bit by bit, the same bits for any threads."""

import importlib.util
import math

import pytest
import torch

pytest.importorskip("numba")

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.config.schema import OPTIMIZERS
from cllm.kernels.muon import MuonAgain
from cllm.kernels.numba import muon
from cllm.model.memory import predict
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, UserError
from cllm.train.optimizers import Lion, Muon, ScheduleFreeAdamW, make_optimizer
from cllm.train.optimizers import muon as muon_optimizer
from cllm.train.optimizers.muon import COEFFICIENTS, NUM_STEPS, orthogonal, orthogonal_together
from cllm.train.optimizers.schedule_free import rounded_root

SHAPES = {"layers.0.wide.weight": (24, 40), "layers.0.tall.weight": (56, 16), "embed_tokens.weight": (30, 24), "norm.weight": (24,)}
RATES = [1e-3, 4e-3, 1e-2, 1e-2, 3e-3, 2e-2]
DECAY, CLIP = 0.1, 2.0


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradients(update):
    """float32 gradients of update number `update`, with a norm well above CLIP at times and below it at others."""
    generator = torch.Generator().manual_seed(100 + update)
    return {name: torch.randn(shape, generator=generator) * 0.03 * (update + 1) for name, shape in SHAPES.items()}


def updated(make, num_updates=len(RATES), params=None, first=0, on_gpu=False):
    params = parameters() if params is None else params
    optimizer = make(params.items())
    apply = updating_on_a_gpu(optimizer) if on_gpu else optimizer.update
    for update in range(first, first + num_updates):
        for name, gradient in gradients(update).items():
            params[name].grad = gradient.clone()
        apply(RATES[update], CLIP)
    return params, optimizer


def updating_on_a_gpu(optimizer):
    """`optimizer.update` by the kernels of a GPU, which Triton's interpreter runs."""
    fused = optimizer.fused()

    def update(rate, max_norm):
        grads = [parameter.grad for parameter in optimizer.parameters.values()]
        hyper = torch.tensor([rate, *optimizer.betas, optimizer.eps, max_norm, 1.0, 1.0, 0.0], dtype=torch.float64)
        state, stats = torch.tensor([optimizer.num_updates, 1.0, 0.0, 0.0], dtype=torch.float64), torch.empty(3)
        fused.measure(grads, hyper, state, stats)
        optimizer.step_fused(fused, grads)
        optimizer.num_updates = int(state[0])
        return stats.tolist()

    return update


INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
# On a CPU, and as on a GPU.
EVERYWHERE = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and its interpreter: with a GPU tests/gpu run"), id="gpu"),
]


def clipped(update):
    """What the paper's formulas are given: float64 gradients, clipped by their global norm."""
    grads = {name: gradient.double() for name, gradient in gradients(update).items()}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in grads.values()))
    factor = min(1.0, CLIP / (norm + 1e-6))
    return {name: gradient * factor for name, gradient in grads.items()}


def weight_decay(name):
    return DECAY if len(SHAPES[name]) == 2 else 0.0


def assert_close(ours, truth, tolerance=2e-6):
    for name, weight in truth.items():
        error = (ours[name].detach().double() - weight.detach()).norm() / weight.detach().norm()
        assert error < tolerance, (name, float(error))
        moved = (weight.detach() - parameters(dtype=torch.float64)[name].detach()).norm() / weight.detach().norm()
        assert moved > 1e-3, name  # a test whose optimizer stands still proves nothing


def test_clipping_is_at_work_in_these_tests():
    norms = [math.sqrt(sum(float(g.square().sum()) for g in gradients(update).values())) for update in range(len(RATES))]
    assert min(norms) < CLIP < max(norms)


@pytest.mark.parametrize("on_gpu", EVERYWHERE)
def test_lion_is_algorithm_2_of_its_paper(on_gpu):
    beta1, beta2 = 0.9, 0.99
    weights = {name: weight.detach() for name, weight in parameters(dtype=torch.float64).items()}
    momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for update, rate in enumerate(RATES):
        for name, g in clipped(update).items():
            c = beta1 * momentum[name] + (1 - beta1) * g
            weights[name] = weights[name] - rate * (torch.sign(c) + weight_decay(name) * weights[name])
            momentum[name] = beta2 * momentum[name] + (1 - beta2) * g
    ours, _ = updated(lambda named: Lion(named, betas=(beta1, beta2), weight_decay=DECAY), on_gpu=on_gpu)
    assert_close(ours, weights)


@pytest.mark.parametrize("on_gpu", EVERYWHERE)
def test_schedule_free_is_algorithm_1_of_its_paper(on_gpu):
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    x = {name: weight.detach() for name, weight in parameters(dtype=torch.float64).items()}
    z, v = dict(x), {name: torch.zeros_like(weight) for name, weight in x.items()}
    y = dict(x)
    total = largest = 0.0
    for update, rate in enumerate(RATES):
        grads = clipped(update)  # at y, wherever it is: the gradients of this test are given
        largest = max(largest, rate)
        total += largest**2
        c = largest**2 / total
        for name, g in grads.items():
            y[name] = (1 - beta1) * z[name] + beta1 * x[name]
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            direction = g / ((v[name] / (1 - beta2 ** (update + 1))).sqrt() + eps) + weight_decay(name) * y[name]
            z[name] = z[name] - rate * direction
            x[name] = (1 - c) * x[name] + c * z[name]
            y[name] = (1 - beta1) * z[name] + beta1 * x[name]
    ours, optimizer = updated(lambda named: ScheduleFreeAdamW(named, betas=(beta1, beta2), eps=eps, weight_decay=DECAY), on_gpu=on_gpu)
    assert_close(ours, y)
    assert_close(optimizer.averages(), x)
    assert_close(optimizer.slots["z"], z)
    with pytest.raises(UserError, match="beta1 > 0"):
        ScheduleFreeAdamW(parameters().items(), betas=(0.0, 0.9))


def test_a_root_is_the_nearest_number_to_the_true_one():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(rounded_root(x), x.double().sqrt().float())  # a float64 root that is rounded again is the nearest float32
    assert rounded_root(torch.tensor(9.0)) == 3.0


def newton_schulz(matrix):
    """The iteration of Jordan et al. 2024, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize(
    ("way", "on_gpu", "tolerance"),
    [("fp32", False, 2e-6), ("widened", False, 5e-3), (None, False, 5e-3), pytest.param("fp32", *EVERYWHERE[1].values, 2e-6)],
)
def test_muon_is_its_papers_update_for_matrices_and_adamw_for_the_rest(monkeypatch, way, on_gpu, tolerance):
    if way is not None:
        monkeypatch.setattr(muon, "way", lambda: way)
    monkeypatch.setattr(muon_optimizer, "multiplies_bf16", lambda device: False)
    momentum = 0.95
    reference = parameters(dtype=torch.float64)
    weights = {name: weight.detach().clone() for name, weight in reference.items() if name.startswith("layers")}
    means = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    rest = [name for name in SHAPES if name not in weights]
    adamw = torch.optim.AdamW([{"params": [reference[name]], "weight_decay": weight_decay(name)} for name in rest], betas=(0.9, 0.95), eps=1e-8)
    for update, rate in enumerate(RATES):
        grads = clipped(update)
        for name in weights:
            means[name] = momentum * means[name] + (1 - momentum) * grads[name]
            u = momentum * means[name] + (1 - momentum) * grads[name]
            scale = 0.2 * math.sqrt(max(SHAPES[name]))
            weights[name] = weights[name] - rate * (scale * newton_schulz(u) + DECAY * weights[name])
        for group, name in zip(adamw.param_groups, rest):
            group["lr"], reference[name].grad = rate, grads[name]
        adamw.step()
    ours, optimizer = updated(lambda named: Muon(named, weight_decay=DECAY, momentum=momentum), on_gpu=on_gpu)
    assert_close(ours, weights | {name: reference[name] for name in rest}, tolerance)
    assert set(optimizer.slots["momentum"]) == set(weights) and set(optimizer.slots["exp_avg"]) == set(rest)


def test_muon_moves_matrices_as_torch_does_up_to_its_bfloat16():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    names = [name for name in SHAPES if name.startswith("layers")]
    theirs = {name: weight for name, weight in parameters().items() if name in names}
    reference = torch.optim.Muon(theirs.values(), weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = {name: weight.detach().clone() for name, weight in theirs.items()}
    for update, rate in enumerate(RATES):
        for name in names:
            theirs[name].grad = clipped(update)[name].float()
        reference.param_groups[0]["lr"] = rate
        reference.step()
    ours, _ = updated(lambda named: Muon(named, weight_decay=DECAY))
    for name in names:
        moved = theirs[name].detach() - before[name]
        assert (ours[name].detach() - theirs[name].detach()).norm() < 0.02 * moved.norm(), name


@pytest.mark.parametrize("shape", [(17, 64), (64, 17), (33, 33), (1, 9)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert (len(COEFFICIENTS), NUM_STEPS) == (3, 5)
    found = orthogonal(matrix)
    assert found.shape == matrix.shape
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    core = u.T @ found.double() @ v.T  # diagonal: the singular vectors are the matrix's own
    assert (core - torch.diag(core.diag())).abs().max() < 1e-3
    assert not orthogonal(torch.zeros(4, 6)).any()


def jordan(matrix):
    """The iteration in bfloat16, as its author publishes it."""
    a, b, c = COEFFICIENTS
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(NUM_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).double()


# One and several blocks of a panel, sizes that are no multiple of a vector's, groups of several matrices, and both ways round.
TOGETHER = [(1, 9), (17, 64), (64, 17), (33, 33), (130, 200), (352, 128), (96, 300), (5, 5), (128, 128)]


@pytest.mark.parametrize("way", ["fp32", "widened", None])  # bfloat16 is forced where the processor has no products of it, and has its own
@pytest.mark.parametrize("group_bytes", [1, 1 << 20, 1 << 30])
def test_muon_of_many_matrices_at_once_is_as_near_to_the_truth_as_the_original(monkeypatch, way, group_bytes):
    monkeypatch.setattr(muon, "GROUP_BYTES", group_bytes)
    if way is not None:
        monkeypatch.setattr(muon, "way", lambda: way)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator) for shape in TOGETHER]
    ends = []
    for threads in (1, 3, 64):
        params = [torch.zeros(shape) for shape in TOGETHER]
        with runtime.use(threads=threads, backend="numba"):
            update = MuonAgain(COEFFICIENTS, NUM_STEPS)
            served = update.call(
                params, grads, [torch.zeros_like(each) for each in params],
                learning_rate=1.0, momentum=0.0, weight_decays=[0.0] * len(params), clip=0.5,
            )  # fmt: skip
        assert served
        ends.append(params)
    assert all(torch.equal(found, expected) for end in ends[1:] for found, expected in zip(end, ends[0]))
    for shape, grad, param in zip(TOGETHER, grads, ends[0]):
        truth, found = newton_schulz(grad), -param.double() / (0.2 * math.sqrt(max(shape)))
        error, theirs = ((each - truth).norm() / truth.norm() for each in (found, jordan(grad)))
        assert error < (3e-6 if way == "fp32" else 2 * theirs + 2**-8), (shape, float(error), float(theirs))


@pytest.mark.parametrize("half", [True, False])
def test_muon_of_matrices_of_one_shape_together_is_as_near_to_the_truth_as_the_original(monkeypatch, half):
    """What a GPU computes, here by the CPU's operations."""
    monkeypatch.setattr(muon_optimizer, "multiplies_bf16", lambda device: half)
    for shape in TOGETHER:
        grads = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
        for grad, found in zip(grads, orthogonal_together(grads)):
            truth = newton_schulz(grad)
            error, theirs = ((each.double() - truth).norm() / truth.norm() for each in (found, jordan(grad)))
            assert error < (2 * theirs + 2**-8 if half else 1e-5), (shape, float(error), float(theirs))
    assert not orthogonal_together(torch.zeros(2, 4, 6)).any()


def test_muon_in_groups_is_muon_one_by_one(monkeypatch):
    monkeypatch.setattr(muon_optimizer, "multiplies_bf16", lambda device: False)
    named = {f"{n}.{shape}": torch.empty(shape) for n in range(3) for shape in ((24, 40), (56, 16))}
    monkeypatch.setattr(muon_optimizer, "GROUP_ELEMENTS", 2 * 24 * 40)
    groups = muon_optimizer._groups(named)
    assert sorted(name for group in groups for name in group) == sorted(named) and sorted(map(len, groups)) == [1, 1, 2, 2]

    def together(named):
        optimizer = Muon(named, weight_decay=DECAY)
        optimizer.step_clipped = lambda names, grads, clip, rate: [  # as on a GPU
            optimizer._step_together([name], [grad], clip, rate) if name in optimizer.slots["momentum"]
            else optimizer.adamw.step([(name, grad * clip)], rate) for name, grad in zip(names, grads)
        ]  # fmt: skip
        return optimizer

    def one_by_one(named):
        optimizer = Muon(named, weight_decay=DECAY)
        optimizer._again.call = lambda *args, **numbers: False
        return optimizer

    (ours, _), (theirs, reference) = updated(together, 2), updated(one_by_one, 2)
    for name in reference.slots["momentum"]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_muon_at_once_leaves_zero_gradients_alone_and_takes_those_of_bfloat16():
    params = [torch.ones(8, 24), torch.ones(24, 8)]
    update, momenta = MuonAgain(COEFFICIENTS, NUM_STEPS), [torch.zeros_like(each) for each in params]
    options = {"learning_rate": 1.0, "momentum": 0.95, "weight_decays": [0.0, 0.0], "clip": 1.0}
    grads = [torch.zeros(8, 24), torch.randn(24, 8, generator=torch.Generator().manual_seed(0)).bfloat16()]
    assert update.call(params, grads, momenta, **options)
    assert (params[0] == 1).all() and (params[1] != 1).all()
    assert torch.equal(momenta[1], grads[1].float() * torch.tensor(1 - 0.95))
    assert not update.call(params, [each.double() for each in grads], momenta, **options)
    assert not update.call(params, [grads[0].T.contiguous().T, grads[1]], momenta, **options)


AT_ONCE = {"wide.weight": (130, 257), "norm.weight": (37,), "scalar": (), "empty.weight": (0, 3)}  # several blocks, and ends of all lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lion", "schedule_free"])
def test_an_update_of_all_tensors_at_once_has_the_bits_of_the_plain_operations(name, dtype):
    generator = torch.Generator().manual_seed(3)
    start = {key: torch.randn(shape, generator=generator) for key, shape in AT_ONCE.items()}
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-42, 3e18, -1e-8])  # whose squares are 0, denormal or infinite
    ends = []
    for threads in (1, 3, 0):  # the last one by plain operations
        params = {key: torch.nn.Parameter(each.clone()) for key, each in start.items()}
        with runtime.use(threads=threads or 1, backend="numba"):
            optimizer = make(name, params.items())
            served, again = [], optimizer._again.call
            optimizer._again.call = lambda *args, **numbers: served.append(bool(threads) and again(*args, **numbers)) or served[-1]  # noqa: B023
            draws = torch.Generator().manual_seed(4)
            for rate, clip in ((1e-2, 1.0), (0.0, 0.7), (3e-3, 1e-3), (1e-2, 1.0)):
                grads = [torch.randn(shape, generator=draws) for shape in AT_ONCE.values()]
                grads[0].view(-1)[-6:] = grads[1][:6] = special
                with torch.no_grad():
                    optimizer.step_clipped(list(params), [each.to(dtype) for each in grads], clip, rate)
                optimizer.num_updates += 1
        assert served == [bool(threads)] * 4
        ends.append([each.detach().view(-1).view(torch.int32) for each in (*params.values(), *optimizer.state_dict().values()) if each.dim()])
    assert all(torch.equal(found, expected) for end in ends[:2] for found, expected in zip(end, ends[2], strict=True))
    assert not torch.equal(ends[2][0], start["wide.weight"].view(-1).view(torch.int32))


@pytest.mark.parametrize("name", ["lion", "schedule_free"])
def test_what_an_update_at_once_does_not_serve_runs_by_plain_operations(name):
    ends = []
    for served in (True, False):
        params = {key: torch.nn.Parameter(each.detach().clone()) for key, each in parameters().items()}
        if not served:
            wide = params["layers.0.wide.weight"]
            wide.data = wide.data.T.contiguous().T
        optimizer = make(name, params.items())
        for update in range(3):
            for key, gradient in gradients(update).items():
                params[key].grad = gradient
            optimizer.update(RATES[update], CLIP)
        assert bool(optimizer._again._key) == served
        ends.append(params)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_matrices_of_both_families_go_to_muon_and_their_tables_to_adamw():
    for norm in ("rms", "layer"):
        sizes = {"vocab_size": 32, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 8, "tie_embeddings": norm == "layer"}
        model = Model(ModelConfig(**sizes, norm=norm, **({"bigram_rows": 20, "trigram_rows": 24} if norm == "rms" else {})))
        optimizer = Muon(model.named_parameters())
        inside = {name for name, parameter in model.named_parameters() if parameter.dim() == 2 and (".h." in name or ".layers." in name)}
        assert set(optimizer.slots["momentum"]) == inside and inside
        assert len(inside) + len(optimizer.slots["exp_avg"]) == len(list(model.named_parameters()))
        kept = sum(tensor.numel() for tensors in optimizer.slots.values() for tensor in tensors.values())
        vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)  # which are predicted as Muon's
        assert predict(model.config, 1, 8, optimizer="muon").optimizer == 4 * (kept - vectors)


def make(name, named):
    return make_optimizer(name, named, betas=(0.9, 0.95), weight_decay=DECAY)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stored_state_continues_with_the_same_bits(name, tmp_path):
    from cllm.checkpoint.safetensors import read_safetensors, write_safetensors

    straight, whole = updated(lambda named: make(name, named))
    params, first = updated(lambda named: make(name, named), num_updates=3)
    write_safetensors(tmp_path / "state", first.state_dict(), {})
    resumed = parameters(seed=7)
    second = make(name, resumed.items())
    second.load_state_dict(read_safetensors(tmp_path / "state")[0])
    with torch.no_grad():
        for key in resumed:
            resumed[key].copy_(params[key])
    for update in range(3, len(RATES)):
        for key, gradient in gradients(update).items():
            resumed[key].grad = gradient
        second.update(RATES[update], CLIP)
    assert second.num_updates == whole.num_updates == len(RATES)
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
    stored, expected = second.state_dict(), whole.state_dict()
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
    assert {tensor.dtype for key, tensor in stored.items() if "." in key} == {torch.float32}


@pytest.mark.parametrize("on_gpu", EVERYWHERE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_non_finite_gradient_changes_nothing_at_all(name, on_gpu):
    params, optimizer = updated(lambda named: make(name, named), num_updates=2)
    weights = {key: param.detach().clone() for key, param in params.items()}
    state = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    for key, gradient in gradients(2).items():
        params[key].grad = gradient
    params["norm.weight"].grad[3] = math.inf
    norm, _, nonfinite = (updating_on_a_gpu(optimizer) if on_gpu else optimizer.update)(1e-2, CLIP)
    assert nonfinite == 1 and not math.isfinite(norm)
    assert all(torch.equal(params[key], weights[key]) for key in weights)
    assert all(torch.equal(tensor, state[key]) for key, tensor in optimizer.state_dict().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_stays(name):
    params = parameters()
    optimizer = make(name, params.items())
    before = params["layers.0.wide.weight"].detach().clone()
    for key, gradient in gradients(0).items():
        params[key].grad = None if key == "layers.0.wide.weight" else gradient
    optimizer.update(1e-2)
    assert torch.equal(params["layers.0.wide.weight"], before) and optimizer.num_updates == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_number_of_threads_never_changes_a_bit(name):
    shapes = {"layers.0.odd.weight": (331, 517), "embed_tokens.weight": (997, 331), "norm.weight": (100_003,)}
    results = []
    for threads in (1, 2, 3, 7):
        with runtime.use(threads=threads):
            generator = torch.Generator().manual_seed(0)
            params = {key: torch.nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in shapes.items()}
            optimizer = make(name, params.items())
            for _ in range(3):
                for param in params.values():
                    param.grad = torch.randn(param.shape, generator=generator)
                optimizer.update(1e-2, 1.0)
            results.append([*params.values(), *optimizer.state_dict().values(), *(optimizer.averages() or {}).values()])
    assert all(torch.equal(found, expected) for result in results[1:] for found, expected in zip(result, results[0]))


def test_the_state_of_another_optimizer_is_refused():
    state = make("lion", parameters().items()).state_dict()
    with pytest.raises(CheckpointError, match="does not fit this model and optimizer"):
        make("muon", parameters().items()).load_state_dict(state)
    with pytest.raises(UserError, match="optimizer must be one of adamw, muon, lion, schedule_free, got 'adam'"):
        make("adam", parameters().items())
