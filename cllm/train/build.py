"""What a run is made of, by its settings and its processes: the division of the work, the batches, the training step, the store of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.checkpoint.store import CheckpointStore
from cllm.runtime.errors import UserError
from cllm.train.step import TrainStep

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.data import TokenSplit
    from cllm.data.tokens.batch import TrainingBatches
    from cllm.distributed.sharding import Sharding
    from cllm.distributed.share import Share
    from cllm.distributed.world import World
    from cllm.model.model import Model


def divide(config: TrainConfig, world: World | None) -> tuple[Share | None, Sharding | None]:
    """What this process takes of a run: its share of each update, None for all of it, and its rows of the weights, None for all of them.

    Raises UserError where the work cannot be divided over so many processes, and for settings that need a process that trains alone.
    """
    settings, optim = config.train, config.optim
    if (world is None or world.size == 1) and not settings.deterministic:
        return None, None
    from cllm.distributed.sharding import Sharding
    from cllm.distributed.share import Share

    share, sharding = Share.of(config, world), Sharding.of(config, world)
    for key in ("train.batch_ramp", "log.noise_scale_every"):
        if config[key]:
            raise UserError(f"{key} works in one process that is not deterministic, got {config[key]}. Set {key}=0.")
    whole = {
        "optim.optimizer": optim.optimizer != "adamw",
        "optim.ema": optim.ema > 0,
        "train.restore_best": settings.restore_best,
        "finetune.lora_rank": config.finetune.lora_rank > 0,
    }
    for key in (key for key, asked in whole.items() if asked and sharding is not None):
        raise UserError(f"{key} = {config[key]} needs the whole model in each process, not train.parallel={settings.parallel}. Use ddp.")
    return share, sharding


def memory_options(config: TrainConfig) -> dict[str, Any]:
    """What the memory of a run depends on beside its model, its microbatches and its device, as `cllm.model.memory.predict` takes it."""
    optim = config.optim
    return {"optimizer": optim.optimizer, "average": optim.ema > 0, "background_checkpoint": config.train.async_checkpoint}


def make_batches(split: TokenSplit, config: TrainConfig) -> TrainingBatches:
    """The training batches that a configuration describes: a pure function of its seed and the batch's number."""
    settings = config.train
    sizes = settings.seq_len, settings.batch_size
    data = config.data
    return split.batches(*sizes, settings.seed, shuffle=data.shuffle, document_mask=data.document_mask, fim_rate=data.fim_rate)


def make_step(
    model: Model, config: TrainConfig, world: World | None = None, share: Share | None = None, sharding: Sharding | None = None
) -> TrainStep:
    """The step that a resolved configuration describes.

    world: the processes of the run; None for one that trains alone. share: what this process learns from, which the deterministic and the
    sharded step need to know; without it a single process takes the usual step. sharding: where weights are sharded, which cuts up `model`.
    """
    settings, optim = config.train, config.optim
    assert optim.learning_rate is not None, "the configuration is resolved"
    given: tuple[Any, ...] = (model, settings.precision, optim.learning_rate, optim.grad_clip)
    options: dict[str, Any] = {
        "weight_decay": optim.weight_decay,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
        "label_smoothing": optim.label_smoothing,
        "z_loss": optim.z_loss,
        "optimizer": optim.optimizer,
        "momentum": optim.momentum,
        "ema": optim.ema,
        "noise_scale_every": config.log.noise_scale_every,
        "dropout": optim.dropout,
        "seed": settings.seed,
    }
    if sharding is not None:
        from cllm.train.step_sharded import ShardedStep

        assert world is not None and share is not None
        return ShardedStep(*given, share=share, world=world, sharding=sharding, deterministic=settings.deterministic, **options)
    if share is not None and settings.deterministic:
        from cllm.train.step_parallel import DeterministicStep

        return DeterministicStep(*given, share=share, world=world, **options)
    if world is not None and world.size > 1:
        from cllm.train.step_parallel import DataParallelStep

        return DataParallelStep(*given, world=world, **options)
    return TrainStep(*given, **options)


def make_store(folder: Path, model: Model, config: TrainConfig, world: World | None = None, sharding: Sharding | None = None) -> CheckpointStore:
    """The store of a run's checkpoints: written by this process, by the first of several, or by each of them where weights are sharded."""
    kept = folder, config.train.keep, config.train.keep_every
    if world is None:
        return CheckpointStore(*kept)
    from cllm.checkpoint.shared import SharedStore, StoreOfParts

    if sharding is None:
        return SharedStore(*kept, world)
    return StoreOfParts(*kept, world, sharding.layout(dict(model.named_parameters())), writes=sharding.copy == 0)
