"""How a run is divided over processes: every row of a weight in one place of each copy, and settings that cannot be divided are refused."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm.config.train import TrainConfig
from cllm.distributed.sharding import Sharding
from cllm.runtime.errors import UserError
from cllm.train.build import divide


@dataclasses.dataclass
class World:
    """As much of the processes of a run as dividing the work asks for."""

    size: int
    rank: int = 0
    local_size: int = 2


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 3))
def test_rows_are_cut_as_torch_chunk_cuts_them_in_every_copy(num_rows, shards, copies):
    weight = torch.arange(num_rows)
    chunks = [part.tolist() for part in weight.chunk(shards)]
    for copy in range(copies):
        firsts = [Sharding(copies, shards, copy * shards + place).layout({"w": weight})["w"][1] for place in range(shards)]
        cut = [weight[low:high].tolist() for low, high in zip(firsts, [*firsts[1:], num_rows])]
        assert [part for part in cut if part] == chunks
        assert all(Sharding(copies, shards, copy * shards + place).copy == copy for place in range(shards))


def test_what_is_divided_follows_the_settings():
    assert divide(TrainConfig(), None) == divide(TrainConfig(), World(1)) == (None, None)
    share, sharding = divide(TrainConfig(deterministic=True), None)
    assert share.size == 1 and sharding is None
    share, sharding = divide(TrainConfig(parallel="fsdp"), World(3, rank=2))
    assert (share.rank, share.size) == (2, 3) and sharding == Sharding(1, 3, 2)
    assert divide(TrainConfig(parallel="hybrid"), World(6, rank=5))[1] == Sharding(3, 2, 5)
    assert divide(TrainConfig(parallel="hybrid", shard_size=3), World(6, rank=5))[1] == Sharding(2, 3, 5)
    assert divide(TrainConfig(parallel="ddp"), World(2))[1] is None


@pytest.mark.parametrize("shard_size", [1, 4, 6, None])
def test_hybrid_sharding_needs_several_copies_of_several_processes(shard_size):
    with pytest.raises(UserError, match=r"divide the 6 processes into several copies of at least 2 processes each.*Set train.shard_size"):
        divide(TrainConfig(parallel="hybrid", shard_size=shard_size, batch_size=12), World(6, local_size=6))


@pytest.mark.parametrize("world", [World(2), None])
@pytest.mark.parametrize("asked", ["batch_ramp", "noise_scale_every"])
def test_what_needs_a_process_that_trains_alone_is_refused(world, asked):
    config = TrainConfig(**{asked: 3}, grad_accum=2, deterministic=world is None)
    with pytest.raises(UserError, match=rf"{asked} works in one process that is not deterministic, got 3. Set .*{asked}=0"):
        divide(config, world)


@pytest.mark.parametrize("asked", [{"optimizer": "lion"}, {"ema": 0.9}, {"restore_best": True}, {"lora_rank": 2}])
def test_what_needs_whole_weights_is_refused_where_they_are_sharded(asked):
    with pytest.raises(UserError, match=rf"{next(iter(asked))} = .* needs the whole model in each process, not train.parallel=fsdp. Use ddp."):
        divide(TrainConfig(**asked, parallel="fsdp"), World(2))
    assert divide(TrainConfig(**asked), World(2))[1] is None
