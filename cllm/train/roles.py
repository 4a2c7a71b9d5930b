"""What the first process of a run does and the others leave; a process that is alone does everything, as if nothing here existed."""

from __future__ import annotations

import signal
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.checkpoint.store import CheckpointStore
from cllm.distributed.share import Share
from cllm.monitor.guards import RunLock
from cllm.monitor.metrics import Metrics
from cllm.monitor.reporter import Reporter
from cllm.runtime.errors import UserError
from cllm.train.step import TrainStep

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.distributed.session import World
    from cllm.model.model import Model


class Silent:
    """In the place of the Reporter and of the Metrics: takes every call and says nothing."""

    tokens_per_second = 0.0

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def trained(self, *_: object) -> dict[str, float]:
        return {}

    def __call__(self, *_: object, **__: object) -> Silent:
        return self

    def __getattr__(self, name: str) -> Silent:
        return self

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class Roles:
    """Who learns from what, who writes, and which step and store the settings ask for."""

    def __init__(self, world: World | None, config: TrainConfig) -> None:
        self.world, self._config = world, config
        self.share = Share.of(config, world)
        self.leads = world is None or world.leads
        self._store: Any = None

    @property
    def _sharded(self) -> bool:
        return self.world is not None and self.world.size > 1 and self._config.train.parallel != "ddp"

    def _refuse(self) -> None:
        """UserError for what works in one process alone, or not where the state is cut up."""
        settings, optim = self._config.train, self._config.optim
        if (self.world is not None and self.world.size > 1) or settings.deterministic:
            for key, asked in (("train.batch_ramp", settings.batch_ramp), ("log.noise_scale_every", self._config.log.noise_scale_every)):
                if asked:
                    raise UserError(f"{key} works in one process that is not deterministic, got {asked}. Set {key}=0.")
        if self._sharded:
            whole = {"optim.optimizer": optim.optimizer != "adamw", "optim.ema": optim.ema > 0, "train.restore_best": settings.restore_best,
                     "finetune.lora_rank": self._config.finetune.lora_rank > 0}  # fmt: skip
            for key in (key for key, asked in whole.items() if asked):
                value = self._config[key]
                raise UserError(f"{key} = {value} needs the whole model in each process, not train.parallel={settings.parallel}. Use ddp.")

    def agreed(self, asked: str | None) -> str | None:
        """The signal that asked any process to stop, so that all stop after the same step."""
        if self.world is None:
            return asked
        number = int(self.world.largest(0 if asked is None else signal.Signals[asked]))
        return signal.Signals(number).name if number else None

    def lock(self, out: Path) -> AbstractContextManager[Any]:
        return RunLock(out) if self.leads else nullcontext()

    def reporter(self, out: Path) -> Any:
        return Reporter(out, self._config) if self.leads else Silent()

    def metrics(self, out: Path, tensorboard: bool, prometheus_port: int) -> Any:
        return Metrics(out, tensorboard, prometheus_port) if self.leads else Silent()

    @property
    def looks(self) -> bool:
        """Whether this process looks into layers and classes of tokens: the first one, where it holds whole weights."""
        return self.leads and not self._sharded

    def store(self, folder: Path, keep: int, keep_every: int) -> CheckpointStore:
        if self.world is None:
            return CheckpointStore(folder, keep, keep_every)
        from cllm.checkpoint.shared import SharedStore, StoreOfParts

        self._store = (StoreOfParts if self._sharded else SharedStore)(folder, keep, keep_every, self.world)
        return self._store

    def step(self, model: Model, *args: Any, **options: Any) -> TrainStep:
        settings, world = self._config.train, self.world
        self._refuse()
        if self._sharded:
            from cllm.train.step_sharded import ShardedStep, mesh_of

            assert world is not None
            mesh = mesh_of(world, settings.parallel, settings.shard_size)
            sharded = ShardedStep(model, *args, share=self.share, world=world, mesh=mesh, deterministic=settings.deterministic, **options)
            self._store.layout = sharded.layout
            self._store.writes = mesh.ndim == 1 or mesh.get_coordinate()[0] == 0
            return sharded
        if settings.deterministic:
            from cllm.train.step_parallel import DeterministicStep

            return DeterministicStep(model, *args, share=self.share, world=world, **options)
        if world is None or world.size == 1:
            return TrainStep(model, *args, **options)
        from cllm.train.step_parallel import DataParallelStep

        return DataParallelStep(model, *args, world=world, **options)
