"""The command line."""

import os
import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """The `cllm` command. Ctrl-C ends it without a traceback from the start, while modules are still being imported."""
    signal.signal(signal.SIGINT, _leave)
    from cllm.cli.app import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
