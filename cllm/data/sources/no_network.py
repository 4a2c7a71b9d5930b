"""Takes the network away from a thread and from all processes that it starts: the kernel gives them no socket of one, whatever they run (seccomp).

The filter is that of the calling thread, so the rest of the process keeps its network. Children inherit it, and nothing takes it off again. Pipes,
`socketpair` and sockets of the file system go on working.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct

from cllm.runtime.errors import DataError

_SYSTEMS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # AUDIT_ARCH_* and the number of socket(2)
_IO_URING_SETUP = 425  # by way of which sockets can be made as well
_X32 = 0x40000000  # from here on are the system calls of another calling convention
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # places in seccomp_data
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
_SET_SECCOMP, _SET_NO_NEW_PRIVILEGES, _MODE_FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def leave_network() -> None:
    """For the thread that calls it, for ever. Raises DataError where the system does not do it."""
    uname = os.uname()
    try:
        architecture, socket_number = _SYSTEMS[uname.machine if uname.sysname == "Linux" else ""]
    except KeyError:
        raise DataError(f"--browser runs on Linux on x86-64 or ARM64 only, and this is {uname.sysname} on {uname.machine}. Switch it off.") from None
    steps = [  # each jump names how many steps it leaves out when it holds, and when it does not
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 0, 6, architecture),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_AT_LEAST, 4, 0, _X32),
        (_JUMP_EQUAL, 3, 0, _IO_URING_SETUP),
        (_JUMP_EQUAL, 0, 3, socket_number),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_EQUAL, 1, 0, int(socket.AF_UNIX)),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = _Program(len(steps), b"".join(struct.pack("=HBBI", *step) for step in steps))
    control = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    if control(_SET_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero) or control(
        _SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program), zero, zero
    ):
        words = os.strerror(ctypes.get_errno()).lower()
        raise DataError(f"the network cannot be taken away from the browser: this system has no seccomp ({words}). Switch --browser off.")
