"""`cllm train --plan` and `--find-lr`: what a training would be, without one."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import runtime
from cllm.cli.console import Console, table
from cllm.cli.train_setup import by_first, model_to_start_from, new_model, predicted_memory, total_tokens, with_data
from cllm.config.model import ModelConfig
from cllm.config.schema import SETTINGS, full_key
from cllm.config.train import TrainConfig
from cllm.runtime.errors import UserError
from cllm.runtime.printable import printable
from cllm.runtime.quantities import counted, size
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.data import Dataset
    from cllm.distributed.world import World
    from cllm.model.model import Model

_RATE = "optim.learning_rate"
Look = Callable[["Model | None", ModelConfig, TrainConfig, "Dataset", Path, Console], None]


def look(show: Look, config: TrainConfig, out: Path | None, console: Console, world: "World | None") -> None:
    """Prepares what a training would learn from and calls `plan` or `find_lr` with it. The model is None where training would start from nothing."""
    from cllm.cli.run_data import data_for_a_look
    from cllm.cli.run_name import default_run
    from cllm.train.clock import process_began

    run = default_run(config.data.path) if out is None else out
    # A learning rate is found for a run to come, which starts from --from also where this folder holds a run that has gone on from there.
    model, tokenizer, config = model_to_start_from(config, run if show is plan else run / "new")
    with ExitStack() as held:
        folder = by_first(world, lambda: held.enter_context(data_for_a_look(config, run, console, tokenizer)).folder)
        dataset, sizes, config = with_data(config, None if model is None else model.config, folder, console, world, began=process_began())
        show(model, sizes, config, dataset, run, console)


def plan(model: "Model | None", sizes: ModelConfig, config: TrainConfig, dataset: "Dataset", out: Path, console: Console) -> None:
    """Memory predicted, speed measured over a few real steps whose result is thrown away."""
    from cllm.model.memory import out_of_memory
    from cllm.runtime.device import free_memory, resolve
    from cllm.train.build import make_batches, make_step
    from cllm.train.evaluations import predict_seconds

    settings = config.train
    steps = settings.steps or 0
    device, _ = resolve(settings.device)
    memory, recompute = predicted_memory(sizes, config, device)
    console.print("predicted memory:")
    parts = [*memory.rows(), ("total", memory.total, "")]
    console.print(table([(name, size(count), what) for name, count, what in parts]))
    if memory.total > free_memory(device):  # said before a model is built, which alone could take all memory
        raise UserError(out_of_memory(memory, settings.batch_size, settings.seq_len, recompute))
    if model is None:
        model = new_model(sizes, config)
    model.to(device).recompute = recompute
    step = make_step(model, config)
    batches = make_batches(dataset.train, config)
    seconds = []
    with runtime.progress.Stage("Measuring the speed of a few steps"):
        for number in range(4):
            batch = batches.batch(number)
            start = time.perf_counter()
            step.run([batch])
            seconds.append(time.perf_counter() - start)
    per_token = min(seconds[1:]) / (settings.batch_size * settings.seq_len)  # the first one compiles
    tokens = settings.batch_size * settings.grad_accum * settings.seq_len
    eta = per_token * total_tokens(config)
    with runtime.progress.Stage("Measuring the speed of an evaluation"):
        plan, evaluation_eta = predict_seconds(model, dataset.val, config)
    console.print(f"measured speed: {1 / per_token:,.0f} tokens/s: about {runtime.progress.duration(eta)} for {counted(steps, 'step')}")
    if evaluation_eta:
        of_all = (
            f"{plan.rows * settings.seq_len:,} of {dataset.val.num_tokens:,}" if plan.rows < plan.split_rows else f"all {dataset.val.num_tokens:,}"
        )
        at_end = ", and all of them at the end" if plan.whole_at_end else ""
        console.print(
            f"evaluation: {counted(plan.num_evaluations, 'time')} {of_all} validation tokens{at_end}: "
            f"about {runtime.progress.duration(evaluation_eta)}"
        )
    total = eta + evaluation_eta
    if config.seconds is None:
        console.print(f"in all about {runtime.progress.duration(total)}, {100 * evaluation_eta / total:.0f} % of it for evaluation")
    else:
        total = min(total, config.seconds)
        console.print(
            f"in all at most {runtime.progress.duration(config.seconds)}: the clock ends the training, with fewer steps where they take longer"
        )
    console.result(
        {
            "parameters": model.config.num_parameters(),
            "memory_bytes": memory.total,
            "tokens_per_second": 1 / per_token,
            "steps": steps,
            "tokens_per_step": tokens,
            "seconds": eta,
            "evaluations": {**asdict(plan), "seconds": evaluation_eta},
            "total_seconds": total,
            "train_tokens": dataset.train.num_tokens,
            "settings": {key: {"value": value, "source": source} for key, value, source, _ in config.describe()},
        }
    )


def find_lr(
    model: "Model | None", sizes: ModelConfig, config: TrainConfig, dataset: "Dataset", out: Path, console: Console, *, given: Sequence[object]
) -> None:
    """Losses at rising learning rates, as a table and as a picture, and where to begin. given: the words of this command, see `words_of`."""
    from cllm.runtime.device import resolve
    from cllm.train.finetune import model_place
    from cllm.train.lr_finder import as_rows, draw, find_learning_rate
    from cllm.train.run_place import holds_run

    device, _ = resolve(config.train.device)
    if model is None:
        model = new_model(sizes, config)
    start = model_place(config, out / "new")
    weights = f"new weights (seed {config.train.seed})" if start is None else f"the weights of {printable(start)}"
    console.print(f"Learning rates are tried from {weights}, which no run keeps.")
    found = find_learning_rate(model.to(device), dataset.train, config)
    console.print(table(as_rows(found)))
    picture: Path | None = _free_place(out.parent / f"{out.name}-find-lr.png" if holds_run(out) else out / "find-lr.png")
    assert picture is not None
    if not draw(found, picture):
        picture = None
        console.print('matplotlib is not installed, so there is no picture. Install it: pip install "cllm[plot]"')
    else:
        console.print(f"The curve is in {picture}.")
    if not found.diverged:
        console.print("The loss did not rise again up to the highest learning rate tried: take the suggestion with care.")
    words = [*given, "--learning-rate", f"{found.suggestion:g}"]
    low = config.optim.min_lr
    if low is not None and low > found.suggestion and not config.sources["optim.min_lr"].startswith("derived"):
        words += ["--set", "optim.min_lr=none"]
    console.print(f"Begin with: {command(*words, *(('--out', 'NEW') if holds_run(out) else ()))}")
    console.result({**found.to_dict(), "optimizer": config.optim.optimizer, "picture": None if picture is None else str(picture)})


def words_of(flags: Mapping[str, Any], sets: Sequence[str], file: Path | None, out: Path | None, resume: bool) -> list[object]:
    """The words of a `cllm train` command with all that was given but the learning rate, and without --out where that holds a run already."""
    from cllm.train.run_place import CONFIG, holds_run

    words: list[object] = ["train"]
    if flags.get("data.path"):
        words.append(Path(flags["data.path"]))
    if resume and file is None and out is not None:
        file = out / CONFIG
    words += [] if file is None else ["--config", file]
    words += [] if out is None or holds_run(out) else ["--out", out]
    for key, value in flags.items():
        if value is None or key in ("data.path", _RATE):
            continue
        each = SETTINGS[key]
        words += [each.option] if each.types == (bool,) else [each.option, Path(value) if each.path else value]
    for text in sets:
        words += [] if full_key(text.partition("=")[0].strip()) == _RATE else ["--set", text]
    return words


def _free_place(place: Path) -> Path:
    """This file, or one of its name and a number, so that nothing is replaced."""
    numbered = (place.with_stem(f"{place.stem}-{number}") for number in count(2))
    return next(each for each in chain([place], numbered) if not each.exists())
