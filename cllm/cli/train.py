"""`cllm train`: from a folder of text to a trained model. Each part is one call; what they say on the way is for the person who waits."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm import distributed, runtime
from cllm.cli import train_looks
from cllm.cli.console import Console, open_console
from cllm.cli.interrupt import stopping_with
from cllm.cli.options import Json, examples, option, text_option, with_settings
from cllm.cli.train_setup import check_before_work, read_settings
from cllm.config.follow import FOLLOW, FollowSettings
from cllm.config.schema import SETTINGS, full_key
from cllm.config.train import TrainConfig
from cllm.monitor.stop_signals import BEFORE_TRAINING
from cllm.runtime.errors import UserError
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.distributed.world import World

_LEAST_FOR_A_SAMPLE = 1.0  # seconds that have to be left of a run's time; half of them are for the sample
# The settings that most users change; --set reaches all of them.
FLAGS = {full_key(name): SETTINGS[full_key(name)] for name in (
    "start_from", "lora_rank", "tokenizer", "tokenizer_sample", "device", "threads", "precision", "preset", "architecture", "vocab_size",
    "embed_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "seq_len", "batch_size", "grad_accum", "steps", "epochs", "hours", "minutes",
    "learning_rate", "min_lr", "warmup", "schedule", "dropout", "fim_rate", "seed", "checkpoint_every", "keep", "eval_every", "patience",
    "sample_every", "on_nonfinite", "overfit_one_batch",
)}  # fmt: skip

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm train books/",
        "cllm train notes.txt --preset cllm-5m --epochs 3 --out runs/notes",
        "cllm train books/ --hours 2",
        "cllm train books/ --plan",
        "cllm train books/ --set optim.beta2=0.99",
        "cllm train --resume --out runs/books",
        "cllm train chats.jsonl --from runs/books --lora-rank 8",
        "cllm train notes/ --follow --out runs/notes",
    )
)
@with_settings(FLAGS | FOLLOW)
def train(
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Folder or file of text, source code, JSON, CSV or chats, or a packed token folder.")
    ] = None,
    out: Annotated[Path | None, option("--out", Path, "Folder of the run. [default: runs/ and the name of the data]")] = None,
    config: Annotated[Path | None, option("--config", Path, "TOML file with settings. Flags override it.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out with its own settings. It is an error if there is none.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print model size, memory, speed, time and all derived settings, without training.")] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Try rising learning rates for 100 steps and print and plot the losses, without a run.")
    ] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Go on learning while DATA grows: in rounds, each kept only where new text becomes easier and old text hardly harder. DATA may "
            "be the folder of a crawl.",
        ),
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="With --follow: end when there is nothing new instead of waiting for it.")] = False,
    set_: Annotated[
        list[str] | None, text_option("--set", "Any other setting, as in optim.beta2=0.99. Can be given several times.", metavar="SECTION.KEY=VALUE")
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train a model on text, source code or chats. DATA is read, a tokenizer is trained, the text is packed into tokens and the model is trained on
    them. Each step is cached, and the same command continues a run that was interrupted."""
    following = {key: settings.pop(key) for key in FOLLOW}
    flags = {"data.path": data, **settings}
    console = open_console(as_json, needs_reader=False)
    if follow:
        _follow(console, flags, set_ or [], config, out, following, once=once, excluded=(resume, plan, find_lr))
        return
    unused = [FOLLOW[key].option for key, value in following.items() if value is not None] + ["--once"] * once
    if unused:
        raise UserError(f"{unused[0]} belongs to --follow. Give both, or neither.")
    with stopping_with("interrupted; nothing was trained" if plan or find_lr else BEFORE_TRAINING):
        train_run(console, flags=flags, sets=set_ or [], file=config, out=out, resume=resume, plan_only=plan, find_lr=find_lr)


def _follow(
    console: Console,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    file: Path | None,
    out: Path | None,
    following: Mapping[str, str | None],
    *,
    once: bool,
    excluded: tuple[bool, ...],
) -> None:
    from cllm.cli.follow import WAITING, follow, is_crawl
    from cllm.cli.options import read_settings as read_given

    if any(excluded):
        raise UserError("--follow excludes --resume (the same command goes on by itself), --plan and --find-lr. Leave them out.")
    if distributed.launched():
        raise UserError("--follow works in one process. Run it without torchrun.")
    given = read_given(FOLLOW, following)
    config = read_settings(flags, sets, file, out, resume=False)
    if config.seconds is not None:
        raise UserError("--hours and --minutes are for one training, and --follow goes on for as long as there is new text. Leave one of them out.")
    check_before_work(config, out, text=not is_crawl(config.data.path))
    with stopping_with(WAITING), runtime.use(threads=config.train.threads):
        follow(console, config, FollowSettings(**{key.partition(".")[2]: value for key, value in given.items()}), out, once)


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
        if find_lr and distributed.launched():
            raise UserError("--find-lr works in one process. Run it without torchrun.")
        config = read_settings(flags, sets, file, out, resume)
        if config.seconds is not None and distributed.launched():
            raise UserError("--hours and --minutes work in one process. Give --steps or --epochs, or run it without torchrun.")
        check_before_work(config, out)
    work = partial(_train, resume=resume)
    if plan_only:
        work = partial(train_looks.look, train_looks.plan)
    elif find_lr:
        given = train_looks.words_of(flags, sets, file, out, resume)
        work = partial(train_looks.look, partial(train_looks.find_lr, given=given))
    with _session(config) as world, runtime.use(threads=config.train.threads):
        work(config, out, console, world)


def _session(config: TrainConfig) -> "AbstractContextManager[World | None]":
    """The processes that torchrun has started; None for a process that is alone, which imports nothing of them."""
    if not distributed.launched():
        return nullcontext()
    from cllm.distributed.session import session

    return session(config.train.device, config.train.timeout)


def _train(config: TrainConfig, out: Path | None, console: Console, world: "World | None", *, resume: bool) -> None:
    """Trains, then shows a sample and the next commands; only the first of several processes does that."""
    from cllm.cli.training import train_in
    from cllm.train.samples import sample_text

    trained = train_in(out, config, console, world, resume=resume)
    if trained is None:
        return
    run, result, dataset = trained.run, trained.result, trained.dataset
    sample = None
    began = time.perf_counter()
    left = math.inf if trained.spent is None or config.seconds is None else config.seconds - trained.spent
    if left >= _LEAST_FOR_A_SAMPLE:
        with stopping_with(f"interrupted while a sample was written; the run in {run} is complete"):
            sample = sample_text(trained.model, dataset.tokenizer, dataset.train, seconds=left / 2)
        console.print(f"\nA sample, starting from nothing:\n\n{_shown(sample)}\n")
    if result.validation is not None:
        console.print(f"Validation: {result.validation}")
    if result.stopped_early and result.resumed_from == result.step:
        longer = command("train", "--resume", "--out", run, "--patience", "MORE")
        console.print(f"It had stopped early after step {result.step:,}. To train it longer: {longer}")
    if trained.spent is not None and config.seconds is not None:
        duration = runtime.progress.duration
        console.print(f"It has taken {duration(trained.spent + time.perf_counter() - began)} of the {duration(config.seconds)} that it may take.")
    parameters = trained.model.config.num_parameters()
    console.print(f"The model is in {run} ({parameters:,} parameters). Next:")
    console.print(_next_commands(run, chats=dataset.info.get("kind") == "chat", for_others=not trained.model.config.only_here))
    console.result({**result.to_dict(), "parameters": parameters, "sample": sample})


def _next_commands(run: Path, chats: bool, for_others: bool) -> str:
    """What can be done with a trained run. It is evaluated on other text, because that which it learnt from tells only how well it remembers.

    for_others: whether other programs can run the model."""
    talk = command("chat", run) if chats else command("generate", run, "--prompt", "The ", "--temperature", "0.7")
    evaluate = command("evaluate", run, "OTHER-CHATS" if chats else "OTHER-TEXT")
    to = ("hf", Path(f"{run}-hf")) if for_others else ("cllm", Path(f"{run}.cllm"))
    export = command("export", run, "--to", to[0], "--out", to[1])
    return "\n".join(f"  {each}" for each in (talk, evaluate, command("report", run), export))


def _shown(sample: str) -> str:
    lines = sample.strip("\n").splitlines() or ["(none: the model ended its text at once)"]
    return "\n".join(f"    {line}" for line in lines)
