"""The command line."""

import os
import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """The `cllm` command. Ctrl-C ends it without a traceback from the start, while modules are still being imported."""
    signal.signal(signal.SIGINT, _leave)
    from cllm.cli.app import main as run
    from cllm.runtime import progress_file

    progress_file.begin()
    status: object = 1  # of an error that nobody expected
    try:
        run()
    except SystemExit as error:
        status = error.code or 0
        raise
    finally:
        progress_file.ended(status if isinstance(status, int) else 1)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
