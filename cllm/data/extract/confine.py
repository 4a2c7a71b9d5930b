"""What a child process that reads foreign files takes from itself before it begins: memory, files, the network, other programs."""

import ctypes
import os
import re
import resource
import sys
from typing import Any

from cllm.data.extract.options import Options

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET of Linux
_OPEN_FILES = 256
_NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby", "socket.sendto", "socket.sendmsg", "urllib.Request")
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")


def confine(options: Options) -> None:
    """Takes from this process for good what no reader needs. Character recognition may start a program (tesseract), in the same limits."""
    _leave_network()
    _be_first_to_go()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_AS, options.memory_bytes)
    refused = _NETWORK if options.ocr else _NETWORK + _PROGRAMS

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is not allowed where files are read")

    sys.addaudithook(refuse)


def limit_cpu(seconds: int) -> None:
    """From now on; the system then ends this process by SIGXCPU, also in the middle of a library."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, hard))


def peak_bytes() -> int:
    """The most memory that this process ever held. getrusage would count what its parent held when it started it."""
    try:
        with open("/proc/self/status", "rb") as file:
            found = re.search(rb"^VmHWM:\s*(\d+) kB", file.read(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    except OSError:
        return 0


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError):  # macOS refuses a limit of the address space
        pass


def _leave_network() -> None:
    """Into a network namespace of its own, which has no way out. Where the system does not permit it, the audit hook alone is left."""
    if sys.platform != "linux":
        return
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    if unshare(_NEW_NET) != 0:
        unshare(_NEW_USER | _NEW_NET)


def _be_first_to_go() -> None:
    """Where the machine runs out of memory, the system should end this process before any other."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def quiet() -> tuple[int, int]:
    """(input, output) of this process under new numbers; the old ones then lead nowhere, so that no library can write into an answer."""
    source, target = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return source, target
