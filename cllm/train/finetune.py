"""Training that starts from a model: `cllm train DATA --from MODEL`, with or without LoRA.

The model gives its sizes, weights and tokenizer. Under LoRA the run keeps the frozen weights once, as base.cllm, and its checkpoints hold the
adapters alone; the run's folder is whole by itself and may be moved.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.checkpoint.model_file import BASE, load, save
from cllm.checkpoint.safetensors import read_safetensors_metadata
from cllm.checkpoint.store import CheckpointStore
from cllm.config.lora import LoraConfig
from cllm.config.setting import origin
from cllm.model.lora import add_lora
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.progress import say

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model


def model_place(config: TrainConfig, out: Path) -> Path | None:
    """Where the model is that training in `out` starts from: that of --from, or once the run has begun its own. None: it starts from nothing.

    Raises UserError for LoRA without a model, and for LoRA in the folder of a run without it.
    """
    settings = config.finetune
    if not settings.start_from:
        if settings.lora_rank:
            raise UserError("lora_rank needs a model to adapt: give one with --from.")
        return None
    started = bool(CheckpointStore(out / "checkpoints").steps())
    base = out / BASE
    if started and settings.lora_rank and not base.is_file():
        raise UserError(f"{out} holds a run without LoRA (it has no {BASE}). Leave out --lora-rank, or choose another --out.")
    return Path(settings.start_from) if not started else base if settings.lora_rank else out


def start(config: TrainConfig, out: Path) -> tuple[TrainConfig, Model, Tokenizer] | None:
    """The model and tokenizer to train on, and the configuration with what they settle; None where training starts from nothing.

    Raises UserError for settings that a given model rules out, DataError for a model without a tokenizer.
    """
    where = model_place(config, out)
    if where is None:
        return None
    model, tokenizer = load(where, None if where == out else say)  # a run that goes on says itself which checkpoint it takes
    if tokenizer is None:
        raise DataError(f"{where} holds no tokenizer, so DATA cannot become its tokens. Save it with one: cllm.save(model, path, tokenizer=...).")
    model = model.float()
    _check(config, model)
    if config.sources["train.seq_len"] == "default" and config.train.seq_len > model.config.max_seq_len:
        config = config.replace("derived: the model's context", seq_len=model.config.max_seq_len)
    if config.train.seq_len > model.config.max_seq_len:
        limit, given_by = model.config.max_seq_len, origin(config.sources["train.seq_len"])
        raise UserError(f"seq_len must be <= the model's max_seq_len ({limit}), got {config.train.seq_len}{given_by}.")
    if config.optim.learning_rate is None and not config.finetune.lora_rank:
        # The derived rate is for weights that begin as noise; a trained model forgets at it. Adapters begin at nothing and keep it.
        rate = config.resolve(model.config, 1).optim.learning_rate
        assert rate is not None
        config = config.replace("derived: a tenth of the rate for training from nothing", learning_rate=float(f"{rate / 10:.3g}"))
    return config, model, tokenizer


def adapt(config: TrainConfig, model: Model, tokenizer: Tokenizer, out: Path) -> Model:
    """Under LoRA: the run's base written where it is not yet, and the adapters added. Otherwise the model as it is."""
    settings = config.finetune
    if not settings.lora_rank:
        return model
    out.mkdir(parents=True, exist_ok=True)
    base = out / BASE
    if not CheckpointStore(out / "checkpoints").steps():
        save(model, base, tokenizer=tokenizer.with_fim() if config.data.fim_rate else tokenizer)
    digest = read_safetensors_metadata(base)["sha256"]
    lora = LoraConfig(settings.lora_rank, settings.lora_alpha, settings.lora_targets, digest)
    return add_lora(model, lora, seed=config.train.seed)


def _check(config: TrainConfig, model: Model) -> None:
    """Sizes and tokenizer come from the model; what is given otherwise must be the same."""
    given = {name: value for name, value in dataclasses.asdict(config.model).items() if value is not None and name != "preset"}
    have: dict[str, Any] = model.config.to_dict()
    wrong = [f"{name}={value!r} (the model has {have[name]!r})" for name, value in given.items() if value != have[name]]
    config.check_beside_model(wrong)
