"""`cllm bench`: runs the measuring scripts of the repository's profiling/ folder, which are no part of an installed package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from cllm.cli.console import Console, open_console
from cllm.cli.options import Json, examples
from cllm.runtime.errors import CLLMError, UserError

BENCHMARKS = ("kernels", "train", "generate", "scaling", "memory")
CHECKOUT = Path(__file__).resolve().parents[2]

app = typer.Typer()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples("cllm bench train --shapes gpt2 --precision bf16", "cllm bench scaling --plot scaling.png", "cllm bench kernels -- --help"),
)
def bench(
    context: typer.Context,
    benchmark: Annotated[str, typer.Argument(metavar="NAME", help="What to measure: kernels, train, generate, scaling or memory.")],
    as_json: Json = False,
) -> None:
    """Measure this machine against PyTorch and its limits. Runs profiling/NAME.py of the repository with all further options."""
    console = open_console(as_json)
    run(benchmark, context.args, console)


def script(name: str, checkout: Path = CHECKOUT) -> Path:
    """The script of one benchmark. Raises UserError for an unknown one, and where cllm was installed without the repository."""
    if name not in BENCHMARKS:
        nearest = get_close_matches(name, BENCHMARKS, n=1)
        raise UserError(f"unknown benchmark {name!r}{f'; did you mean {nearest[0]}?' if nearest else '.'} There are: {', '.join(BENCHMARKS)}.")
    path = checkout / "profiling" / f"{name}.py"
    if not (checkout / "pyproject.toml").is_file() or not path.is_file():
        raise UserError(
            f"cllm bench {name} needs profiling/{name}.py, which is in the repository and not in this installed package. "
            f"Get the repository, install it with `pip install -e .`, and run there: python profiling/{name}.py"
        )
    return path


def run(name: str, arguments: Sequence[str], console: Console, checkout: Path = CHECKOUT) -> None:
    """Runs one benchmark with the script's own arguments; its rows become the result of the command."""
    command = [sys.executable, str(script(name, checkout)), *arguments]
    last = ""
    if not console.as_json:
        status = subprocess.run(command).returncode
    else:
        with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:  # all but the last line is for people
                    if last:
                        console.print(last, end="")
                    last = line
            except BaseException:
                process.kill()  # nobody reads any more what it measures
                raise
            status = process.wait()
    rows = _rows(last)
    if last and rows is None:
        console.print(last, end="")
    if status:
        error = UserError if status == UserError.exit_status else CLLMError
        raise error(f"profiling/{name}.py ended with status {status}; what it said is above.")
    if console.as_json and rows is None:
        raise CLLMError(f"profiling/{name}.py printed no JSON on its last line, expected its rows. Run it alone to see what it does.")
    console.result({"benchmark": name, "rows": rows})


def _rows(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
