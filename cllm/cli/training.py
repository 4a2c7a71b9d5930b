"""One training from its settings to its result, for every command that trains."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.cli.console import Console
from cllm.cli.train_setup import by_first, model_to_start_from, new_model, with_data
from cllm.config.train import TrainConfig

if TYPE_CHECKING:
    from cllm.data import Dataset
    from cllm.distributed.world import World
    from cllm.model.model import Model
    from cllm.monitor.guards import RunLock
    from cllm.monitor.records import TrainResult


@dataclass(frozen=True)
class Trained:
    """A run that has come to its end: its folder, the whole model, the tokens that it learnt from, and what became of it."""

    run: Path
    model: "Model"
    dataset: "Dataset"
    result: "TrainResult"
    spent: float | None = None
    """Seconds that a run which was given its time has taken until now, over all its starts."""


def train_in(out: Path | None, config: TrainConfig, console: Console, world: "World | None" = None, *, resume: bool = False) -> Trained | None:
    """Trains in the folder `out`, or in that of the data; compared with the run that is there before anything is written.

    A run that was interrupted is continued. resume: it must be there. None in all processes but the first where the model is shared out.
    """
    from cllm.cli.run_data import check_same_data, data_of_new_run, data_of_run
    from cllm.cli.run_name import take_folder
    from cllm.train import compile_ahead
    from cllm.train.clock import process_began
    from cllm.train.finetune import adapt
    from cllm.train.run_folder import go_on, how_to_train_longer, stored_run
    from cllm.train.trainer import Trainer

    began = process_began()
    with ExitStack() as held:
        lock: RunLock | None = None  # held by the first process

        def take() -> Path:
            nonlocal lock
            run, lock = take_folder(out, config.data.path, held)
            there = stored_run(run)
            if there is not None:
                check_same_data(there, config, console)
            return run

        run = by_first(world, take)
        stored = stored_run(run)
        if stored is not None and stored.config.seconds is not None:
            config = config.adopt_choice(stored.config)
        model, tokenizer, config = model_to_start_from(config, run)
        if stored is not None:
            sizes = config.model_config(stored.vocab_size) if model is None else model.config
            resolved = config.resolve(sizes, stored.data["train"]["tokens"])
            go_on(resolved, stored, stored.data, stored.tokenizer_hash, new_end=resume)  # raises where this is another run
        elif resume:
            console.print(f"{run} was stopped before its first checkpoint and starts from the beginning")

        if world is None:
            compile_ahead.start(config, None if model is None else model.config)

        def tokens() -> Path:
            assert lock is not None
            return (data_of_new_run(config, run, lock, console, tokenizer) if stored is None else data_of_run(stored, config, console)).folder

        folder = by_first(world, tokens)
        dataset, sizes, config = with_data(
            config, None if model is None else model.config, folder, console, world, None if stored is not None else began
        )
        unchanged = stored is not None and (config.train.steps, config.seconds) == (stored.config.train.steps, stored.config.seconds)
        if stored is not None and stored.finished and unchanged:
            console.print(f"{run} is finished: all {stored.step:,} steps are done. {how_to_train_longer(stored)}")
        if model is None:
            model = new_model(sizes, config, world)
        model = adapt(config, model, dataset.tokenizer, run)
        trainer = Trainer(model, dataset, config, out=run, tokenizer=dataset.tokenizer, lock=lock, began=began)
        result = trainer.fit(resume=True if resume and stored is not None else "auto")
        whole = trainer.whole_model()
        return None if whole is None else Trained(run, whole, dataset, result, trainer.spent)
