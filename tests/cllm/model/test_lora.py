"""LoRA: the gradient of the adapters, what trains, merging, and checkpoints that hold the adapters alone."""

import json

import pytest
import torch

from cllm import load, runtime, save
from cllm.checkpoint.weights import load_weights, weights_of
from cllm.config.lora import LoraConfig
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.interop.hf import save_hf
from cllm.model.lora import add_lora, lora_of, merge_lora
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, DataError, UserError
from cllm.train.finetune import adapt, start
from cllm.train.step import TrainStep
from cllm.train.trainer import Trainer

TEXT = "the quick brown fox jumps over the lazy dog. " * 120
SHAPE = {"vocab_size": 320, "embed_dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
FAMILIES = {"llama": {}, "qwen3": {"qk_norm": True, "num_kv_heads": 1, "bigram_rows": 40}, "gpt2": {"norm": "layer"}}


@pytest.fixture(autouse=True)
def one_thread():
    with runtime.use(threads=1):
        yield


def batch():
    ids = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_begin_at_nothing_alone_train_and_merge_to_the_same_logits(family):
    model = Model(ModelConfig(**SHAPE, **FAMILIES[family]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens, targets = batch()
    with torch.no_grad():
        plain = model(tokens)
    add_lora(model, LoraConfig(rank=4))
    with torch.no_grad():
        assert torch.equal(model(tokens), plain)
    step = TrainStep(model, learning_rate=1e-2)
    losses = [float(step(tokens, targets)) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        adapted = model(tokens)
    small = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in small)
    assert len(small) == 2 * 2 * (4 if family == "gpt2" else 7)
    merge_lora(model)
    assert lora_of(model) is None and set(model.state_dict()) == set(before)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), adapted, rtol=1e-5, atol=1e-6)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name.replace(".lora_A.weight", ".weight") for name in small if "lora_A" in name}

    again = Model(ModelConfig(**SHAPE, **FAMILIES[family]))
    load_weights(add_lora(again, LoraConfig(rank=4), seed=9), small, "test")
    with torch.no_grad():
        assert torch.equal(again(tokens), adapted)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_weights(add_lora(Model(ModelConfig(**SHAPE, **FAMILIES[family])), LoraConfig(rank=4, targets="attention")), small, "test")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_of_the_adapters_is_the_slope_of_the_loss(family):
    model = add_lora(Model(ModelConfig(**SHAPE, **FAMILIES[family])), LoraConfig(rank=2, alpha=5.0)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in weights_of(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3)
    tokens, targets = batch()
    model.loss(tokens, targets).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    for parameter in trained[::5]:
        slope, values = float(parameter.grad[1, 1]), []
        with torch.no_grad():
            for change in (1e-5, -2e-5):
                parameter[1, 1] += change
                values.append(float(model.loss(tokens, targets)))
            parameter[1, 1] += 1e-5
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-10)


def test_wrong_ranks_and_targets_are_refused():
    for change, message in (({"rank": 0}, "at least 1"), ({"rank": 33}, "at most 32"), ({"rank": 2, "targets": "mlp"}, "all, attention")):
        with pytest.raises(UserError, match=message):
            add_lora(Model(ModelConfig(**SHAPE)), LoraConfig(**change))
    with pytest.raises(UserError, match="already"):
        add_lora(add_lora(Model(ModelConfig(**SHAPE)), LoraConfig(2)), LoraConfig(2))
    with pytest.raises(UserError, match="lora_rank needs a model"):
        start(TrainConfig(lora_rank=4), None)


def test_a_sequence_that_is_longer_than_the_context_of_the_given_model_is_refused_with_the_model(tmp_path):
    save(Model(ModelConfig(**SHAPE)), tmp_path / "start.cllm", Tokenizer.train(["some words"], kind="char"))
    config = TrainConfig.from_layers(flags={"start_from": str(tmp_path / "start.cllm"), "seq_len": "10000"})
    with pytest.raises(UserError, match=r"^seq_len must be <= the model's max_seq_len \(\d+\), got 10000 \(from --seq-len\)\.$"):
        start(config, tmp_path / "run")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("lora")
    tokenizer = Tokenizer.train([TEXT], vocab_size=320)
    save(Model(ModelConfig(**SHAPE)), folder / "start.cllm", tokenizer=tokenizer)
    (folder / "text.txt").write_text(TEXT)
    return folder


def train(place, out, steps=6, stop_after=None, **settings):
    """What `cllm train --from` does; with `stop_after` the run ends there as if it had been killed after that step's checkpoint."""
    config = TrainConfig(
        start_from=str(place / "start.cllm"), steps=steps, seq_len=16, batch_size=2, checkpoint_every=2, eval_every=100, learning_rate=1e-2,
        warmup=0, tensorboard=False, precision="fp32", **settings,
    )  # fmt: skip
    config, model, tokenizer = start(config, out)
    dataset = prepare(place / "text.txt", place / "data", tokenizer=tokenizer)
    trainer = Trainer(adapt(config, model, tokenizer, out), dataset, config, out=out, tokenizer=tokenizer)
    if stop_after is not None:
        record = trainer._record

        def killed(result):
            record(result)
            if trainer.step == stop_after + 1:
                raise KeyboardInterrupt

        trainer._record = killed
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        return None
    return trainer.fit()


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "all weights"])
def test_a_resumed_run_from_a_model_gives_the_same_bits(place, tmp_path, rank):
    train(place, tmp_path / "whole", lora_rank=rank)
    train(place, tmp_path / "cut", lora_rank=rank, stop_after=4)
    assert train(place, tmp_path / "cut", lora_rank=rank).resumed_from == 4
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = ((tmp_path / run / "checkpoints" / "step-00000006" / name).read_bytes() for run in ("whole", "cut"))
        assert one == two
    started, _ = load(place / "start.cllm")
    trained, tokenizer = load(tmp_path / "whole")
    assert tokenizer is not None and lora_of(trained) is None
    same = [torch.equal(a, b) for a, b in zip(started.state_dict().values(), trained.state_dict().values())]
    assert any(same) == bool(rank) and not all(same)


def test_a_lora_run_is_whole_by_itself_and_says_what_is_missing(place, tmp_path):
    train(place, tmp_path / "run", lora_rank=4)
    moved = tmp_path / "elsewhere"
    (tmp_path / "run").rename(moved)
    newest = moved / "checkpoints" / "step-00000006"
    size = (newest / "model.safetensors").stat().st_size
    assert size < (moved / "base.cllm").stat().st_size / 4
    assert json.loads((newest / "state.json").read_text())["lora"]["rank"] == 4
    model, _ = load(moved)
    save(model, tmp_path / "merged.cllm")
    merged, _ = load(tmp_path / "merged.cllm")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), merged.state_dict().values()))
    save(Model(ModelConfig(**SHAPE), seed=5), moved / "base.cllm")
    with pytest.raises(CheckpointError, match="not the file that the adapters"):
        load(moved)
    (moved / "base.cllm").unlink()
    with pytest.raises(CheckpointError, match=r"are missing: .*base\.cllm"):
        load(moved)


def test_another_model_other_sizes_or_another_tokenizer_are_refused(place, tmp_path):
    train(place, tmp_path / "run", steps=2)
    with pytest.raises(UserError, match="holds a run without LoRA"):
        train(place, tmp_path / "run", steps=2, lora_rank=4)
    train(place, tmp_path / "lora", steps=2, lora_rank=4)
    for rank, message in ((0, "lora_rank: 4 there, 0 here"), (8, "lora_rank: 4 there, 8 here")):
        with pytest.raises(UserError, match=message):
            train(place, tmp_path / "lora", steps=2, lora_rank=rank)
    refused = {"embed_dim": (64, "embed_dim=64 .the model has 32"), "tokenizer": ("char", "tokenizer='char'"), "preset": ("cllm-1m", "preset")}
    for setting, (value, message) in refused.items():
        with pytest.raises(UserError, match=message):
            train(place, tmp_path / "new", **{setting: value})
    assert not (tmp_path / "new").exists()


def test_a_hugging_face_folder_in_half_precision_is_trained_on_in_float32(place, tmp_path):
    model, tokenizer = load(place / "start.cllm")
    save_hf(model, tmp_path / "hf", tokenizer, dtype=torch.bfloat16)
    config = TrainConfig(start_from=str(tmp_path / "hf"), steps=3)
    config, started, found = start(config, tmp_path / "run")
    assert found.hash == tokenizer.hash and started.embedding_weight.dtype == torch.float32
    assert config.train.seq_len == 32 and "the model's context" in config.sources["train.seq_len"]
    plain = TrainConfig(steps=3).resolve(model.config, 10).optim.learning_rate
    assert config.optim.learning_rate == pytest.approx(plain / 10, rel=0.01)
    save(model, tmp_path / "bare.cllm")
    with pytest.raises(DataError, match="holds no tokenizer"):
        start(TrainConfig(start_from=str(tmp_path / "bare.cllm")), tmp_path / "run")
    with pytest.raises(CheckpointError, match="does not exist"):
        start(TrainConfig(start_from=str(tmp_path / "nowhere")), tmp_path / "run")
