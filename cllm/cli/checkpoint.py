"""`cllm checkpoint`: look into checkpoints, verify, compare and average them."""

from pathlib import Path
from typing import Annotated

import typer

from cllm.cli.console import open_console, readable, table
from cllm.cli.options import Checkpoint, Json, argument, check_model, examples, option, require_suffix
from cllm.files import MODEL, check_writable
from cllm.runtime.errors import CheckpointError

app = typer.Typer()
group = typer.Typer(help="Inspect, verify, compare and average checkpoints.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="checkpoint")


@group.command("inspect", epilog=examples("cllm checkpoint inspect runs/books", "cllm checkpoint inspect model.cllm --tensors"))
def inspect(
    checkpoint: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with dtype, shape and SHA-256.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds. Of a run, that is its newest undamaged checkpoint."""
    console = open_console(as_json)
    check_model(checkpoint)
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
    console.print(table([(name, readable(value)) for name, value in rows if value is not None]))
    if tensors:
        console.print("tensors:")
        each = [(file, name, row["dtype"], "x".join(map(str, row["shape"])) or "1", row["sha256"][:16])
                for file, part in found["tensors"].items() for name, row in part.items()]  # fmt: skip
        console.print(table(each))
    console.result(found if tensors else {key: value for key, value in found.items() if key != "tensors"})


@group.command("verify", epilog=examples("cllm checkpoint verify runs/books"))
def verify(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Check checkpoints against their SHA-256. Reads every byte of a checkpoint, or of all checkpoints of a run. The exit status is 1 if any is
    damaged."""
    console = open_console(as_json)
    check_model(checkpoint)
    from cllm.checkpoint.tools import verify_all

    results = verify_all(checkpoint)
    for path, problem in results:
        console.print(f"{'good' if problem is None else 'BAD '}  {path}{'' if problem is None else f': {problem}'}")
    damaged = [str(path) for path, problem in results if problem is not None]
    if damaged or not results:
        raise CheckpointError(f"{len(damaged)} of {len(results)} checkpoints are damaged." if results else f"{checkpoint} has no checkpoint yet.")
    console.result({"checkpoints": len(results), "damaged": []})


@group.command("diff", epilog=examples("cllm checkpoint diff runs/a runs/b", "cllm checkpoint diff model.cllm runs/a"))
def diff(first: Checkpoint, second: Checkpoint, as_json: Json = False) -> None:
    """Compare two models bit by bit. Prints differences in configuration and tokenizer, and how far each weight has moved."""
    console = open_console(as_json)
    for each in (first, second):
        check_model(each)
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


@group.command("average", epilog=examples("cllm checkpoint average runs/books --last 5 --out average.cllm"))
def average(
    checkpoints: Annotated[list[str], argument("CKPT...", "One run, or two or more checkpoints of the same model.")],
    out: Annotated[Path, option("--out", Path, "The .cllm file to write.")],
    last: Annotated[
        int | None,
        option(
            "--last",
            int,
            "Number of newest checkpoints of the run to average. [default: all]",
            unit="checkpoints",
            optional=True,
            at_least=2,
            example=5,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Average the weights of several checkpoints. The result is one model, often better than the last checkpoint."""
    console = open_console(as_json)
    require_suffix(out, ".cllm")
    check_writable(out, MODEL)
    for each in checkpoints:
        check_model(each)
    from cllm.checkpoint.model_file import save
    from cllm.checkpoint.tools import average

    model, tokenizer, used = average(checkpoints, last, console.print)
    save(model, out, tokenizer=tokenizer)
    console.print(f"wrote {out}: the mean of {len(used)} checkpoints")
    console.result({"out": str(out), "averaged": used})
