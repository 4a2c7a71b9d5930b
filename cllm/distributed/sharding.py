"""Which rows of each weight a process holds where weights, gradients and optimizer state are sharded over the processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

    from cllm.config.train import TrainConfig
    from cllm.distributed.world import World


@dataclass(frozen=True)
class Sharding:
    """`copies` groups of `shards` processes. Each group holds every weight once, its rows (dimension 0) dealt out over the group; with one group
    this is FSDP, with several it is the hybrid mode. The processes of a group have neighbouring ranks."""

    copies: int
    shards: int
    rank: int

    @classmethod
    def of(cls, config: TrainConfig, world: World | None) -> Sharding | None:
        """How the settings shard a run over its processes; None where every process holds whole weights.

        Raises UserError where train.shard_size does not divide the processes into several groups of several processes.
        """
        settings = config.train
        if world is None or world.size == 1 or settings.parallel == "ddp":
            return None
        if settings.parallel == "fsdp":
            return cls(1, world.size, world.rank)
        size = settings.shard_size or world.local_size
        if world.size % size or size < 2 or size == world.size:
            raise UserError(
                f"hybrid sharding needs shard_size to divide the {world.size} processes into several copies of at least 2 processes each, got {size}"
                f"{'' if settings.shard_size else ' (the processes of one node)'}. Set train.shard_size, or use train.parallel=fsdp."
            )
        return cls(world.size // size, size, world.rank)

    @property
    def copy(self) -> int:
        """The number of this process's group. Those of group 0 speak for all where groups hold the same."""
        return self.rank // self.shards

    def first_row(self, num_rows: int) -> int:
        """The first of this process's rows of a weight of so many, cut as torch.chunk cuts: equal runs, of which the last may be shorter or empty."""
        return min(num_rows, -(-num_rows // self.shards) * (self.rank % self.shards))

    def layout(self, weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], int]]:
        """Of each weight its whole shape and the first row that this process holds. `weights` may be whole or sharded already."""
        return {name: (tuple(weight.shape), self.first_row(weight.shape[0])) for name, weight in weights.items()}

    def mesh(self, device_type: str) -> Any:
        """The torch DeviceMesh: ("shard",) for one group, ("replicate", "shard") for several. All processes call this together, once."""
        from torch.distributed.device_mesh import init_device_mesh

        if self.copies == 1:
            return init_device_mesh(device_type, (self.shards,), mesh_dim_names=("shard",))
        return init_device_mesh(device_type, (self.copies, self.shards), mesh_dim_names=("replicate", "shard"))
