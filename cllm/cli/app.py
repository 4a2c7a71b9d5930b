"""The `cllm` command. Each function here reads its options, calls one function of the library, and prints what came out."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cllm import __version__
from cllm.cli.console import Console, table
from cllm.runtime.errors import CheckpointError, CLLMError, DataError, UserError


def _examples(*lines: str) -> str:
    """The end of a --help page; the first character keeps the line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


app = typer.Typer(
    name="cllm",
    help="Train small and medium language models from scratch on your own text, on a GPU or on nothing but a CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
tokenizer_app = typer.Typer(help="Train, use and measure a tokenizer.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")

checkpoint_app = typer.Typer(help="Look into checkpoints, verify, compare and average them.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(checkpoint_app, name="checkpoint")

Json = Annotated[bool, typer.Option("--json", help="Progress to stderr; the last line of stdout is one JSON object.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="Upper limit of worker threads; any number gives the same bits.")]
Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A run, a checkpoint folder, a .cllm file or a Hugging Face folder.")]
Weights = Annotated[str | None, typer.Option(help="fp32, bf16 or int8 in memory; bf16 evaluates faster, bf16 and int8 write faster.")]

_UsageError: Any = typer.BadParameter.__base__  # wrong options; typer exports only this child of it

_console = Console()  # replaced by each command; `main` reports errors through it


def _open(as_json: bool) -> Console:
    global _console
    _console = Console(as_json)
    return _console


def _readable(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _load(path: str, need_tokenizer: bool = True, weights: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    from cllm.checkpoint.store import load
    from cllm.runtime.device import resolve

    # int8 weights have fast kernels on the CPU alone.
    place, _ = resolve("cpu" if device == "auto" and weights == "int8" else device)
    model, tokenizer = load(path, weights=weights)
    model.to(place)
    if need_tokenizer and tokenizer is None:
        raise DataError(f"{path} holds no tokenizer, so text cannot be read or written. Save one with it: cllm.save(model, path, tokenizer=...).")
    return model, tokenizer


# -- training ------------------------------------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "cllm train books/",
        "cllm train notes.txt --preset cllm-5m --epochs 3 --out runs/notes",
        "cllm train books/ --plan",
        "cllm train books/ --set optim.beta2=0.99",
        "cllm train --resume --out runs/books",
        "cllm train chats.jsonl --from runs/books --lora-rank 8",
    )
)
def train(
    data: Annotated[str | None, typer.Argument(help="Folder of text or source code, a file, JSONL (chats too), or a packed token folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the run lives [default: runs/ + the name of the data].")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings; flags win over it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out with its own settings; an error if there is none.")] = False,
    from_: Annotated[str | None, typer.Option("--from", help="Start from this model and its tokenizer: a run, .cllm or Hugging Face folder.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="With --from: train LoRA adapters of this rank instead of all weights.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bpe or char (trained on the data), or a tokenizer.json.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Threads = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or (on GPUs) fp16; weights and optimizer stay float32.")] = None,
    preset: Annotated[str | None, typer.Option(help="Named model sizes, cllm-1m to cllm-1b and gpt2.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens of a new BPE tokenizer.")] = None,
    embed_dim: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    num_kv_heads: Annotated[int | None, typer.Option(help="Key and value heads (grouped-query attention).")] = None,
    ffn_dim: Annotated[int | None, typer.Option(help="Width of the feed-forward layer.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of one training sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of one microbatch.")] = None,
    grad_accum: Annotated[int | None, typer.Option(help="Microbatches of one update.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer updates.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of --steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    min_lr: Annotated[float | None, typer.Option(help="Lowest learning rate.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Warm-up steps.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear, step, wsd, constant or plateau.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and of the data order.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep: Annotated[int | None, typer.Option(help="Newest checkpoints kept, beside the best.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    patience: Annotated[int | None, typer.Option(help="Evaluations without progress before stopping.")] = None,
    sample_every: Annotated[int | None, typer.Option(help="Steps between samples in samples.txt.")] = None,
    on_nonfinite: Annotated[str | None, typer.Option(help="stop, skip or rollback when a loss or gradient is not finite.")] = None,
    overfit_one_batch: Annotated[bool, typer.Option("--overfit-one-batch", help="Check a set-up: learn one batch by heart.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print sizes, memory, speed and every derived value, and stop.")] = False,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="Try rising learning rates for 100 steps, print and plot the losses, and stop.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model on DATA: tokenizer, packing and training in one go, each step cached; the same command continues an interrupted run."""
    flags = dict(locals())
    console = _open(as_json)
    for name in ("data", "out", "config", "resume", "plan", "find_lr", "set_", "as_json"):
        flags.pop(name)
    flags["start_from"] = flags.pop("from_")
    flags["overfit_one_batch"] = overfit_one_batch or None
    if data is not None:
        flags["data.path"] = data
    from cllm.cli.train import train_run

    train_run(console, flags=flags, sets=set_ or [], file=config, out=out, resume=resume, plan_only=plan, find_lr=find_lr)


@app.command(epilog=_examples("cllm pack books/ --tokenizer runs/books/tokenizer.json --out tokens/"))
def pack(
    data: Annotated[str, typer.Argument(help="Folder, file or JSONL of text.")],
    tokenizer: Annotated[str, typer.Option(help="tokenizer.json, or a run that has one.")],
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    val_fraction: Annotated[float, typer.Option(help="Share of the documents for validation.")] = 0.1,
    as_json: Json = False,
) -> None:
    """Pack text into token shards that `cllm train` and `cllm evaluate` read as they are."""
    console = _open(as_json)
    from cllm.data.pipeline import prepare
    from cllm.data.tokens.tokenizer import Tokenizer

    dataset = prepare(data, out, tokenizer=Tokenizer.load(_tokenizer_file(tokenizer)), val_fraction=val_fraction, log=console.print)
    summary = _dataset_summary(dataset)
    console.print(table([(key.replace("_", " "), _readable(value)) for key, value in summary.items()]))
    console.result({"out": str(out), **summary})


def _dataset_summary(dataset: Any) -> dict[str, Any]:
    return {
        "train_tokens": dataset.train.num_tokens,
        "train_documents": dataset.train.num_documents,
        "val_tokens": dataset.val.num_tokens,
        "val_documents": dataset.val.num_documents,
        "vocab_size": dataset.tokenizer.vocab_size,
        "tokenizer_hash": dataset.tokenizer.hash,
    }


# -- using a model ---------------------------------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "cllm generate runs/demo --prompt 'def '",
        "cllm generate runs/demo --prompt-file start.txt --temperature 0 --max-tokens 500",
    )
)
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest tokens that make up this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one's probability.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that occurred less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text at which to stop; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    samples: Annotated[int, typer.Option(help="How many continuations.")] = 1,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute every token from scratch (a check, slow).")] = False,
    stream: Annotated[bool, typer.Option(help="Print the text as it is written.")] = True,
    weights: Weights = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    console = _open(as_json)
    from cllm import runtime
    from cllm.generate.decoding import generate as run
    from cllm.generate.decoding import stream as run_stream

    if (prompt is None) == (prompt_file is None):
        raise UserError("give the text to continue either as --prompt or as --prompt-file.")
    if prompt_file is not None:
        prompt = _read_text(prompt_file)
    assert prompt is not None
    with runtime.use(threads=threads):
        model, tokenizer = _load(checkpoint, weights=weights, device=device)
        options: dict[str, Any] = dict(  # noqa: C408
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            use_cache=not no_cache,
        )
        if stream and samples == 1 and not as_json:
            console.print(prompt, end="")
            for piece in run_stream(model, tokenizer, prompt, seed=seed, **options):
                console.print(piece, end="")
            console.print()
            return
        results = run(model, tokenizer, prompt, seed=seed, samples=samples, **options)
    for number, each in enumerate(results, 1):
        if samples > 1:
            console.print(f"--- {number} of {samples} ---")
        console.print(prompt + each.text)
    first = results[0]
    console.result(
        {
            "prompt": prompt,
            "texts": [each.text for each in results],
            "tokens": [list(each.tokens) for each in results],
            "finish_reasons": [each.finish_reason for each in results],
            "prompt_tokens": first.prompt_tokens,
            "tokens_per_second": round(first.tokens_per_second, 2),
        }
    )


@app.command(epilog=_examples("cllm chat runs/helper", "cllm chat runs/helper --system 'Answer in one sentence.'"))
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Same seed, same answers.")] = 0,
    weights: Weights = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Talk with a model that was taught on chats: each line of standard input gets an answer, until it ends (Ctrl-D)."""
    console = _open(as_json)
    from cllm import runtime
    from cllm.cli.chat import converse

    with runtime.use(threads=threads):
        model, tokenizer = _load(checkpoint, weights=weights, device=device)
        messages = converse(console, model, tokenizer, sys.stdin, system, max_tokens=max_tokens, temperature=temperature, seed=seed)
    console.result({"messages": messages})


@app.command(
    epilog=_examples(
        "cllm evaluate runs/demo more-text/",
        "cllm evaluate runs/demo more-text/ --stride 128 --by file --worst 10",
        "cllm evaluate runs/demo --tasks my_task --task-path tasks/",
    )
)
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Argument(help="Folder, file or JSONL of text, or a packed token folder.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of context [default: the model's].")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; targets see seq_len - stride or more [default: seq_len].")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 8,
    confidence: Annotated[float, typer.Option(help="Of the intervals, by resampling whole documents.")] = 0.95,
    by: Annotated[str, typer.Option(help="Figures for each file or top folder: file, folder, or auto (folder where there are two).")] = "auto",
    worst: Annotated[int, typer.Option(help="How many of the documents with the highest loss to name.")] = 5,
    tasks: Annotated[str | None, typer.Option(help="Instead of DATA: tasks of lm-evaluation-harness, separated by commas. Never downloads.")] = None,
    task_path: Annotated[Path | None, typer.Option(help="Folder with your own task files (YAML).")] = None,
    weights: Weights = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Loss, perplexity, bits per byte and next-token accuracy of a model on DATA (all of it: the validation split where DATA is packed with one)."""
    console = _open(as_json)
    from cllm import runtime
    from cllm.cli.evaluate import evaluate_run, tasks_run

    if (data is None) == (tasks is None):
        raise UserError("give either DATA (text to predict) or --tasks (tasks of lm-evaluation-harness).")
    with runtime.use(threads=threads):
        model, tokenizer = _load(checkpoint, weights=weights, device=device)
        if tasks is not None:
            values = tasks_run(console, model, tokenizer, [name.strip() for name in tasks.split(",") if name.strip()], task_path, batch_size)
        else:
            assert data is not None
            values = evaluate_run(
                console, model, tokenizer, data, seq_len=seq_len, stride=stride, batch_size=batch_size, confidence=confidence, by=by, worst=worst
            )
    console.result({"checkpoint": checkpoint, "data": data, **values})


@app.command(epilog=_examples("cllm report runs/demo", "cllm report runs/small runs/large --out comparison.html"))
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of training runs: one for its report, several to compare them.")],
    out: Annotated[Path | None, typer.Option(help="File to write [default: report.html in RUN, comparison.html in the first of several].")] = None,
    as_json: Json = False,
) -> None:
    """One HTML page about a run, readable offline: curves, gradients, events, samples, settings. Several runs are compared."""
    console = _open(as_json)
    from cllm.report import write_report

    place, found = write_report(runs, out)
    for run in found:
        for problem in run.problems:
            console.print(f"{run.name}: {problem}")
    console.print(f"wrote {place}")
    best = [{"name": run.name, "step": run.last_step, "best_loss": run.best and run.best[1], "best_step": run.best and run.best[0]} for run in found]
    console.result({"out": str(place), "runs": best})


@app.command(
    epilog=_examples(
        "cllm export runs/demo --to hf --out demo-hf/",
        "cllm export runs/demo --to gguf --type q8_0 --out demo.gguf",
        "cllm export runs/demo --to cllm --out demo.cllm",
    )
)
def export(
    checkpoint: Checkpoint,
    to: Annotated[str, typer.Option(help="hf (a Hugging Face folder), gguf (one file for llama.cpp) or cllm (one file).")],
    out: Annotated[Path, typer.Option(help="Folder or file to write.")],
    type_: Annotated[str | None, typer.Option("--type", help="Numbers: f32, f16, bf16 or (gguf) q8_0 [default: as they are; gguf f32].")] = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format. Of a LoRA run, the merged model."""
    console = _open(as_json)
    from cllm.cli.export import check
    from cllm.cli.export import export as run

    check(to, type_)
    written = run(checkpoint, to, out, type_, *_load(checkpoint, need_tokenizer=False))
    console.print(f"wrote {out} ({written / 1e6:,.2f} MB)")
    console.result({"checkpoint": checkpoint, "format": to, "type": type_, "out": str(out), "bytes": written})


@app.command("import", epilog=_examples("cllm import llama-folder/ --out llama.cllm"))
def import_(
    folder: Annotated[str, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder with safetensors weights.")],
    out: Annotated[Path, typer.Option(help="The .cllm file to write.")],
    as_json: Json = False,
) -> None:
    """Read a Llama, Mistral, Qwen2, Qwen3 or GPT-2 folder of Hugging Face's layout into one .cllm file."""
    console = _open(as_json)
    from cllm.checkpoint.store import save
    from cllm.interop.hf import load_hf

    model, tokenizer = load_hf(folder)
    save(model, out, tokenizer=tokenizer)
    console.print(f"wrote {out}: {model.config.family} family, {model.config.num_parameters():,} parameters")
    console.result({"out": str(out), "family": model.config.family, "parameters": model.config.num_parameters(), "tokenizer": tokenizer is not None})


# -- checkpoints -----------------------------------------------------------------------------------------------------------------


@checkpoint_app.command("inspect", epilog=_examples("cllm checkpoint inspect runs/books", "cllm checkpoint inspect model.cllm --tensors"))
def checkpoint_inspect(
    checkpoint: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with dtype, shape and SHA-256.")] = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds; of a run, its newest good one."""
    console = _open(as_json)
    from cllm.checkpoint.tools import inspect

    found = inspect(checkpoint, console.print)
    best = found.get("best") or {}
    rows = [
        ("checkpoint", found["path"]), ("format version", found["format_version"]), ("written", found.get("saved")), ("step", found["step"]),
        ("tokens seen", found.get("tokens")), ("best validation loss before it", best.get("loss")), ("at step", best.get("step")),
        ("model", ", ".join(f"{key} {value}" for key, value in found["model"].items() if value is not None)),
        ("parameters", found["parameters"]), ("tokenizer", (found["tokenizer_hash"] or "none")[:12]),
        *((name, f"{size:,} bytes") for name, size in found.get("files", {}).items()),
    ]  # fmt: skip
    console.print(table([(name, _readable(value)) for name, value in rows if value is not None]))
    if tensors:
        console.print("tensors:")
        each = [(file, name, row["dtype"], "x".join(map(str, row["shape"])) or "1", row["sha256"][:16])
                for file, part in found["tensors"].items() for name, row in part.items()]  # fmt: skip
        console.print(table(each))
    console.result(found if tensors else {key: value for key, value in found.items() if key != "tensors"})


@checkpoint_app.command("verify", epilog=_examples("cllm checkpoint verify runs/books"))
def checkpoint_verify(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Read every byte of a checkpoint, or of all checkpoints of a run, against its SHA-256. Exit status 1 when any is damaged."""
    console = _open(as_json)
    from cllm.checkpoint.tools import verify_all

    results = verify_all(checkpoint)
    for path, problem in results:
        console.print(f"{'good' if problem is None else 'BAD '}  {path}{'' if problem is None else f': {problem}'}")
    damaged = [str(path) for path, problem in results if problem is not None]
    if damaged or not results:
        raise CheckpointError(f"{len(damaged)} of {len(results)} checkpoints are damaged." if results else f"{checkpoint} has no checkpoint yet.")
    console.result({"checkpoints": len(results), "damaged": []})


@checkpoint_app.command("diff", epilog=_examples("cllm checkpoint diff runs/a runs/b", "cllm checkpoint diff model.cllm runs/a"))
def checkpoint_diff(first: Checkpoint, second: Checkpoint, as_json: Json = False) -> None:
    """Compare two models bit by bit: configuration, tokenizer, and how far each weight has moved."""
    console = _open(as_json)
    from cllm.checkpoint.tools import diff

    found = diff(first, second, console.print)
    for key, (a, b) in found.config.items():
        console.print(f"{key}: {a} there, {b} here")
    for title, names in (("only in the first", found.only_first), ("only in the second", found.only_second)):
        console.print("\n".join(f"{title}: {name}" for name in names), end="\n" if names else "")
    for name, (a, b) in found.shapes.items():
        console.print(f"{name}: {a} against {b}")
    if found.changed:
        rows = [(name, f"{largest:.3e}", "-" if share is None else f"{share:.3e}") for name, (largest, share) in found.changed.items()]
        console.print(table([("changed", "largest difference", "relative norm"), *rows]))
    if found.tokenizer:
        console.print("the tokenizers differ")
    console.print("identical" if found.identical else f"{found.same} tensors are the same, {len(found.changed)} changed")
    console.result(found.to_dict())


@checkpoint_app.command("average", epilog=_examples("cllm checkpoint average runs/books --last 5 --out average.cllm"))
def checkpoint_average(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CKPT...", help="One run, or two and more checkpoints of one model.")],
    out: Annotated[Path, typer.Option(help="The .cllm file to write.")],
    last: Annotated[int | None, typer.Option(min=2, help="Only so many newest checkpoints of the run.")] = None,
    as_json: Json = False,
) -> None:
    """The mean of the weights of several checkpoints as one model; often better than the last of them."""
    console = _open(as_json)
    from cllm.checkpoint.store import save
    from cllm.checkpoint.tools import average

    model, tokenizer, used = average(checkpoints, last, console.print)
    save(model, out, tokenizer=tokenizer)
    console.print(f"wrote {out}: the mean of {len(used)} checkpoints")
    console.result({"out": str(out), "averaged": used})


# -- tokenizer -------------------------------------------------------------------------------------------------------------------


def _tokenizer_file(path: str) -> Path:
    """A tokenizer.json, or the one inside a run or Hugging Face folder."""
    place = Path(path)
    return place / "tokenizer.json" if place.is_dir() else place


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Convert it first.") from error


@tokenizer_app.command("train", epilog=_examples("cllm tokenizer train books/ --vocab-size 8192 --out tokenizer.json"))
def tokenizer_train(
    data: Annotated[str, typer.Argument(help="Folder, file or JSONL of text.")],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write.")] = Path("tokenizer.json"),
    vocab_size: Annotated[int, typer.Option(help="Number of tokens (bpe).")] = 4096,
    kind: Annotated[str, typer.Option(help="bpe or char.")] = "bpe",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on DATA."""
    console = _open(as_json)
    from cllm.data.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(data, vocab_size=vocab_size, kind=kind)
    tokenizer.save(out)
    console.print(f"wrote {out}: {tokenizer.vocab_size:,} tokens, {tokenizer.hash[:12]}")
    console.result({"out": str(out), "vocab_size": tokenizer.vocab_size, "kind": kind, "hash": tokenizer.hash})


@tokenizer_app.command("encode", epilog=_examples("cllm tokenizer encode runs/demo 'def main():'"))
def tokenizer_encode(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer.json or a run.")],
    text: Annotated[str | None, typer.Argument(help="Text; without it, standard input.")] = None,
    as_json: Json = False,
) -> None:
    """Text to token ids."""
    console = _open(as_json)
    from cllm.data.tokens.tokenizer import Tokenizer

    ids = Tokenizer.load(_tokenizer_file(tokenizer)).encode(sys.stdin.read() if text is None else text)
    console.print(" ".join(map(str, ids)))
    console.result({"tokens": ids, "count": len(ids)})


@tokenizer_app.command("decode", epilog=_examples("cllm tokenizer decode runs/demo 412 87 9"))
def tokenizer_decode(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer.json or a run.")],
    ids: Annotated[list[int] | None, typer.Argument(help="Token ids; without them, standard input.")] = None,
    as_json: Json = False,
) -> None:
    """Token ids to text."""
    console = _open(as_json)
    from cllm.data.tokens.tokenizer import Tokenizer

    if ids is None:
        try:
            ids = [int(word) for word in sys.stdin.read().split()]
        except ValueError as error:
            raise UserError(f"token ids must be whole numbers ({error}).") from error
    text = Tokenizer.load(_tokenizer_file(tokenizer)).decode(ids)
    console.print(text)
    console.result({"text": text})


@tokenizer_app.command("stats", epilog=_examples("cllm tokenizer stats runs/demo books/"))
def tokenizer_stats(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer.json or a run.")],
    data: Annotated[str, typer.Argument(help="Folder, file or JSONL of text.")],
    as_json: Json = False,
) -> None:
    """How well a tokenizer fits DATA: bytes and characters per token, share of the vocabulary in use."""
    console = _open(as_json)
    from cllm.data.tokens.tokenizer import Tokenizer

    stats = Tokenizer.load(_tokenizer_file(tokenizer)).stats(data)
    console.print(table([(key.replace("_", " "), _readable(value)) for key, value in stats.items()]))
    console.result(stats)


# -- the machine -----------------------------------------------------------------------------------------------------------------


@app.command(epilog=_examples("cllm doctor --json"))
def doctor(as_json: Json = False) -> None:
    """What this machine has, what each operation runs on and why, and what is missing for something better."""
    console = _open(as_json)
    from cllm import kernels, runtime

    report = runtime.describe(operations=kernels.OPERATIONS)
    console.print(report)
    console.result(report.to_dict())


@app.command(epilog=_examples("cllm explain attention 1x1024x12x64", "cllm explain matmul 512x768 768x3072 --dtype bfloat16 --threads 64"))
def explain(
    operation: Annotated[str, typer.Argument(metavar="OP", help="attention, matmul, feed_forward, ...")],
    shapes: Annotated[list[str], typer.Argument(metavar="SHAPE...", help="Shapes of its inputs, as in 1x1024x12x64.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Which backend and how many workers one operation would get for these shapes, and why."""
    console = _open(as_json)
    from cllm import kernels, runtime

    if operation not in kernels.OPERATIONS:
        raise UserError(f"unknown operation {operation!r}. Known: {', '.join(kernels.OPERATIONS)}.")
    with runtime.use(threads=threads):
        answer = runtime.explain(operation, *(_shape(each) for each in shapes), dtype=dtype, device=device)
    console.print(answer)
    console.result(answer.to_dict())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=_examples("cllm bench train --shapes gpt2 --precision bf16", "cllm bench scaling --plot scaling.png", "cllm bench kernels -- --help"),
)
def bench(
    context: typer.Context,
    benchmark: Annotated[str, typer.Argument(metavar="NAME", help="kernels, train, generate, scaling or memory.")],
    as_json: Json = False,
) -> None:
    """Measure this machine against PyTorch and its own limits: runs profiling/NAME.py of the repository with all further options."""
    console = _open(as_json)
    from cllm.cli.bench import bench as run

    run(benchmark, context.args, console)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", "x").split("x"))
    except ValueError:
        raise UserError(f"a shape is whole numbers joined by x, as in 1x1024x12x64; got {text!r}.") from None


# -- start -----------------------------------------------------------------------------------------------------------------------


def _version(value: bool) -> None:
    if value:
        typer.echo(f"cllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def _fail(error: CLLMError) -> NoReturn:
    _console.error(error)
    sys.exit(error.exit_status)


def _disk_or_file_error(error: OSError) -> CLLMError:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"the disk is full{where}. Free some space and run the same command again; nothing that was complete is lost.")
    return DataError(f"{(error.strerror or str(error)).lower()}{where}.")


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of the `cllm` command. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `cllm ... | head` ends quietly
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    command: Callable[..., Any] = typer.main.get_command(app)
    arguments = sys.argv[1:] if argv is None else argv
    _open("--json" in arguments)
    try:
        sys.exit(command(args=arguments, prog_name="cllm", standalone_mode=False) or 0)
    except _UsageError as error:
        error.show()
        _console.result({"error": error.format_message(), "kind": type(error).__name__, "exit_status": 2})
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except CLLMError as error:
        _fail(error)
    except OSError as error:
        _fail(_disk_or_file_error(error))
