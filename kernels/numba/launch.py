"""One launch for every CPU kernel: tasks of a fixed grid, which any number of workers take.

A kernel is a function body(p, f, task, worker): it computes one task of the grid, reading integers (addresses, sizes,
strides) from p and scalars from f. It is compiled once for all dtypes: whether an address holds float32 or bfloat16 is
one more integer in p. The workers are those of `cllm.runtime.workers`, and call the body by its address.
Which worker runs a task never changes what the task computes.
"""

import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

import cllm.runtime as runtime
from cllm.kernels.numba.compiling import inline as inline
from cllm.kernels.numba.compiling import jit as jit
from cllm.kernels.numba.llvm import F32, I64, intrinsic
from cllm.kernels.numba.micro import prefetch_l1
from cllm.kernels.numba.simd import W, vload, vload_bf16, vload_bf16_masked, vload_masked, vstore, vstore_bf16, vstore_bf16_masked, vstore_masked
from cllm.runtime import compile_ahead
from cllm.runtime.workers import Launch, recorder, run

FANOUT = 12  # partial sums are added up in trees of this fan-out, as in runtime.tree
AHEAD_BYTES = 8192  # how far ahead the L1 cache is filled with what is read once: the processor stops at the end of a page
TARGET_PARTIALS = 256  # sums over rows are cut into about this many parts: enough for many workers, and quickly added up

_INTS, _FLOATS = types.CPointer(types.int64), types.CPointer(types.float64)
_TASK = types.void(_INTS, _FLOATS, types.int64, types.int64)


@intrinsic
def int64_at(tc, address, i):
    """The i-th int64 at an address."""

    def codegen(ctx, bld, sig, args):
        return bld.load(bld.gep(bld.inttoptr(args[0], I64.as_pointer()), [args[1]]), align=8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def put_int64(tc, address, i, value):
    def codegen(ctx, bld, sig, args):
        bld.store(args[2], bld.gep(bld.inttoptr(args[0], I64.as_pointer()), [args[1]]), align=8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def int32_at(tc, address, i):
    """The i-th int32 at an address, as int64."""

    def codegen(ctx, bld, sig, args):
        word = ir.IntType(32)
        return bld.sext(bld.load(bld.gep(bld.inttoptr(args[0], word.as_pointer()), [args[1]]), align=4), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def float32_at(tc, address, i):
    """The i-th float32 at an address."""

    def codegen(ctx, bld, sig, args):
        return bld.load(bld.gep(bld.inttoptr(args[0], F32.as_pointer()), [args[1]]), align=4)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def put_float32(tc, address, i, value):
    def codegen(ctx, bld, sig, args):
        bld.store(args[2], bld.gep(bld.inttoptr(args[0], F32.as_pointer()), [args[1]]), align=4)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def copy_bytes(tc, target, source, count):
    """The C library's memcpy, which knows how this processor writes whole lines without reading them first."""

    def codegen(ctx, bld, sig, args):
        target, source = (bld.inttoptr(each, ir.IntType(8).as_pointer()) for each in args[:2])
        cgutils.raw_memcpy(bld, target, source, args[2], 1)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


_NO_FLOATS = array("d", (0.0,))


class Kernel:
    """A task function, compiled (or read from the cache on disk) at its first launch.

    Each worker takes its tasks out of one piece, so that it reads and writes memory in order and what it prefetches is its own. Where some tasks
    are longer than others, `uneven`, they are taken in turn.
    """

    def __init__(self, body: Callable[..., None], uneven: bool = False):
        self.body, self.uneven = body, uneven
        self._entry = 0
        self._compiled: Any = None
        self._lock = threading.Lock()

    def entry(self) -> int:
        if not self._entry:
            with self._lock:
                if not self._entry:
                    self._entry = compile_ahead.NOWHERE if compile_ahead.is_postponed(self._compile) else self._compile()
        return self._entry

    def _compile(self) -> int:
        self._compiled = numba.cfunc(_TASK, cache=True, error_model="numpy")(self.body)
        return int(self._compiled.address)

    def __call__(self, tasks: int, workers: int, ints: Sequence[int], floats: Sequence[float] = (), counted: int = 0) -> None:
        """Run body(p, f, task, worker) for every task < tasks; the caller keeps the memory behind addresses alive.

        counted: the address of the number of tasks, for a launch that is recorded and will have others at another time.
        """
        if tasks <= 0 and not counted:
            return
        # Arrays of the standard library are made in a third of the time of numpy's, and addresses pass numba's dispatcher faster than arrays.
        p, f = array("q", ints), array("d", floats) if floats else _NO_FLOATS
        launch = array("q", self.launch(p.buffer_info()[0], f.buffer_info()[0], tasks, counted=counted))
        run(launch.buffer_info()[0], 1, workers if counted else min(workers, tasks), (p, f))

    def launch(self, ints: int, floats: int, tasks: int, first: int = 0, counted: int = 0) -> Launch:
        """The line of a list of launches for this kernel. ints, floats: addresses of its arguments; first: the number of the first task."""
        return Launch(self.entry(), ints, floats, first, tasks, not self.uneven, counted=counted)


def num_workers(op: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, **options: Any) -> int:
    """The planned number of workers for `op`, whose work kernels/operations.py counts from these shapes and options."""
    return runtime.plan(op, shapes, dtype, **options).workers


def at_most(planned: int, tasks: int) -> int:
    """How many of the planned workers a launch of `tasks` tasks puts to work."""
    return max(1, min(planned, tasks))


class _Scratch(threading.local):
    """Work space of one Python thread, kept between calls: fresh memory costs page faults."""

    KEPT_BYTES = 64 << 20

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, size: int) -> tuple[torch.Tensor, int]:
        """(owner to keep alive, 64-byte aligned address) of at least `size` bytes with arbitrary contents."""
        recorded = recorder() is not None  # what is replayed later has work space of its own
        held = None if recorded else self.held.get(name)
        if held is None or held.numel() < size + 64:
            held = torch.empty(size + 64, dtype=torch.uint8)
            if size <= self.KEPT_BYTES and not recorded:
                self.held[name] = held
        return held, (held.data_ptr() + 63) & ~63


scratch = _Scratch()


def hold(*arrays: object) -> None:
    """Whoever records the launches of this thread keeps these: memory that is no tensor and no table of arguments, but whose address is in one."""
    listening = recorder()
    if listening is not None:
        listening.hold(*arrays)


def is_half(t: torch.Tensor) -> int:
    return int(t.dtype == torch.bfloat16)


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """(..., E) -> (N, E) with the last dimension contiguous; a copy only where no view can do it."""
    if t.dim() == 2:
        rows = t
    else:
        rows = t.detach().reshape(-1, t.shape[-1]) if t.numel() else t.detach().new_empty((0, t.shape[-1]))
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def dense(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is contiguous: even a view that changes nothing costs a microsecond."""
    return t if t.is_contiguous() else t.detach().contiguous()


def row_bytes(rows: torch.Tensor) -> int:
    return int(rows.stride(0)) * rows.element_size()


# ---- inside kernels: rows of float32 or bfloat16 at an address ------------------------------------------------------


@inline
def load(address, half, c, n):
    """Elements [c, c + W) as float32; those from c + n on read 0."""
    if half:
        if n >= W:
            return vload_bf16(address, c)
        return vload_bf16_masked(address, c, n)
    if n >= W:
        return vload(address, c)
    return vload_masked(address, c, n)


@inline
def store(address, half, c, v, n):
    """v -> elements [c, c + min(n, W)), rounded to nearest even for bfloat16."""
    if half:
        if n >= W:
            vstore_bf16(address, c, v)
        else:
            vstore_bf16_masked(address, c, v, n)
    elif n >= W:
        vstore(address, c, v)
    else:
        vstore_masked(address, c, v, n)


@inline
def load_whole(address, half, c):
    """Elements [c, c + W) as float32, all of them valid."""
    if half:
        return vload_bf16(address, c)
    return vload(address, c)


@inline
def load_once(address, half, c):
    """`load_whole` of what comes from memory, in order."""
    if half:
        prefetch_l1(address + c * 2 + AHEAD_BYTES)
        return vload_bf16(address, c)
    prefetch_l1(address + c * 4 + AHEAD_BYTES)
    return vload(address, c)


@inline
def store_whole(address, half, c, v):
    if half:
        vstore_bf16(address, c, v)
    else:
        vstore(address, c, v)


def rows_per_block(num_rows: int, smallest: int) -> int:
    """Rows that share one partial sum: depends on the shape only, so that the sum never depends on the workers."""
    return max(smallest, -(-num_rows // TARGET_PARTIALS))
