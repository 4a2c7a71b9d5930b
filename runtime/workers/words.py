"""Words of memory that several threads read and change, the clock, and waiting until a word changes: what the workers' loop is made of.

A word is an int64 at an address. Loads acquire, stores release, and whatever changes a word by its old value is one step for all threads.
"""

import platform
from typing import Any

from cllm.runtime import compiler

compiler.numba_setup()

from llvmlite import ir  # noqa: E402
from numba import types  # noqa: E402
from numba.core import cgutils  # noqa: E402
from numba.extending import intrinsic as _intrinsic  # noqa: E402

intrinsic: Any = _intrinsic  # numba annotates it with the signature of the function that it hides

_LINUX = platform.system() == "Linux"
# Linux's number for the system call "futex", by kind of processor; -1 where there is none.
FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}.get(platform.machine(), -1) if _LINUX else -1
WAIT, WAKE = 128, 129  # of this process alone, which spares the kernel a look at the memory's owner
SET_SCHEDULING = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355}.get(platform.machine(), -1) if _LINUX else -1  # "sched_setattr"

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_PAUSES = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.isb", (15,))}  # LLVM's names


def _word(bld: Any, address: Any) -> Any:
    return bld.inttoptr(address, _I64.as_pointer())


@intrinsic
def load(tc, address):
    """The word, as it is now."""

    def codegen(ctx, bld, sig, args):
        return bld.load_atomic(_word(bld, args[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store(tc, address, value):
    def codegen(ctx, bld, sig, args):
        bld.store_atomic(args[1], _word(bld, args[0]), "release", 8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def add(tc, address, value):
    """Adds to the word; what it was before."""

    def codegen(ctx, bld, sig, args):
        return bld.atomic_rmw("add", _word(bld, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def replace(tc, address, old, new):
    """Makes the word `new` if it is still `old`; whether it was."""

    def codegen(ctx, bld, sig, args):
        return bld.extract_value(bld.cmpxchg(_word(bld, args[0]), args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(tc):
    """A moment that leaves the core to its other thread, if it has one."""

    def codegen(ctx, bld, sig, args):
        if platform.machine() in _PAUSES:
            name, numbers = _PAUSES[platform.machine()]
            function = ir.FunctionType(ir.VoidType(), [_I32] * len(numbers))
            bld.call(cgutils.get_or_insert_function(bld.module, function, name), [_I32(each) for each in numbers])
        return ctx.get_dummy_value()

    return types.void(), codegen


@intrinsic
def nanoseconds(tc):
    """The C library's steady clock."""
    return types.int64(), lambda ctx, bld, sig, args: _clock(bld, 1 if _LINUX else 6)


@intrinsic
def nanoseconds_run(tc):
    """How long this thread has had a core."""
    return types.int64(), lambda ctx, bld, sig, args: _clock(bld, 3 if _LINUX else 16)


def _clock(bld: Any, number: int) -> Any:
    time = cgutils.alloca_once(bld, ir.ArrayType(_I64, 2))  # seconds, nanoseconds
    clock = cgutils.get_or_insert_function(bld.module, ir.FunctionType(_I32, [_I32, time.type]), "clock_gettime")
    bld.call(clock, [_I32(number), time])
    seconds, rest = (bld.load(bld.gep(time, [_I32(0), _I32(i)])) for i in range(2))
    return bld.add(bld.mul(seconds, _I64(1_000_000_000)), rest)


@intrinsic
def futex(tc, call, address, operation, value):
    """Linux's system call of that number on the lower half of a word. WAIT sleeps while it is `value`, WAKE wakes up to `value` sleepers."""

    def codegen(ctx, bld, sig, args):
        number, address, operation, value = args
        zero = _I64(0)
        function = cgutils.get_or_insert_function(bld.module, ir.FunctionType(_I64, [_I64] * 7), "syscall")
        bld.call(function, [number, address, operation, bld.and_(value, _I64(0xFFFFFFFF)), zero, zero, zero])
        return ctx.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def set_scheduling(tc, call, attributes):
    """Linux's system call of that number for this thread. attributes: the address of a `struct sched_attr`."""

    def codegen(ctx, bld, sig, args):
        function, zero = cgutils.get_or_insert_function(bld.module, ir.FunctionType(_I64, [_I64] * 7), "syscall"), _I64(0)
        bld.call(function, [args[0], zero, args[1], zero, zero, zero, zero])
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def nap(tc):
    """Sleeps for a fifth of a millisecond."""

    def codegen(ctx, bld, sig, args):
        bld.call(cgutils.get_or_insert_function(bld.module, ir.FunctionType(_I32, [_I32]), "usleep"), [_I32(200)])
        return ctx.get_dummy_value()

    return types.void(), codegen


@intrinsic
def run_task(tc, entry, p, f, task, worker):
    """Calls the compiled function at `entry`."""

    def codegen(ctx, bld, sig, args):
        function = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I8.as_pointer(), _I64, _I64])
        ints, floats = (bld.inttoptr(each, _I8.as_pointer()) for each in args[1:3])
        bld.call(bld.inttoptr(args[0], function.as_pointer()), [ints, floats, args[3], args[4]])
        return ctx.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
