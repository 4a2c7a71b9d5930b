"""`cllm doctor` and `cllm explain`: what this machine has, and what an operation runs on."""

from typing import Annotated

import typer

from cllm.cli.console import open_console
from cllm.cli.options import Json, Threads, examples
from cllm.runtime.errors import UserError

# What training and its reports use beside the kernels: a report of the machine tells their versions, and what is lost without them.
LIBRARIES = {
    "tokenizers": "",
    "safetensors": "",
    "tensorboardX": "for TensorBoard files beside metrics.jsonl. Install it: pip install 'cllm[log]'",
}

app = typer.Typer()


@app.command(epilog=examples("cllm doctor --json"))
def doctor(as_json: Json = False) -> None:
    """Show this machine and what each operation runs on. Says why, and what is missing for something better."""
    console = open_console(as_json)
    from cllm import kernels, runtime

    for library, missing in LIBRARIES.items():
        runtime.register_library(library, missing)
    report = runtime.describe(operations=kernels.OPERATIONS)
    console.print(report)
    console.result(report.to_dict())


@app.command(
    epilog=examples("cllm explain attention 1x1024x12x64 --set causal=true", "cllm explain matmul 512x768 768x3072 --dtype bfloat16 --threads 64")
)
def explain(
    operation: Annotated[str, typer.Argument(metavar="OP", help="attention, matmul, feed_forward, ...")],
    shapes: Annotated[list[str], typer.Argument(metavar="SHAPE...", help="Shapes of its inputs, as in 1x1024x12x64.")],
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Data type of the inputs.")] = "float32",
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another property of the work, as in causal=true. Can be given several times."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Device to compute on.")] = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show which backend an operation gets, and why. Says for the given shapes also how many workers it would use."""
    console = open_console(as_json)
    from cllm import kernels, runtime

    if operation not in kernels.OPERATIONS:
        raise UserError(f"unknown operation {operation!r}. Known: {', '.join(kernels.OPERATIONS)}.")
    with runtime.use(threads=threads):
        answer = runtime.explain(operation, *(_shape(each) for each in shapes), dtype=dtype, device=device, **dict(map(_option, options or [])))
    console.print(answer)
    console.result(answer.to_dict())


def _option(text: str) -> tuple[str, bool | int]:
    name, _, value = text.partition("=")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, int(value)
    except ValueError:
        raise UserError(f"--set takes NAME=VALUE with true, false or a whole number, as in causal=true; got {text!r}.") from None


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", "x").split("x"))
    except ValueError:
        raise UserError(f"a shape is whole numbers joined by x, as in 1x1024x12x64; got {text!r}.") from None
