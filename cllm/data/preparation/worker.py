"""A worker of the pool: reads tasks as lines of JSON on standard input, and writes their results as lines of JSON on standard output, and before
a result now and then how far it is.

It is started as a program of its own (`python -m`), so it shares no threads and no memory with whoever started it, may have child processes, and
ends when its standard input does, also in the middle of a task: a pool that was killed leaves nothing behind.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import queue
import sys
import threading
import traceback
from typing import Any

from cllm.data.preparation import within
from cllm.runtime.errors import DataError

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
"""Workers are many; each computes with one thread."""
_OF_THE_SYSTEM = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOTCONN)
"""What the disk, the network that it is behind, or the limits of the user are to blame for."""
ATTEMPTS = 3  # of a task whose worker dies; after that the task is to blame


def call(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The result of "module:name" with these arguments. What pyarrow would do in threads of its own is done in this one."""
    module, _, name = function.partition(":")
    found: dict[str, Any] = getattr(importlib.import_module(module), name)(**arguments)
    return found


def answer(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same as a message: {"result"}, or {"error", "kind"} where it raised. `kind`: "data" for what the user can mend, else "bug"."""
    try:
        return {"result": call(function, arguments)}
    except DataError as error:
        return {"error": str(error), "kind": "data"}
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return {"error": "the disk is full. Free some space and run the same command again; what was finished is kept.", "kind": "data"}
        if error.errno in _OF_THE_SYSTEM:
            about = f" ({error.filename})" if error.filename else ""
            return {"error": f"{(error.strerror or str(error)).lower()}{about}. Once that is put right, run the same command again.", "kind": "data"}
        return {"error": traceback.format_exc(), "kind": "bug"}
    except MemoryError:
        return {"error": "out of memory. Use fewer --workers, or a machine with more memory; what was finished is kept.", "kind": "data"}
    except Exception:
        return {"error": traceback.format_exc(), "kind": "bug"}


def result_of(message: dict[str, Any], function: str) -> dict[str, Any]:
    """The result of a task, or what it raised: DataError for what a user can mend, RuntimeError with the worker's traceback for a mistake of ours."""
    if "result" in message:
        found: dict[str, Any] = message["result"]
        return found
    if message["kind"] == "data":
        raise DataError(message["error"])
    raise RuntimeError(f"a task of {function} failed in its worker:\n{message['error']}")


def blame(function: str, arguments: dict[str, Any], how: str) -> str:
    files = arguments.get("files") or arguments.get("inputs") or [arguments.get("place", "")]
    named = ", ".join(each if isinstance(each, str) else os.path.join(*each) for each in files[:5])
    return f"a part of the work cannot be done: {how} ({function.partition(':')[2]} of {named}). Leave these files out, or use fewer --workers."


class _WithoutPandas:
    """pyarrow imports pandas where it is installed, which takes 0.25 s, to ask of a list whether it is one of its series."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def main() -> None:
    sys.meta_path.insert(0, _WithoutPandas)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not write between the results
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            tasks.put(line)
        os._exit(0)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    threading.Thread(target=listen, daemon=True).start()
    within.hear = lambda done: say({"done": done})
    while True:
        task = json.loads(tasks.get())
        try:
            say(answer(task["function"], task["arguments"]))
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
