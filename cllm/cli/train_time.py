"""`cllm train --hours`: what to train in the time that there is, chosen by measured speeds and the scaling law, and told with its reasons."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cllm import runtime
from cllm.cli.console import Console
from cllm.config import recipe
from cllm.config.model import ModelConfig
from cllm.config.scaling_law import LAW
from cllm.config.time_choice import Candidate, Choice, Limits, Text, plans
from cllm.config.train import TrainConfig
from cllm.runtime.errors import UserError
from cllm.runtime.quantities import counted
from cllm.shell import command

if TYPE_CHECKING:
    import torch

    from cllm.data import Dataset
    from cllm.train.speeds import Speeds

MEASURING = 0.03  # of the time: the most that measuring speeds may take
LEAST = 0.05  # of the time: what must be left for training
_SMALLEST = 64  # the width that is measured first
_OF_EVERY_SIZE = ("model.architecture", "model.bigram_rows", "model.trigram_rows")  # what leaves the choice of a size


def time_left(config: TrainConfig, began: float) -> float:
    """Seconds of the time that a run was given. UserError where too little of it is left for a training."""
    assert config.seconds is not None
    spent = time.perf_counter() - began
    if config.seconds - spent < LEAST * config.seconds:
        took, given = runtime.progress.duration(spent), runtime.progress.duration(config.seconds)
        longer = command("train", config.data.path, "--minutes", f"{max(1, round(spent / 15)):g}")
        raise UserError(
            f"reading and packing the text took {took} of the {given} that the training may take, which leaves too little. It is done now, so the "
            f"same command comes further when it is given again; or give it more time, as in {longer}."
        )
    return config.seconds - spent


def choose_for_time(config: TrainConfig, dataset: Dataset, vocab_size: int, began: float, console: Console) -> TrainConfig:
    """The settings with everything that nobody has given chosen for the time that is left. Prints what was chosen and what is predicted.

    vocab_size: rows of the embedding. began: when the time began, by time.perf_counter.
    """
    from cllm.evaluate.baselines import ngram_bits_per_byte
    from cllm.model.memory import RESERVE
    from cllm.runtime.device import free_memory, resolve
    from cllm.train.speeds import Speeds

    time_left(config, began)
    config = with_schedule(config)
    if config.sources["optim.optimizer"] == "default":
        config = config.replace("derived: learns more from the same tokens than adamw", optimizer=recipe.OPTIMIZER)
    device, _ = resolve(config.train.device)
    # Precision and the like; its steps are of no account.
    resolved = config.resolve(config.model_config(vocab_size), dataset.train.num_tokens)
    speeds = Speeds(resolved, device)
    sizes = _sizes(config, vocab_size)
    with runtime.progress.Stage("Measuring the speed of this machine"):
        text = Text(dataset.train.num_tokens, ngram_bits_per_byte(dataset.train, dataset.val, LAW.text_order) if dataset.val.num_tokens > 1 else 4.0)
        settings = config.train
        limits = Limits(
            seconds=0.0,
            memory=RESERVE * free_memory(device),
            aside=settings.eval_budget,
            seq_len=settings.seq_len,
            batch_size=None if config.sources["train.batch_size"] == "default" else settings.batch_size * settings.grad_accum,
            passes=settings.epochs,
        )
        found = _plans(sizes, speeds, text, limits, resolved, device, began)
    choice = _best(found)
    _tell(found, choice, speeds.knows(sizes[choice.candidate.name]), config, dataset, text, console)
    return _applied(config, choice, sizes[choice.candidate.name].embed_dim, len(found))


def _best(found: list[Choice]) -> Choice:
    return min(found, key=lambda each: each.bits_per_byte)


def with_schedule(config: TrainConfig) -> TrainConfig:
    """What any run that is given its time takes, also one that trains a model further, of which the scaling law knows nothing."""
    for key, value, reason in (
        ("optim.schedule", recipe.SCHEDULE, "its decay can begin when the clock says so"),
        ("train.restore_best", True, "no model is worse than its best evaluation"),
    ):
        if config.sources[key] == "default":
            config = config.replace(f"derived: {reason}", **{key: value})
    return config


def _sizes(config: TrainConfig, vocab_size: int) -> dict[str, ModelConfig]:
    """The models to choose from, by name: the one that was asked for, or all widths of the recipe."""
    asked = [key for key in config.flat() if key.startswith("model.") and config[key] is not None and key not in _OF_EVERY_SIZE]
    if asked:
        return {"as given": config.model_config(vocab_size)}
    return {str(width): config.replace("", **_model(width)).model_config(vocab_size) for width in recipe.WIDTHS}


def _model(width: int) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in recipe.sizes(width).items()}


def _plans(
    sizes: dict[str, ModelConfig], speeds: Speeds, text: Text, limits: Limits, config: TrainConfig, device: torch.device, began: float
) -> list[Choice]:
    """What each size comes to. The speed of the best one is measured until what is best by the measured speeds has been measured."""
    from dataclasses import replace

    from cllm.model.memory import predict
    from cllm.train.build import memory_options

    def memory(each: ModelConfig, batch: int) -> int:
        return predict(each, batch, config.train.seq_len, config.train.precision, device=device, **memory_options(config)).total

    speeds.begin(sizes.get(str(_SMALLEST)) or next(iter(sizes.values())))
    assert config.seconds is not None
    until = time.perf_counter() + MEASURING * config.seconds
    while True:
        candidates = [
            Candidate(name, _parameters(each), _parameters(each) - each.vocab_size * each.embed_dim, speeds.of(each), _Memory(memory, each))
            for name, each in sizes.items()
        ]
        found = plans(candidates, text, replace(limits, seconds=max(0.0, time_left(config, began) - recipe.TAIL)))
        chosen = sizes[_best(found).candidate.name]
        if speeds.knows(chosen) or time.perf_counter() + speeds.seconds_to_measure(chosen) > until:
            return found
        speeds.measure(chosen)


def _parameters(sizes: ModelConfig) -> int:
    """As the scaling law counts them: it was fitted to models without tables of n-grams."""
    return sizes.num_parameters(ngrams=False)


class _Memory:
    """The memory of one model by its batch."""

    def __init__(self, predict: Any, sizes: ModelConfig) -> None:
        self._predict, self._sizes = predict, sizes

    def __call__(self, batch: int) -> int:
        return int(self._predict(self._sizes, batch))


def _applied(config: TrainConfig, choice: Choice, width: int, compared: int) -> TrainConfig:
    """The settings with the choice, each value with its reason. What somebody has given stays."""

    def put(key: str, value: Any, reason: str) -> None:
        nonlocal config
        if config.sources[key] == "default":
            config = config.replace(f"derived: {reason}", **{key: value})

    if compared > 1:
        for key, value in _model(int(choice.candidate.name)).items():
            put(key, value, f"the lowest predicted loss of {compared} sizes")
    updates = f"grows as the square root of the tokens, {choice.tokens:,}"
    put("train.batch_size", choice.batch_size, updates)
    if choice.grad_accum > 1 and config.sources["train.batch_size"].startswith("derived"):
        put("train.grad_accum", choice.grad_accum, "so that a microbatch fits into the memory")
    steps = choice.steps
    config = config.replace("derived: what the measured speed makes of the time; the clock decides", steps=steps)
    if config.train.epochs is None and choice.limited_by_text:
        config = config.replace("derived: more passes over this text teach little", epochs=choice.most_passes)
    rate = recipe.learning_rate(width, choice.tokens)
    if config.optim.optimizer == recipe.OPTIMIZER:
        put("optim.learning_rate", rate, "the best of those that were tried, lower for wider models and more tokens")
    if config.optim.schedule == recipe.SCHEDULE:
        put("optim.min_lr", 0.0, "the decay ends at nothing")
        put("optim.warmup", recipe.warmup(steps), f"{100 * recipe.WARMUP_SHARE:.0f} % of the steps, at most {recipe.WARMUP_MOST:,}")
    return config


def _tell(found: list[Choice], choice: Choice, measured: bool, config: TrainConfig, dataset: Dataset, text: Text, console: Console) -> None:
    """What will be trained and why, and what to expect of it."""
    speed = (
        choice.batch_size
        * choice.grad_accum
        * config.train.seq_len
        / choice.candidate.speed.update(choice.batch_size * choice.grad_accum * config.train.seq_len)
    )
    per_token = dataset.train.num_bytes / dataset.train.num_tokens
    nats = 0.6931471805599453 * per_token
    given = runtime.progress.duration(config.seconds or 0.0)
    console.print(
        f"time     {given}, of which about {runtime.progress.duration(choice.seconds)} are left for training: {choice.tokens:,} tokens at "
        f"{speed:,.0f} tokens/s ({'measured' if measured else 'estimated'}), {counted(choice.steps, 'step')}, "
        f"{choice.passes:.1f} passes over the text"
    )
    place = found.index(choice)
    beside = [each for each in (found[place - 1] if place else None, found[place + 1] if place + 1 < len(found) else None) if each is not None]
    others = "".join(f", {each.candidate.parameters:,} parameters would come to {each.bits_per_byte:.3f}" for each in beside)
    console.print(f"size     {choice.candidate.parameters:,} parameters: the lowest predicted loss of {counted(len(found), 'size')}{others}")
    console.print(
        f"expected {choice.bits_per_byte:.3f} bits per byte on the validation text, {choice.low:.3f} to {choice.high:.3f} in 8 of 10 cases: a loss "
        f"of about {choice.bits_per_byte * nats:.3f} ({choice.low * nats:.3f} to {choice.high * nats:.3f})"
    )
    gain = 1 - choice.with_more_text / choice.bits_per_byte
    if choice.limited_by_text:
        console.print(
            f"text     is the limit: after {choice.most_passes:.0f} passes over {text.tokens:,} tokens nothing more is to be learnt from it, and the "
            f"run ends before its time. Four times as much text would bring about {choice.with_more_text:.3f} bits per byte in the time of this run"
        )
    elif gain > 0.01:
        console.print(
            f"text     more of it would help: with four times as much about {choice.with_more_text:.3f} bits per byte in the same time "
            f"({100 * gain:.0f} % less)"
        )
