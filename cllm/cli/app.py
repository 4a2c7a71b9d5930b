"""The `cllm` command: its subcommands, one file for each group of them, and what becomes of an error.

A command reads its options, calls the library and prints what came out. Whatever takes time to import is imported inside the command, so that
`cllm --help` stays quick. To add a command: a file with a `typer.Typer` of its own, and its line in the loop below.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from cllm import __version__
from cllm.cli import bench, checkpoint, evaluate, export, generate, machine, report, tokenizer, train
from cllm.cli.console import current, open_console
from cllm.runtime.errors import CLLMError, DataError

app = typer.Typer(
    name="cllm",
    help="Train small and medium language models from scratch on your own text, on a GPU or on nothing but a CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for group in (train, generate, evaluate, report, export, checkpoint, tokenizer, machine, bench):
    app.add_typer(group.app)

_UsageError: Any = typer.BadParameter.__base__  # wrong options; typer exports only this child of it


def _version(value: bool) -> None:
    if value:
        typer.echo(f"cllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def _fail(error: CLLMError) -> NoReturn:
    current().error(error)
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
    open_console("--json" in arguments)
    try:
        sys.exit(command(args=arguments, prog_name="cllm", standalone_mode=False) or 0)
    except _UsageError as error:
        error.show()
        current().result({"error": error.format_message(), "kind": type(error).__name__, "exit_status": 2})
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except CLLMError as error:
        _fail(error)
    except OSError as error:
        _fail(_disk_or_file_error(error))
