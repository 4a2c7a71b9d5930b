"""Which device a setting means, what is computed again to fit, and what an allocation that fails says."""

import pytest
import torch

from cllm import Model, ModelConfig, runtime
from cllm.model import memory
from cllm.model.memory import RECOMPUTE, predict
from cllm.runtime import device

SIZES = {"vocab_size": 97, "embed_dim": 32, "num_layers": 3, "num_heads": 4, "ffn_dim": 64, "max_seq_len": 64}
FAMILIES = {
    "cllm": SIZES,
    "gpt2": SIZES | {"norm": "layer", "position": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True},
}


def test_without_a_gpu_auto_is_the_cpu_and_cuda_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.resolve("auto")[0] == device.resolve("cpu")[0] == torch.device("cpu")
    with pytest.raises(runtime.UserError, match=r"--device cuda: .*GPU.*--device cpu"):
        device.resolve("cuda")
    with pytest.raises(runtime.UserError, match=r"one of auto, cpu, cuda, got 'tpu'"):
        device.resolve("tpu")


@pytest.fixture
def three_gpus(monkeypatch):
    """GPUs of which only the chosen one may be touched: whatever torch does on another one takes memory there."""
    taken = []
    device._freest_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: pytest.fail(f"a context is made on GPU {index}"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"GPU {place.index}")
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    yield taken
    device._freest_gpu.cache_clear()


def test_of_several_gpus_the_one_with_most_free_memory_is_taken_and_made_the_current_one(monkeypatch, three_gpus):
    monkeypatch.setattr(runtime.nvml, "free_memory", lambda index: [5 << 30, 70 << 30, None][index])
    found, why = device.resolve("auto")
    assert found == torch.device("cuda", 1) and why == "GPU 1, 70 GiB free, the most of 3 GPUs"
    assert three_gpus == [found]
    monkeypatch.setattr(runtime.nvml, "free_memory", lambda index: [50 << 30, 3 << 30, None][index])
    assert device.resolve("cuda") == (found, why)  # what the process itself has taken meanwhile moves it nowhere


def test_where_free_memory_is_not_known_the_first_gpu_is_taken_and_it_is_said_how_to_choose(monkeypatch, three_gpus):
    monkeypatch.setattr(runtime.nvml, "free_memory", lambda index: None)
    found, why = device.resolve("cuda")
    assert found == torch.device("cuda", 0) and "CUDA_VISIBLE_DEVICES" in why
    assert three_gpus == [found]


def test_a_process_of_torchrun_takes_the_gpu_of_its_rank_and_touches_no_other(monkeypatch, three_gpus):
    from cllm.distributed import session

    assert session._place("auto", 2, 3) == (torch.device("cuda", 2), "cpu:gloo,cuda:nccl")
    assert three_gpus == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_again_changes_no_bit(family):
    model = Model(ModelConfig(**FAMILIES[family]))
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 97, (2, 16), generator=generator) for _ in range(2))
    found = []
    for model.recompute in RECOMPUTE:
        model.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for again in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], again))


def test_blocks_computed_again_are_not_kept():
    model = Model(ModelConfig(**SIZES))
    tokens = torch.zeros((2, 16), dtype=torch.int64)
    kept = {}
    for model.recompute in RECOMPUTE:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):  # noqa: B023
            model.loss(tokens, tokens)
        kept[model.recompute] = sum(sizes)
    assert kept["blocks"] < kept["feed_forward"] < kept["none"], kept


def test_auto_computes_again_only_as_much_as_the_memory_asks_for(monkeypatch):
    config = ModelConfig.preset("cllm-125m")
    needed = {choice: predict(config, 32, 1024, "bf16", choice).total for choice in RECOMPUTE}
    assert needed["none"] > needed["feed_forward"] > needed["blocks"]
    for choice in RECOMPUTE:
        monkeypatch.setattr(memory, "free_memory", lambda where, choice=choice: int(needed[choice] / memory.RESERVE) + 1)
        assert memory.choose_recompute("auto", config, 32, 1024, "bf16", torch.device("cpu"))[0] == choice
    monkeypatch.setattr(memory, "free_memory", lambda where: 1)
    choice, why = memory.choose_recompute("auto", config, 32, 1024, "bf16", torch.device("cpu"))
    assert choice == "blocks" and "more than" in why
    assert memory.choose_recompute("none", config, 32, 1024, "bf16", torch.device("cpu")) == ("none", "asked for")


@pytest.mark.parametrize("run", [{"average": True}, {"optimizer": "lion"}, {"background_checkpoint": True}])
def test_auto_counts_everything_that_the_run_keeps(run, monkeypatch):
    config, cpu = ModelConfig.preset("cllm-125m"), torch.device("cpu")
    needed, plain = (predict(config, 32, 1024, "bf16", "none", **options).total for options in (run, {}))
    assert needed != plain
    for extra, choice in ((1, "none"), (-1, "feed_forward")):
        monkeypatch.setattr(memory, "free_memory", lambda where, extra=extra: int(needed / memory.RESERVE) + 2 * extra)
        assert memory.choose_recompute("auto", config, 32, 1024, "bf16", cpu, **run)[0] == choice


def test_on_a_gpu_the_logits_are_those_of_its_kernels_and_the_copy_of_a_checkpoint_lies_elsewhere():
    config, gpu = ModelConfig.preset("cllm-125m"), torch.device("cuda", 0)
    tokens, matrix = 32 * 1024, config.vocab_size * config.embed_dim
    with runtime.gpu.described(runtime.gpu.DESCRIBED["h200"]):
        there = predict(config, 32, 1024, "bf16", background_checkpoint=True, device=gpu)
        chunk = there.logit_rows * config.vocab_size * 2
        assert there.checkpoint == 0 and there.logit_rows < tokens  # several chunks
        assert chunk <= 1 << 30 < 2 * chunk + chunk  # the budget of the kernels, nearly used up
        assert there.logits == chunk + (3 * 4 + 2) * matrix
        assert f"{there.logit_rows:,} rows" in {name: what for name, _, what in there.rows()}["logits"]
    with runtime.gpu.described(runtime.gpu.DESCRIBED["rtx4090"]):
        assert predict(config, 32, 1024, "bf16", device=gpu).logit_rows < there.logit_rows  # of the memory that it has
    here = predict(config, 32, 1024, "bf16", background_checkpoint=True)
    assert here.checkpoint and here.logits < there.logits


def test_an_allocation_that_fails_names_the_largest_consumers_and_what_helps():
    config = ModelConfig.preset("cllm-125m")
    expected = r"out of memory.*most of it for .* GB, .* GB.*--batch-size 16 with twice the --grad-accum.*train.recompute=blocks.*--seq-len 512"
    with pytest.raises(runtime.UserError, match=expected), memory.explained_out_of_memory(config, 32, 1024, "bf16", "none"):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="something else"), memory.explained_out_of_memory(config, 1, 1, "fp32", "none"):
        raise RuntimeError("something else")


def test_a_model_that_cannot_fit_is_refused_before_it_is_made():
    memory.check_weights_fit(ModelConfig(**SIZES))
    with pytest.raises(
        runtime.UserError, match=r"^the weights of this model \([\d,]+ parameters\) need [\d,.]+ GB, and [\d,.]+ GB of memory are free\. "
    ):
        memory.check_weights_fit(ModelConfig(**SIZES | {"ffn_dim": 10**14}))
