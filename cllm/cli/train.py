"""`cllm train`: from a folder of text to a trained model. Each part is one call; what they say on the way is for the person who waits."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm import distributed, runtime
from cllm.cli.console import Console, open_console, table
from cllm.cli.options import Json, examples, option, with_settings
from cllm.config.model import ModelConfig
from cllm.config.schedule import BatchRamp
from cllm.config.schema import SETTINGS, full_key
from cllm.config.train import TrainConfig
from cllm.runtime.errors import UserError
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.data import Dataset
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.distributed.world import World
    from cllm.model.model import Model

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
    """Settings -> tokenizer and tokens -> model -> training -> a sample and the next commands. With `plan_only` or
    `find_lr` no run is made."""
    if resume and out is None:
        raise UserError("--resume needs --out with the run to continue, as in cllm train --resume --out runs/demo.")
    if resume and file is None:
        assert out is not None
        file = out / "config.toml"
        if not file.exists():
            raise UserError(f"{out} holds no run to continue (no config.toml). Start one with: {command('train', 'DATA', '--out', out)}")
    with distributed.fail_together():
        config = TrainConfig.from_layers(file=file, flags=flags, sets=sets)
    if not config.data.path:
        raise UserError("nothing to learn from: give a folder or file of text, as in cllm train books/.")
    from cllm.runtime.device import resolve

    if distributed.launched():
        from cllm.distributed.session import session

        with session(config.train.device, config.train.timeout) as world:
            _train(config, console, out or default_run(config.data.path), resume, plan_only, find_lr, world)
        return
    resolve(config.train.device)  # a GPU that is not there is said before any work
    _train(config, console, out or default_run(config.data.path), resume, plan_only, find_lr, None)


def _train(config: TrainConfig, console: Console, out: Path, resume: bool, plan_only: bool, find_lr: bool, world: "World | None") -> None:
    with runtime.use(threads=config.train.threads):
        from cllm.data.tokens.chat import check_fit
        from cllm.model.model import Model
        from cllm.train.finetune import adapt, start

        console.print(runtime.describe().brief())

        started = start(config, out)
        if started is not None:
            config, model, tokenizer = started
            dataset = _prepare_together(config, out, console, tokenizer, world)
        else:
            dataset = _prepare_together(config, out, console, None, world)
            model = Model(config.model_config(_vocabulary_rows(dataset.tokenizer.vocab_size)), seed=config.train.seed)
        model_config = model.config
        config = config.resolve(model_config, dataset.train.num_tokens)
        check_fit(dataset, config.train.seq_len, model_config.max_seq_len, console.print)
        _print_settings(config, model_config, dataset, console)
        if plan_only:
            _plan(model, config, dataset, console)
            return
        if find_lr:
            if world is not None:
                raise UserError("--find-lr works in one process. Run it without torchrun.")
            _find_lr(model, config, dataset, out, console)
            return
        from cllm.train.samples import sample_text
        from cllm.train.trainer import Trainer

        model = adapt(config, model, dataset.tokenizer, out)
        trainer = Trainer(model, dataset, config, out=out, tokenizer=dataset.tokenizer)
        result = trainer.fit(resume=True if resume else "auto")
        trained = trainer.whole_model()
        if trained is None:
            return
        sample = sample_text(trained, dataset.tokenizer, dataset.train)
    console.print(f"\nA sample, starting from nothing:\n\n{_indented(sample)}\n")
    if result.validation is not None:
        console.print(f"Validation: {result.validation}")
    console.print(f"The model is in {out} ({model_config.num_parameters():,} parameters). Next:")
    talks = dataset.info.get("kind") == "chat"
    console.print(f"  {command('chat', out) if talks else command('generate', out, '--prompt', 'The ', '--temperature', '0.7')}")
    console.print(f"  {command('evaluate', out, Path(config.data.path))}")
    console.print(f"  {command('report', out)}")
    console.print(f"  {command('export', out, '--to', 'hf', '--out', Path(f'{out}-hf'))}")
    console.result({**result.to_dict(), "parameters": model_config.num_parameters(), "sample": sample})


def default_run(data: str) -> Path:
    """runs/NAME after the folder or file that is learnt from."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(os.path.abspath(data)).stem).strip("-.") or "run"
    return Path("runs") / name


def _vocabulary_rows(tokens: int) -> int:
    """Rows of the embedding: the tokenizer's tokens; large vocabularies are filled up to a multiple of 64, which matrix tiles like."""
    return tokens if tokens < 1024 else -(-tokens // 64) * 64


def _prepare_together(config: TrainConfig, out: Path, console: Console, tokenizer: "Tokenizer | None", world: "World | None") -> "Dataset":
    """The first of several processes packs; the others find it in the cache."""
    if world is None:
        return _prepare(config, out, console, tokenizer)
    console.print(f"parallel {world.size} processes, {world.local_size} on each machine; train.parallel = {config.train.parallel}")
    prepared: list[Dataset] = []
    world.from_first(lambda: prepared.append(_prepare(config, out, console, tokenizer)))
    return prepared[0] if prepared else _prepare(config, out, console, tokenizer)


def _prepare(config: TrainConfig, out: Path, console: Console, tokenizer: "Tokenizer | None" = None) -> "Dataset":
    from cllm.data.documents.scan import Reading
    from cllm.data.pipeline import prepare
    from cllm.data.tokens.chat import is_chat, prepare_chat

    settings = config.data
    exclude = [Path(settings.path) / part.strip() for part in settings.exclude.split(",") if part.strip()]
    if not settings.text_field and is_chat(settings.path):
        if tokenizer is None:
            raise UserError(
                f"{settings.path} holds chats, which teach a trained model to answer. Give the model with --from. "
                "To learn one field of them as plain text instead, name it: --set data.text_field=NAME."
            )
        return prepare_chat(settings.path, out / "data", tokenizer, settings.val_fraction, exclude=exclude, log=console.print)
    return prepare(
        settings.path,
        out / "data",
        tokenizer=tokenizer or settings.tokenizer,
        vocab_size=settings.vocab_size,
        val_fraction=settings.val_fraction,
        exclude=exclude,
        reading=Reading.of(settings.text_field, settings.separator),
        log=console.print,
    )


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


def _plan(model: "Model", config: TrainConfig, dataset: "Dataset", console: Console) -> None:
    """Memory predicted, speed measured over a few real steps whose result is thrown away."""
    from cllm.model.memory import choose_recompute, predict
    from cllm.runtime.device import resolve
    from cllm.train.build import make_batches, make_step
    from cllm.train.evaluations import predict_seconds

    settings = config.train
    steps = settings.steps or 0
    device, _ = resolve(settings.device)
    sizes = model.config, settings.batch_size, settings.seq_len, settings.precision
    model.to(device).recompute, _ = choose_recompute(settings.recompute, *sizes, device)
    background = settings.async_checkpoint and device.type == "cpu"  # of a GPU's run the copy lies in the host's memory
    memory = predict(*sizes, model.recompute, config.optim.optimizer, average=config.optim.ema > 0, background_checkpoint=background)
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
    console.print("predicted memory:")
    parts = [*memory.rows(), ("total", memory.total, "")]
    console.print(table([(name, f"{count / 1e6:,.0f} MB", what) for name, count, what in parts]))
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

    device, _ = resolve(config.train.device)
    found = find_learning_rate(model.to(device), dataset.train, config)
    console.print(table(as_rows(found)))
    picture: Path | None = out / "find-lr.png"
    if not draw(found, out / "find-lr.png"):
        picture = None
        console.print('matplotlib is not installed, so there is no picture. Install it: pip install "cllm[plot]"')
    else:
        console.print(f"The curve is in {picture}.")
    if not found.diverged:
        console.print("The loss did not rise again up to the highest learning rate tried: take the suggestion with care.")
    console.print(f"Begin with: {command('train', Path(config.data.path), '--learning-rate', f'{found.suggestion:g}')}")
    console.result({**found.to_dict(), "optimizer": config.optim.optimizer, "picture": None if picture is None else str(picture)})


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.strip("\n").splitlines())
