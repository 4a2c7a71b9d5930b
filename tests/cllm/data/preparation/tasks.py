"""Tasks for the tests of runners, which workers import by this file's folder."""

import errno
import os
import signal
from pathlib import Path

from cllm.data.preparation import within
from cllm.runtime.errors import DataError


def double(place, number):
    return {"files": {}, "double": 2 * number}


def makes_a_column(place, number):
    import sys

    import pyarrow

    pyarrow.array(["a text"])
    return {"files": {}, "double": "pandas" in sys.modules}


def noisy(place, number):
    print("a library talks on standard output", flush=True)
    return {"files": {}, "double": 2 * number}


def dies_once(place, number):
    mark = Path(place) / f"died-{number}"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"files": {}, "double": 2 * number}


def dies(place, number):
    os.kill(os.getpid(), signal.SIGSEGV)


def tells(place, number):
    within.tell(0.5)
    within.tell(0.75)  # too soon to be told
    return {"files": {}, "double": 2 * number}


def raises_data(place, number):
    raise DataError("the disk of the test is full.")


def raises_system(place, number):
    raise OSError(errno.EIO, os.strerror(errno.EIO), "/mnt/far/pages.parquet")


def raises_bug(place, number):
    raise ZeroDivisionError("a mistake of ours")


def writes(place, number, content):
    Path(place + ".txt").write_text(content)
    (Path(place).parent / "calls").open("a").write(f"{number}\n")
    return {"files": {".txt": [len(content), content]}, "number": number}


def pid(place, number):
    return {"files": {}, "pid": os.getpid()}
