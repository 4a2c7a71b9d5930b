"""AdamW: the update itself, who is decayed, and a state that survives a checkpoint bit by bit."""

import pytest
import torch

from cllm.config.model import ModelConfig
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, UserError
from cllm.train.optimizers import AdamW


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (4, 6), "bias": (6,), "table": (5, 3)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def set_gradients(params, scale=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = scale * torch.randn(param.shape, generator=generator)


def test_several_updates_are_those_of_torch_adamw_with_clipping():
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours.items(), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    groups = [{"params": [theirs["matrix"], theirs["table"]], "weight_decay": 0.1}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
    for update in range(5):
        set_gradients(ours, 3.0, update)
        set_gradients(theirs, 3.0, update)
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (update + 1)
        reference.step()
        norm, _, nonfinite = optimizer.update(1e-2 / (update + 1), max_norm=1.0)
        assert norm == pytest.approx(float(expected), rel=1e-5) and nonfinite == 0
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert optimizer.num_updates == 5


def test_matrices_and_embeddings_are_decayed_and_vectors_are_not():
    model = Model(ModelConfig(vocab_size=32, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=8, norm="layer"))
    optimizer = AdamW(model.named_parameters(), weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.update(0.1)
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.dim() >= 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
    decayed = {name for name, decay in optimizer.decays.items() if decay}
    assert "transformer.wte.weight" in decayed and not any(name.endswith("bias") or "ln_" in name for name in decayed)


def test_a_non_finite_gradient_changes_nothing_and_is_counted():
    params = parameters()
    optimizer = AdamW(params.items())
    set_gradients(params)
    params["bias"].grad[2] = float("inf")
    params["bias"].grad[3] = float("nan")
    before = {name: param.detach().clone() for name, param in params.items()}
    _, _, nonfinite = optimizer.update(0.1, max_norm=1.0)
    assert nonfinite == 2 and optimizer.num_updates == 0
    assert all(torch.equal(param, before[name]) for name, param in params.items())
    assert not any(tensor.any() for tensor in optimizer.exp_avg.values())


def test_a_stored_state_continues_with_the_same_bits(tmp_path):
    from cllm.checkpoint.safetensors import read_safetensors, write_safetensors

    straight, first, second = parameters(), parameters(), parameters(seed=9)
    a, b, c = (AdamW(params.items()) for params in (straight, first, second))
    for update in range(4):
        set_gradients(straight, seed=update)
        a.update(1e-2)
    for update in range(2):
        set_gradients(first, seed=update)
        b.update(1e-2)
    write_safetensors(tmp_path / "state", b.state_dict(), {})
    c.load_state_dict(read_safetensors(tmp_path / "state")[0])
    with torch.no_grad():
        for name in second:
            second[name].copy_(first[name])
    for update in range(2, 4):
        set_gradients(second, seed=update)
        c.update(1e-2)
    assert all(torch.equal(straight[name], second[name]) for name in straight)
    assert c.num_updates == 4


def test_the_state_of_another_model_is_refused():
    optimizer = AdamW(parameters().items())
    with pytest.raises(CheckpointError, match="does not fit"):
        optimizer.load_state_dict({"num_updates": torch.tensor(1)})
    wrong = {**optimizer.state_dict(), "exp_avg.bias": torch.zeros(7)}
    with pytest.raises(CheckpointError, match=r"exp_avg.bias has shape \(7,\)"):
        optimizer.load_state_dict(wrong)
    with pytest.raises(UserError, match="no trainable parameters"):
        AdamW([])
