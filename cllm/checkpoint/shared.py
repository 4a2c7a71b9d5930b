"""The checkpoints of a run of several processes. The first one writes what all hold alike, or each writes its rows.

All processes call the same methods in the same order. The folder lies on a disk that all of them see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cllm.checkpoint.folder import Checkpoint, complete, read_state, verify
from cllm.checkpoint.parts import Layout, write_index, write_rows
from cllm.checkpoint.safetensors import tensors_bytes
from cllm.checkpoint.store import CHECKPOINT, CheckpointStore
from cllm.files import new_folder, reported

if TYPE_CHECKING:
    from cllm.distributed.world import World


class SharedStore(CheckpointStore):
    """Checkpoints that the first process alone writes. All processes go on from the one that it finds good."""

    def __init__(self, folder: str | Path, keep: int, keep_every: int, world: World) -> None:
        super().__init__(folder, keep, keep_every)
        self.world = world
        self._inside = False

    def _by_first(self, do: Callable[[], Any]) -> Any:
        """What `do` returns in the first process, in every process. Methods of the store that `do` calls run in the first process alone."""
        if self._inside:
            return do()
        self._inside = True
        try:
            return self.world.from_first(do)
        finally:
            self._inside = False

    def steps(self) -> list[int]:
        return self._by_first(super().steps)

    def clean(self) -> None:
        self._by_first(super().clean)

    def mark_best(self, step: int) -> None:
        mark = super().mark_best
        self._by_first(lambda: mark(step))

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """As `CheckpointStore.save`. No process goes on, or ends, before the checkpoint is complete."""
        write = super().save
        self._by_first(lambda: str(write(step, weights, optimizer, state)))
        return self.path(step)

    def newest_good(self, report: Callable[[str], None] | None = None, with_optimizer: bool = True) -> Checkpoint | None:
        look, found = super().newest_good, list[Checkpoint | None]()

        def find() -> int | None:
            found.append(look(report, with_optimizer))
            return None if found[0] is None else found[0].step

        step = self._by_first(find)
        return found[0] if found else None if step is None else self.read(step, with_optimizer)


class StoreOfParts(SharedStore):
    """Checkpoints in parts, for a state that is sharded over the processes.

    layout: of each weight its whole shape and this process's first row. writes: whether this process writes its rows; False where another
    process holds the same ones.
    """

    def __init__(self, folder: str | Path, keep: int, keep_every: int, world: World, layout: Layout, writes: bool) -> None:
        super().__init__(folder, keep, keep_every, world)
        self.layout, self.writes = layout, writes

    def read(self, step: int, with_optimizer: bool = True) -> Checkpoint:
        """The state alone, every byte of the folder verified by the first process. `read_rows` then takes each process's rows from the files."""
        path = self.path(step)
        if self.world.leads:
            verify(path)
        return Checkpoint(path, step, {}, {}, read_state(path, step))

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        self.clean()
        num_bytes = tensors_bytes(weights) + tensors_bytes(optimizer)
        with ExitStack() as folder:  # filled in the first process, which makes the folder and in the end renames it, or removes it after an error
            make = new_folder(self.path(step), CHECKPOINT, num_bytes)
            beside = self.folder / self._by_first(lambda: folder.enter_context(make).name)
            with reported(self.path(step), CHECKPOINT, num_bytes):
                mine = write_rows(beside, self.world.rank, weights, optimizer, self.layout, self.world.leads) if self.writes else None
            everyone = [written for written in self.world.gather(mine) if written is not None]
            self._by_first(lambda: complete(beside, step, *write_index(beside, everyone), state))
            self._by_first(folder.close)
        self._by_first(lambda: self._publish(step))
        return self.path(step)
