"""The `cllm` command: its subcommands, one file for each group of them, and what becomes of an error.

A command reads its options, calls the library and prints what came out. Whatever takes time to import is imported inside the command, so that
`cllm --help` stays quick. To add a command: a file with a `typer.Typer` of its own, and its line in the loop below.
"""

import functools
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from cllm._version import __version__
from cllm.cli import (
    bench,
    chat,
    checkpoint,
    crawl,
    data,
    evaluate,
    export,
    generate,
    machine,
    prepare,
    report,
    review,
    serve,
    tokenizer,
    train,
    web_app,
)
from cllm.cli.console import ReaderGone, current, open_console, prepare_streams, silence_stdout
from cllm.cli.interrupt import interruptible, interruption, leave
from cllm.cli.mistakes import out_of_memory, system_error, wrong_usage
from cllm.distributed import launched
from cllm.monitor.stop_signals import Interrupted
from cllm.runtime.errors import CLLMError, DataError


class _Commands(typer.core.TyperGroup):
    """The subcommands. What Ctrl-C raises leaves them as an error of ours: typer answers a KeyboardInterrupt itself, without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise interruption(error) from None


app = typer.Typer(
    name="cllm",
    cls=_Commands,
    help="Train small and medium language models from scratch on your own text, on a GPU or on nothing but a CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for group in (crawl, prepare, data, train, generate, chat, serve, web_app, evaluate, review, report, export, checkpoint, tokenizer, machine, bench):
    app.add_typer(group.app)

_UsageError: Any = typer.BadParameter.__base__  # wrong options; typer exports only this child of it


def _version(value: bool) -> None:
    if value:
        typer.echo(f"cllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@functools.cache
def parser() -> Any:
    """All commands with their options, as click knows them."""
    return typer.main.get_command(app)


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of the `cllm` command. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    prepare_streams()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    arguments = sys.argv[1:] if argv is None else argv
    open_console("--json" in arguments)
    try:
        with interruptible():
            status = parser()(args=arguments, prog_name="cllm", standalone_mode=False) or 0
        sys.exit(status)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer does not export it
            typer.echo(error.format_message(), err=True)
            sys.exit(2)
        _fail(wrong_usage(error))
    except (typer.Abort, KeyboardInterrupt) as error:
        leave(interruption(error))
    except Interrupted as error:
        if launched():
            _fail(error)
        leave(error)
    except ReaderGone as error:
        sys.exit(error.exit_status)
    except CLLMError as error:
        _fail(error)
    except OSError as error:
        _fail(system_error(error))
    except (MemoryError, RuntimeError) as error:
        explained = out_of_memory(error)
        if explained is None:
            raise
        _fail(explained)


def _fail(error: CLLMError) -> NoReturn:
    try:
        current().error(error)
    except (OSError, DataError):  # nobody can read the object either; the line on stderr has said it
        silence_stdout()
    sys.exit(error.exit_status)
