"""`cllm train`: from a folder of text to a trained model. Each part is one call; what they say on the way is for the person who waits."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm import distributed, runtime
from cllm.cli.console import Console, open_console, table
from cllm.cli.interrupt import stopping_with
from cllm.cli.options import Json, examples, option, with_settings
from cllm.config.model import ModelConfig
from cllm.config.schedule import BatchRamp
from cllm.config.schema import SETTINGS, full_key
from cllm.config.train import TrainConfig
from cllm.monitor.stop_signals import BEFORE_TRAINING
from cllm.runtime.errors import UserError
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.data import Dataset
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.distributed.world import World
    from cllm.model.model import Model
    from cllm.monitor.guards import RunLock

# The settings that most users change; --set reaches all of them.
FLAGS = {full_key(name): SETTINGS[full_key(name)] for name in (
    "start_from", "lora_rank", "tokenizer", "device", "threads", "precision", "preset", "vocab_size", "embed_dim", "num_layers", "num_heads",
    "num_kv_heads", "ffn_dim", "seq_len", "batch_size", "grad_accum", "steps", "epochs", "learning_rate", "min_lr", "warmup", "schedule", "seed",
    "checkpoint_every", "keep", "eval_every", "patience", "sample_every", "on_nonfinite", "overfit_one_batch",
)}  # fmt: skip

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm train books/",
        "cllm train notes.txt --preset cllm-5m --epochs 3 --out runs/notes",
        "cllm train books/ --plan",
        "cllm train books/ --set optim.beta2=0.99",
        "cllm train --resume --out runs/books",
        "cllm train chats.jsonl --from runs/books --lora-rank 8",
    )
)
@with_settings(FLAGS)
def train(
    data: Annotated[str | None, typer.Argument(help="Folder of text or source code, a file, JSONL (chats too), or a packed token folder.")] = None,
    out: Annotated[Path | None, option("--out", Path, "Where the run lives [default: runs/ + the name of the data].")] = None,
    config: Annotated[Path | None, option("--config", Path, "TOML file with settings; flags win over it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out with its own settings; an error if there is none.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print sizes, memory, speed and every derived value, and stop.")] = False,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="Try rising learning rates for 100 steps, print and plot the losses, and stop.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting; repeatable.")] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train a model on DATA: tokenizer, packing and training in one go, each step cached; the same command continues an interrupted run."""
    flags = {"data.path": data, **settings}
    console = open_console(as_json, needs_reader=False)
    with stopping_with("interrupted; nothing was trained" if plan or find_lr else BEFORE_TRAINING):
        train_run(console, flags=flags, sets=set_ or [], file=config, out=out, resume=resume, plan_only=plan, find_lr=find_lr)


def train_run(
    console: Console,
    *,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    file: Path | None,
    out: Path | None,
    resume: bool,
    plan_only: bool,
    find_lr: bool = False,
) -> None:
    """Settings -> tokenizer and tokens -> model -> training -> a sample and the next commands. With `plan_only` or `find_lr` no run is made, and
    none is changed."""
    with distributed.fail_together():
        if plan_only and find_lr:
            raise UserError("--plan and --find-lr exclude each other: one predicts, the other tries. Give one of them.")
        config = _settings(flags, sets, file, out, resume)
    work = partial(_look, _plan) if plan_only else partial(_look, _find_lr) if find_lr else partial(_train, resume=resume)
    from cllm import kernels  # noqa: F401 - registers what `describe` tells of them
    from cllm.runtime.device import resolve

    with _session(config) as world, runtime.use(threads=config.train.threads):
        if world is None:
            resolve(config.train.device)  # a GPU that is not there is said before any work
        console.print(runtime.describe().brief())
        if world is not None:
            console.print(f"parallel {world.size} processes, {world.local_size} on each machine; train.parallel = {config.train.parallel}")
        work(config, out, console, world)


def _session(config: TrainConfig) -> "AbstractContextManager[World | None]":
    """The processes that torchrun has started; None for a process that is alone, which imports nothing of them."""
    if not distributed.launched():
        return nullcontext()
    from cllm.distributed.session import session

    return session(config.train.device, config.train.timeout)


def _settings(flags: Mapping[str, Any], sets: Sequence[str], file: Path | None, out: Path | None, resume: bool) -> TrainConfig:
    """The settings of the command, with places as absolute paths, so that the run can be continued from any folder."""
    from cllm.train.run_folder import CONFIG, absolute_places, stored_run, true_sources

    if resume and out is None:
        raise UserError("--resume needs --out with the run to continue, as in cllm train --resume --out runs/demo.")
    own = out / CONFIG if resume and out is not None and file is None else None
    if own is not None and not own.exists():
        raise UserError(f"{out} holds no run to continue (no {CONFIG}). Start one with: {command('train', 'DATA', '--out', out)}")
    config = TrainConfig.from_layers(file=own or file, flags=flags, sets=sets)
    if own is not None:
        config = true_sources(config, own, stored_run(own.parent))
    if not config.data.path:
        raise UserError("nothing to learn from: give a folder or file of text, as in cllm train books/.")
    return absolute_places(config)


def _train(config: TrainConfig, out: Path | None, console: Console, world: "World | None", *, resume: bool) -> None:
    """Trains in the folder `out`, or in that of the data; compared with the run that is there before anything is written."""
    from cllm.cli.run_data import check_same_data, data_of_new_run, data_of_run
    from cllm.cli.run_name import take_folder
    from cllm.train.finetune import adapt
    from cllm.train.run_folder import go_on, how_to_train_longer, stored_run
    from cllm.train.samples import sample_text
    from cllm.train.trainer import Trainer

    with ExitStack() as held:
        lock: RunLock | None = None  # held by the first process

        def take() -> Path:
            nonlocal lock
            run, lock = take_folder(out, config.data.path, held)
            there = stored_run(run)
            if there is not None:
                check_same_data(there, config, console)
            return run

        run = _by_first(world, take)
        stored = stored_run(run)
        model, tokenizer, config = _model_to_start_from(config, run)
        if stored is not None:
            sizes = config.model_config(stored.vocab_size) if model is None else model.config
            resolved = config.resolve(sizes, stored.data["train"]["tokens"])
            go_on(resolved, stored, stored.data, stored.tokenizer_hash, new_end=resume)  # raises where this is another run
        elif resume:
            console.print(f"{run} was stopped before its first checkpoint and starts from the beginning")

        def tokens() -> Path:
            assert lock is not None
            return (data_of_new_run(config, run, lock, console, tokenizer) if stored is None else data_of_run(stored, config, console)).folder

        dataset, model, config = _with_data(config, model, _by_first(world, tokens), console)
        if stored is not None and stored.finished and config.train.steps == stored.config.train.steps:
            console.print(f"{run} is finished: all {stored.step:,} steps are done. {how_to_train_longer(stored)}")
        model = adapt(config, model, dataset.tokenizer, run)
        trainer = Trainer(model, dataset, config, out=run, tokenizer=dataset.tokenizer, lock=lock)
        result = trainer.fit(resume=True if resume and stored is not None else "auto")
        trained = trainer.whole_model()
        if trained is None:
            return
        with stopping_with(f"interrupted while a sample was written; the run in {run} is complete"):
            sample = sample_text(trained, dataset.tokenizer, dataset.train)
    console.print(f"\nA sample, starting from nothing:\n\n{_indented(sample)}\n")
    if result.validation is not None:
        console.print(f"Validation: {result.validation}")
    if result.stopped_early and result.resumed_from == result.step:
        longer = command("train", "--resume", "--out", run, "--patience", "MORE")
        console.print(f"It had stopped early after step {result.step:,}. To train it longer: {longer}")
    console.print(f"The model is in {run} ({model.config.num_parameters():,} parameters). Next:")
    console.print(_next_commands(run, chats=dataset.info.get("kind") == "chat"))
    console.result({**result.to_dict(), "parameters": model.config.num_parameters(), "sample": sample})


def _next_commands(run: Path, chats: bool) -> str:
    """What can be done with a trained run. It is evaluated on other text, because that which it learnt from tells only how well it remembers."""
    talk = command("chat", run) if chats else command("generate", run, "--prompt", "The ", "--temperature", "0.7")
    evaluate = command("evaluate", run, "OTHER-CHATS" if chats else "OTHER-TEXT")
    return "\n".join(
        f"  {each}" for each in (talk, evaluate, command("report", run), command("export", run, "--to", "hf", "--out", Path(f"{run}-hf")))
    )


Look = Callable[["Model", TrainConfig, "Dataset", Path, Console], None]


def _look(show: Look, config: TrainConfig, out: Path | None, console: Console, world: "World | None") -> None:
    """What a training would be, without one."""
    from cllm.cli.run_data import data_for_a_look
    from cllm.cli.run_name import default_run

    if show is _find_lr and world is not None:
        raise UserError("--find-lr works in one process. Run it without torchrun.")
    run = default_run(config.data.path) if out is None else out
    model, tokenizer, config = _model_to_start_from(config, run)
    with ExitStack() as held:
        folder = _by_first(world, lambda: held.enter_context(data_for_a_look(config, run, console, tokenizer)).folder)
        dataset, model, config = _with_data(config, model, folder, console)
        show(model, config, dataset, run, console)


def _by_first(world: "World | None", decide: Callable[[], Path]) -> Path:
    """The path that the first process decides on, in all of them; the others wait for it."""
    return decide() if world is None else Path(world.from_first(lambda: str(decide())))


def _model_to_start_from(config: TrainConfig, run: Path) -> "tuple[Model | None, Tokenizer | None, TrainConfig]":
    """The model and tokenizer of --from, and the settings with what they settle; None and None where training starts from nothing."""
    from cllm.train.finetune import start

    started = start(config, run)
    return (None, None, config) if started is None else (started[1], started[2], started[0])


def _with_data(config: TrainConfig, model: "Model | None", folder: Path, console: Console) -> "tuple[Dataset, Model, TrainConfig]":
    """The packed tokens in a folder, a model for them where there is none yet, and the settings with every value filled in, which are printed."""
    from cllm.data import Dataset
    from cllm.data.tokens.chat import check_fit
    from cllm.model.memory import check_weights_fit
    from cllm.model.model import Model

    dataset = Dataset.open(folder)
    if model is None:
        sizes = config.model_config(_vocabulary_rows(dataset.tokenizer.vocab_size))
        check_weights_fit(sizes)
        model = Model(sizes, seed=config.train.seed)
    config = config.resolve(model.config, dataset.train.num_tokens)
    check_fit(dataset, config.train.seq_len, model.config.max_seq_len, console.print)
    _print_settings(config, model.config, dataset, console)
    return dataset, model, config


def _vocabulary_rows(tokens: int) -> int:
    """Rows of the embedding: the tokenizer's tokens; large vocabularies are filled up to a multiple of 64, which matrix tiles like."""
    return tokens if tokens < 1024 else -(-tokens // 64) * 64


def _print_settings(config: TrainConfig, model: ModelConfig, dataset: "Dataset", console: Console) -> None:
    """What was chosen and where each value comes from; defaults are left out, config.toml lists them all."""
    rows = [
        (key, str(value), source)
        for key, value, source, _ in config.describe()
        if source != "default" and value is not None and not (key.startswith("model.") and source.startswith("derived"))  # told in the line above
    ]
    console.print(
        f"model    {model.family} family, {model.num_parameters():,} parameters: {model.num_layers} layers x {model.embed_dim}, "
        f"{model.num_heads} heads ({model.kv_heads} for keys), ffn {model.ffn_size}, vocabulary {model.vocab_size}, context {model.max_seq_len}"
    )
    tokens = config.train.batch_size * config.train.grad_accum * config.train.seq_len
    steps, total = config.train.steps or 0, _total_tokens(config)
    few = f", fewer in the first {config.train.batch_ramp:,}," if config.train.batch_ramp else ""
    console.print(f"training {steps:,} steps x {tokens:,} tokens{few} = {total / max(1, dataset.train.num_tokens):.2f} passes over the data")
    console.print("settings that are not defaults:")
    console.print(table(rows))


def _total_tokens(config: TrainConfig) -> int:
    settings = config.train
    microbatches = BatchRamp(settings.grad_accum, settings.batch_ramp).before(settings.steps or 0)
    return microbatches * settings.batch_size * settings.seq_len


def _plan(model: "Model", config: TrainConfig, dataset: "Dataset", out: Path, console: Console) -> None:
    """Memory predicted, speed measured over a few real steps whose result is thrown away."""
    from cllm.model.memory import choose_recompute, out_of_memory, predict
    from cllm.runtime.device import free_memory, resolve
    from cllm.train.build import make_batches, make_step
    from cllm.train.evaluations import predict_seconds

    settings = config.train
    steps = settings.steps or 0
    device, _ = resolve(settings.device)
    sizes = model.config, settings.batch_size, settings.seq_len, settings.precision
    model.to(device).recompute, _ = choose_recompute(settings.recompute, *sizes, device)
    background = settings.async_checkpoint and device.type == "cpu"  # of a GPU's run the copy lies in the host's memory
    memory = predict(*sizes, model.recompute, config.optim.optimizer, average=config.optim.ema > 0, background_checkpoint=background)
    console.print("predicted memory:")
    parts = [*memory.rows(), ("total", memory.total, "")]
    console.print(table([(name, f"{count / 1e6:,.0f} MB", what) for name, count, what in parts]))
    if memory.total > free_memory(device):
        raise UserError(out_of_memory(memory, settings.batch_size, settings.seq_len, model.recompute))
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
    eta = per_token * _total_tokens(config)
    with runtime.progress.Stage("Measuring the speed of an evaluation"):
        plan, evaluation_eta = predict_seconds(model, dataset.val, config)
    console.print(f"measured speed: {1 / per_token:,.0f} tokens/s: about {runtime.progress.duration(eta)} for {steps:,} steps")
    if evaluation_eta:
        of_all = (
            f"{plan.rows * settings.seq_len:,} of {dataset.val.num_tokens:,}" if plan.rows < plan.split_rows else f"all {dataset.val.num_tokens:,}"
        )
        console.print(
            f"evaluation: {plan.num_evaluations:,} times {of_all} validation tokens{', and all of them at the end' if plan.whole_at_end else ''}: "
            f"about {runtime.progress.duration(evaluation_eta)}"
        )
    total = eta + evaluation_eta
    console.print(f"in all about {runtime.progress.duration(total)}, {100 * evaluation_eta / total:.0f} % of it for evaluation")
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


def _find_lr(model: "Model", config: TrainConfig, dataset: "Dataset", out: Path, console: Console) -> None:
    """Losses at rising learning rates, as a table and as a picture, and where to begin."""
    from cllm.runtime.device import resolve
    from cllm.train.lr_finder import as_rows, draw, find_learning_rate
    from cllm.train.run_folder import holds_run

    device, _ = resolve(config.train.device)
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
    elsewhere = ("--out", "NEW") if holds_run(out) else ()
    console.print(f"Begin with: {command('train', Path(config.data.path), '--learning-rate', f'{found.suggestion:g}', *elsewhere)}")
    console.result({**found.to_dict(), "optimizer": config.optim.optimizer, "picture": None if picture is None else str(picture)})


def _free_place(place: Path) -> Path:
    """This file, or one of its name and a number, so that nothing is replaced."""
    numbered = (place.with_stem(f"{place.stem}-{number}") for number in count(2))
    return next(each for each in chain([place], numbered) if not each.exists())


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.strip("\n").splitlines())
