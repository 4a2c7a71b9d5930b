"""`torchrun` whose processes are forked from one that has imported the libraries. The command of the README is run with processes of their own.

Run as a program of `command_server.py`: the folder in which each process leaves its number under its rank, and what follows `torchrun`.
"""

import sys
from pathlib import Path
from typing import Any

from forked import Forked, serve


def main() -> None:
    Forked.asked = serve()
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.run import main as torchrun

    folder = Path(sys.argv.pop(1))

    class Process(Forked):
        def __init__(self, args: Any, env: dict[str, str], **more: Any) -> None:
            super().__init__(args, env=env, **more)
            (folder / env["RANK"]).write_text(str(self.pid))

    subprocess_handler.Popen = Process  # type: ignore[assignment, misc]
    torchrun()
