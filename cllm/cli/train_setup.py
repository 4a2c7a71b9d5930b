"""What comes before a training or a look at one: the settings, what can be refused before any work, and the model's sizes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import distributed, runtime
from cllm.cli.console import Console, table
from cllm.config.model import ModelConfig
from cllm.config.schedule import BatchRamp
from cllm.config.train import TrainConfig
from cllm.runtime.errors import UserError
from cllm.runtime.quantities import counted
from cllm.shell import command

if TYPE_CHECKING:
    import torch

    from cllm.data import Dataset
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.distributed.world import World
    from cllm.model.memory import MemoryPrediction
    from cllm.model.model import Model


def read_settings(flags: Mapping[str, Any], sets: Sequence[str], file: Path | None, out: Path | None, resume: bool) -> TrainConfig:
    """The settings of the command, with places as absolute paths, so that the run can be continued from any folder."""
    from cllm.train.run_place import CONFIG, absolute_places

    if resume and out is None:
        raise UserError(f"--resume needs --out with the run to continue, as in {command('train', '--resume', '--out', 'runs/demo')}.")
    own = out / CONFIG if resume and out is not None and file is None else None
    if own is not None and not own.exists():
        raise UserError(f"{out} holds no run to continue (no {CONFIG}). Start one with: {command('train', 'DATA', '--out', out)}")
    config = TrainConfig.from_layers(file=own or file, flags=flags, sets=sets)
    if own is not None:
        from cllm.train.run_folder import stored_run, true_sources

        config = true_sources(config, own, stored_run(own.parent))
    if not config.data.path:
        raise UserError(f"nothing to learn from: give a folder or file of text, as in {command('train', 'books/')}.")
    return absolute_places(config)


def check_before_work(config: TrainConfig, out: Path | None, *, text: bool = True) -> None:
    """Refuses what can be refused at once: places that hold nothing, sizes that no model has, settings that exclude each other.

    After this the text is read and packed, which takes minutes for much of it, and only then is the machine measured and a model built.
    text: whether the data are text already, which the pages of a crawl are not.
    """
    from cllm.cli.options import check_model, check_text
    from cllm.cli.run_name import default_run
    from cllm.train.run_place import holds_run

    run = default_run(config.data.path) if out is None else out
    if text and not holds_run(run):  # a run has its tokens, and goes on also where the text is gone
        check_text(config.data.path)
    if config.finetune.start_from:
        config.check_beside_model()
    from cllm.train.finetune import model_place  # imports torch, which takes seconds: after what can be told without it

    place = model_place(config, run)
    if place is not None:
        check_model(str(place))
    else:
        from cllm.model.memory import check_weights_fit

        check_weights_fit(config.model_config(vocab_size=1))  # the least that it can be: the vocabulary is not known yet
    if not distributed.launched():
        from cllm.runtime.device import resolve
        from cllm.train.build import divide
        from cllm.train.step_graph import check_device

        device, _ = resolve(config.train.device)  # raises for a GPU that is not there
        share, _ = divide(config, None)
        check_device(device.type, config.train.precision, graphs=share is None)


def by_first(world: "World | None", decide: Callable[[], Path]) -> Path:
    """The path that the first process decides on, in all of them; the others wait for it."""
    return decide() if world is None else Path(world.from_first(lambda: str(decide())))


def model_to_start_from(config: TrainConfig, run: Path) -> "tuple[Model | None, Tokenizer | None, TrainConfig]":
    """The model and tokenizer of --from, and the settings with what they settle; None and None where training starts from nothing."""
    from cllm.train.finetune import start

    started = start(config, run)
    return (None, None, config) if started is None else (started[1], started[2], started[0])


def with_data(
    config: TrainConfig, sizes: ModelConfig | None, folder: Path, console: Console, world: "World | None", began: float | None = None
) -> "tuple[Dataset, ModelConfig, TrainConfig]":
    """The packed tokens in a folder, the sizes of the model for them, and the settings with every value filled in. Prints these and the machine.

    sizes: those of the model that is trained further; None for a new one. began: when the time of a run that is given one began, for which sizes and
    settings are then chosen; None where they have been. Raises DataError where the data is too short for a sequence.
    """
    from cllm import kernels  # noqa: F401 - registers the operations that `describe` speaks of
    from cllm.data import Dataset
    from cllm.data.tokens.chat import check_fit
    from cllm.train.build import make_batches

    dataset = Dataset.open(folder)
    if began is not None and config.seconds is not None:
        from cllm.cli.train_time import choose_for_time, with_schedule

        if sizes is None:
            config = choose_for_time(config, dataset, _vocabulary_rows(dataset.tokenizer.vocab_size), began, console)
        else:
            config = with_schedule(config)
    if sizes is None:
        sizes = config.model_config(_vocabulary_rows(dataset.tokenizer.vocab_size))
    config = config.resolve(sizes, dataset.train.num_tokens)
    check_fit([dataset.train, dataset.val], config.train.seq_len, sizes.max_seq_len, console.print)
    make_batches(dataset.train, config)
    console.print(runtime.describe().brief())
    if world is not None:
        console.print(f"parallel {world.size} processes, {world.local_size} on each machine; train.parallel = {config.train.parallel}")
    _print_settings(config, sizes, dataset, console)
    return dataset, sizes, config


def new_model(sizes: ModelConfig, config: TrainConfig, world: "World | None" = None) -> "Model":
    """A model of these sizes, its weights drawn by the seed.

    Raises UserError where memory does not suffice for it or for its training. The system would end the process in the middle, without a word.
    """
    from cllm.model.memory import check_training_fits, check_weights_fit
    from cllm.model.model import Model
    from cllm.runtime.device import resolve

    check_weights_fit(sizes)
    if world is None:  # several processes may share out what one would hold
        device, _ = resolve(config.train.device)
        memory, recompute = predicted_memory(sizes, config, device)
        check_training_fits(memory, config.train.batch_size, config.train.seq_len, recompute, device)
    return Model(sizes, seed=config.train.seed)


def predicted_memory(sizes: ModelConfig, config: TrainConfig, device: "torch.device") -> "tuple[MemoryPrediction, str]":
    """The memory that a training on `device` takes, and what its backward computes again to save some."""
    from cllm.model.memory import choose_recompute, predict
    from cllm.train.build import memory_options

    settings, run = config.train, memory_options(config)
    shape = sizes, settings.batch_size, settings.seq_len, settings.precision
    recompute, _ = choose_recompute(settings.recompute, *shape, device, **run)
    return predict(*shape, recompute, device=device, **run), recompute


def _vocabulary_rows(tokens: int) -> int:
    """Rows of the embedding: the tokenizer's tokens; large vocabularies are filled up to a multiple of 64, which matrix tiles like."""
    return tokens if tokens < 1024 else -(-tokens // 64) * 64


def _print_settings(config: TrainConfig, model: ModelConfig, dataset: "Dataset", console: Console) -> None:
    """What was chosen and where each value comes from; defaults are left out, config.toml lists them all."""
    sources = (source for key, source in config.sources.items() if key.startswith("model."))
    preset = next((f" ({source})" for source in sources if source.startswith("preset ")), "")
    rows = [
        (key, f"{value:.6g}" if isinstance(value, float) else str(value), source)
        for key, value, source, _ in config.describe()
        # The shape that a preset, a rule or another model gives is told in the line before.
        if source != "default" and value is not None and not (key.startswith("model.") and source.startswith(("derived", "preset", "the model")))
    ]
    looked_up = f" ({model.ngram_parameters:,} of them looked up by n-grams)" if model.ngram_tables else ""
    console.print(
        f"model    {model.family} family, {model.num_parameters():,} parameters{looked_up}: {counted(model.num_layers, 'layer')} x "
        f"{model.embed_dim}, {counted(model.num_heads, 'head')} ({model.kv_heads} for keys), ffn {model.ffn_size}, vocabulary {model.vocab_size}, "
        f"context {model.max_seq_len}{preset}"
    )
    tokens = config.train.batch_size * config.train.grad_accum * config.train.seq_len
    steps, total = config.train.steps or 0, total_tokens(config)
    few = f", fewer in the first {config.train.batch_ramp:,}," if config.train.batch_ramp else ""
    console.print(f"training {counted(steps, 'step')} x {tokens:,} tokens{few} = {total / max(1, dataset.train.num_tokens):.2f} passes over the data")
    console.print("settings that are not defaults:")
    console.print(table(rows))


def total_tokens(config: TrainConfig) -> int:
    settings = config.train
    microbatches = BatchRamp(settings.grad_accum, settings.batch_ramp).before(settings.steps or 0)
    return microbatches * settings.batch_size * settings.seq_len
