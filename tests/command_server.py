"""A process that has imported the libraries already and forks for each command: a command in it costs what the command does, not 2 s of imports.

Run by `command.py`, which sends a request for each command: what was typed or the Python program, the folder, the environment where it differs,
and the four files of the new process. Programs come out of a process that has imported nothing of CLLM, commands out of a copy of it that has
imported the command line, as each of them begins by doing; that reads nothing of the environment, as `tests/cllm/cli/test_options.py` makes sure.
No library has started a thread before the fork. So what a command imports, and in which order, is as in a process of its own.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import types
from contextlib import suppress
from typing import Any

# What commands import sooner or later.
REQUIRED = (
    "numba.np.linalg", "rich.console", "rich.progress", "safetensors", "tokenizers", "torch.nn.functional", "typer",
)  # fmt: skip
OPTIONAL = ("aiohttp", "fastapi", "psutil", "pydantic.type_adapter", "tensorboardX", "typer._adapters", "uvicorn")
# What numba imports when it first compiles or loads a function.
NUMBA = (
    "core.inline_closurecall", "core.optional", "cpython.charseq", "cpython.cmathimpl", "cpython.enumimpl", "cpython.heapq", "cpython.mathimpl",
    "cpython.printimpl", "cpython.randomimpl", "cpython.setobj", "experimental.function_type", "experimental.jitclass.base", "misc.cffiimpl",
    "misc.gdb_hook", "misc.literal", "np.arraymath", "np.npdatetime", "np.npyimpl", "np.polynomial.polynomial_functions",
    "np.random.generator_methods", "np.random.legacy", "np.types.datetime_registry", "typed.dictimpl", "typed.typeddict", "typed.typedlist",
    "typed.typedset",
)  # fmt: skip


def import_libraries() -> None:
    for name in REQUIRED:
        importlib.import_module(name)
    for name in (*OPTIONAL, *(f"numba.{each}" for each in NUMBA)):
        with suppress(ImportError):  # not installed, or elsewhere in another version
            importlib.import_module(name)
    registry = importlib.import_module("numba.core.registry")
    registry.cpu_target.typing_context.refresh()  # the types of what Python and numpy have, which do not depend on the processor
    # What was made for this processor on the way: CLLM chooses the instructions to compile for only when it sets numba up.
    vars(registry.cpu_target).pop("_toplevel_target_context", None)


def import_command_line() -> None:
    from cllm.cli.app import parser

    parser()
    keep()


def keep() -> None:
    """What has been imported stays: without this a command would look through it for cycles when it ends, for 0.7 s."""
    gc.collect()
    gc.freeze()


def serve(requests: socket.socket) -> dict[str, Any]:
    """Forks for every request, and returns it in the new process; ends when nobody can ask any more."""
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:
            sys.exit()
        began = os.fork()
        if not began:
            break
        for file in files:
            os.close(file)
        os.waitpid(began, 0)
    requests.close()
    # This process waits for the command, so that the server can go on; it is waited for at once, and its child afterwards belongs to init.
    report = files[3]
    if os.fork():
        os._exit(0)
    command = os.fork()
    if command:
        for file in files[:3]:
            os.close(file)
        for standard in range(3):
            os.close(standard)
        os.write(report, command.to_bytes(4, "little"))
        _, status = os.waitpid(command, 0)
        os.write(report, os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))
        os._exit(0)
    os.close(report)
    for standard, file in enumerate(files[:3]):
        os.dup2(file, standard)
        os.close(file)
    # As Python opens them, for the life of the process: a fork of it that puts others into their place must not close the files.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    return json.loads(message)


def run(request: dict[str, Any]) -> None:
    """The command, or the program where there is one, as `python -m cllm` and `python -c` run them."""
    os.chdir(request["folder"])
    for name, value in request["variables"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path.insert(0, os.getcwd())
    status: object = None
    try:
        if request["program"] is None:
            sys.argv = ["cllm", *request["arguments"]]
            runpy.run_module("cllm", run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *request["arguments"]]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(request["program"], "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code
    if status is None or isinstance(status, int):
        end_as_python_does(status or 0)
    sys.exit(status)


def end_as_python_does(status: int) -> None:
    """Waits for threads, calls what is called at the end, and writes what is not written yet; returns where that fails, which Python is to say.

    What Python does then, giving back everything that the libraries have made, one object after another, would cost each command 0.3 s.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        return
    os._exit(status & 0xFF)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C that ends the tests ends this process when its socket closes
    del sys.path[0]  # the folder of this file, which no command sees
    programs, commands = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    import_libraries()
    keep()
    if os.fork():
        commands.close()
        request = serve(programs)
    else:
        programs.close()
        import_command_line()
        request = serve(commands)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(request)
