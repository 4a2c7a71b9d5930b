"""`cllm app` whose jobs are forked from a process that has imported the libraries: a job costs what it does, not 2 s of imports.

Run by `app_browser.py` as a program of `command_server.py`, before anything has started a thread. A job's command line does not show its words, and
nothing of the folder takes the place of a module; `tests/cllm/app/test_app_command.py` starts the app as it is and looks at both.
"""

import types

from forked import Forked, serve


def main() -> None:
    Forked.asked = serve()
    from cllm.app import process
    from cllm.cli import main as cllm

    process.subprocess = types.SimpleNamespace(Popen=Forked, DEVNULL=-3)
    cllm()
