"""Gluon kernels on the CPU: the very bodies of the kernels, over a model of what Hopper does beside them.

Each partition of `gl.warp_specialize` is a thread, one of which runs at a time. At every barrier, copy and matrix product a seeded generator
chooses what happens next: another partition, or a copy that was asked for and has not happened yet. A matrix product that was issued and not
waited for reads its operands either at once or at the last moment. So a buffer that is released too early, read too early or never handed over
gives wrong numbers or a deadlock under some seed. Tensors are torch's, layouts are ignored; registers, layouts and speed are not modelled.
"""

import random
import threading
from collections import deque
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr


class Deadlock(Exception):
    """No partition can go on and no copy is under way."""


class Aborted(BaseException):
    """Ends the other partitions once one has failed."""


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all announced bytes have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phases = -1

    def init(self, count: int) -> None:
        assert self.count == -1, "initialised twice"
        self.count = self.missing = count
        self.bytes = self.phases = 0

    def arrive(self, count: int = 1, expected: int = 0, arrived: int = 0) -> None:
        assert self.count > 0, "not initialised"
        self.missing -= count
        self.bytes += expected - arrived
        assert self.missing >= 0, "more arrivals than the phase has"
        if self.missing == 0 and self.bytes == 0:
            self.missing = self.count
            self.phases += 1

    def passed(self, parity: int) -> bool:
        assert parity in (0, 1) and self.count > 0
        return self.phases & 1 != parity


class Shared:
    """A tile of shared memory; views share the memory, and the set of threads whose plain stores the tensor cores cannot see yet."""

    def __init__(self, data: Tensor, unfenced: list[bool]) -> None:
        self.data, self.unfenced, self.shape, self.dtype = data, unfenced, tuple(data.shape), data.dtype

    def _view(self, data: Tensor) -> "Shared":
        return Shared(data, self.unfenced)

    def index(self, i: int) -> "Shared":
        assert 0 <= i < self.shape[0]
        return self._view(self.data[i])

    def reshape(self, shape: list[int]) -> "Shared":
        return self._view(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return self._view(self.data.permute(order))

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype and tuple(value.shape) == self.shape
        self.data.copy_(value)
        self.unfenced[0] = True


class Pointer:
    """A pointer and what was added to it; reading or writing outside the tensor is an error."""

    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.data, self.offset + offset)


class Accumulator:
    """The result of a matrix product, which has no value before it was waited for."""

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value


class Partition(threading.Thread):
    def __init__(self, model: "Model", index: int, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self.model, self.index, self.body, self.args = model, index, body, args
        self.go, self.finished = threading.Semaphore(0), False
        self.ready: Callable[[], bool] = lambda: True
        self.products: deque[Callable[[], None]] = deque()
        self.stores: list[int] = []

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.model.failures:
                self.body(*self.args)
                assert not self.products, "ends with matrix products in flight"
                assert not self.stores, "ends before its stores have left shared memory"
        except Aborted:
            pass
        except BaseException as error:  # handed to the test
            self.model.failures.append(error)
        self.finished = True
        self.model.back.release()


class Model:
    """Runs launches. `copies` happen "soon", "late" (when nothing else can) or at "random" moments."""

    def __init__(self, seed: int = 0, copies: str = "random") -> None:
        self.random = random.Random(seed)
        self.copies, self.pending = copies, {}
        self.next_copy = 0
        self.current: Partition | None = None
        self.partitions: list[Partition] = []
        self.failures: list[BaseException] = []
        self.back = threading.Semaphore(0)
        self.program, self.grid = (0,), (1,)
        self.shared: list[Shared] = []
        self.namespaces: dict[str, dict[str, Any]] = {}
        self.longest_wait = 0

    # ---- scheduling

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        partition = self.current
        if partition is None:
            assert ready(), "waits before the partitions start"
            return
        partition.ready = ready
        self.back.release()
        partition.go.acquire()
        if self.failures:
            raise Aborted

    def specialize(self, functions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int] | None = None) -> None:
        assert len(warps) == len(functions) - 1
        self.partitions = [Partition(self, i, body, args) for i, (body, args) in enumerate(functions)]
        for partition in self.partitions:
            partition.start()
        while True:
            waiting = [p for p in self.partitions if not p.finished]
            able = [p for p in waiting if self.failures or p.ready()]
            if not waiting:
                break
            copies = list(self.pending) if not self.failures else []
            choices: list[Any] = able + copies
            if self.copies == "soon" and copies:
                choices = copies
            elif self.copies == "late" and able:
                choices = able
            if not choices:
                self.failures.append(Deadlock(f"partitions {[p.index for p in waiting]} wait for ever"))
                continue
            chosen = self.random.choice(choices)
            if isinstance(chosen, int):
                self.pending.pop(chosen)()
                continue
            self.current = chosen
            chosen.go.release()
            self.back.acquire()
        self.current = None
        if self.failures:
            raise self.failures[0]
        for copy in list(self.pending):
            self.pending.pop(copy)()

    # ---- what kernels call

    def copy(self, action: Callable[[], None]) -> int:
        self.next_copy += 1
        self.pending[self.next_copy] = action
        return self.next_copy

    def load_tile(self, desc: Any, place: list[int], barrier: Barrier, tile: Shared) -> None:
        self.pause()
        source = torch.as_strided(desc.base, desc.shape, desc.strides)
        assert tuple(desc.block_shape) == tile.shape and desc.dtype == tile.dtype
        kept = tuple(slice(at, min(at + size, limit)) for at, size, limit in zip(place, tile.shape, source.shape))
        assert all(at >= 0 for at in place)

        def happen() -> None:
            tile.data.zero_()
            part = source[kept]
            if part.numel():
                tile.data[tuple(slice(size) for size in part.shape)] = part
            barrier.arrive(0, arrived=tile.data.numel() * tile.data.element_size())

        self.copy(happen)

    def store_tile(self, desc: Any, place: list[int], tile: Shared) -> None:
        self.pause()
        assert not tile.unfenced[0], "the copy engine does not see plain stores before a fence"
        target = torch.as_strided(desc.base, desc.shape, desc.strides)
        kept = tuple(slice(at, min(at + size, limit)) for at, size, limit in zip(place, tile.shape, target.shape))
        stores = self.current.stores if self.current else []

        def happen() -> None:
            part = target[kept]
            if part.numel():
                part.copy_(tile.data[tuple(slice(size) for size in part.shape)])
            stores.remove(number)

        number = self.copy(happen)
        stores.append(number)

    def store_wait(self, pendings: int) -> None:
        stores = self.current.stores
        self.pause(lambda: len(stores) <= pendings)

    def fence(self) -> None:
        for tile in self.shared:
            tile.unfenced[0] = False

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.pause()
        self.pause(lambda: barrier.passed(parity))

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        self.pause()
        barrier.arrive(count)

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.arrive(1, expected=size)

    def mma(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        self.pause()
        for operand in (a, b):
            assert not isinstance(operand, Shared) or not operand.unfenced[0], "the tensor cores do not see plain stores before a fence"
        assert isinstance(a, (Tensor, Shared)) and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
        result = Accumulator()

        def read() -> Tensor:
            return (a.data if isinstance(a, Shared) else a).float() @ b.data.float()

        early = read() if self.random.random() < 0.5 else None

        def finish() -> None:
            product = read() if early is None else early
            if use_acc:
                product = product + (acc.value if isinstance(acc, Accumulator) else acc)
            result.value = product

        self.current.products.append(finish)
        if not is_async:
            return self.mma_wait(0, (result,))
        return result

    def mma_wait(self, outstanding: int, deps: tuple[Any, ...]) -> Any:
        products = self.current.products
        while len(products) > outstanding:
            products.popleft()()
        values = [dep.value if isinstance(dep, Accumulator) else dep for dep in deps]
        assert all(value is not None for value in values), "a result is read while its product is in flight"
        self.pause()
        return values[0] if len(values) == 1 else tuple(values)

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype is None:
            return _Barriers([Barrier() for _ in range(shape[0])])
        tile = Shared(torch.full(shape, float("nan"), dtype=dtype), [False])
        self.shared.append(tile)
        return tile

    # ---- launches

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> None:
        """In place of `launch.launch`, for Gluon kernels."""
        assert list(constants) == kernel.arg_names[len(args) :]
        body = self.namespace(kernel.fn.__module__, kernel.fn.__globals__)[kernel.__name__]
        for program in range(grid[0]):
            self.program, self.grid, self.shared, self.pending = (program,), grid, [], {}
            body(*map(self._argument, args), **constants)

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return Pointer(torch.as_strided(arg, (arg.untyped_storage().nbytes() // arg.element_size() - arg.storage_offset(),), (1,)))
        if isinstance(arg, TensorDescriptor):
            return SimpleNamespace(
                base=arg.base, shape=arg.shape, strides=arg.strides, block_shape=arg.block_shape, dtype=arg.base.dtype, layout=arg.layout
            )
        return arg

    def namespace(self, module: str, names: dict[str, Any]) -> dict[str, Any]:
        """The module's names as its kernels see them here: plain Python functions, and the model in place of Gluon."""
        if module not in self.namespaces:
            made = self.namespaces[module] = dict(names)
            for name, value in names.items():
                if isinstance(value, GluonJITFunction):
                    home = made if value.fn.__module__ == module else self.namespace(value.fn.__module__, value.fn.__globals__)
                    made[name] = FunctionType(value.fn.__code__, home, name, value.fn.__defaults__)
                elif isinstance(value, constexpr):
                    made[name] = value.value
            made |= {
                "gl": _gluon(self),
                "tma": SimpleNamespace(
                    async_copy_global_to_shared=self.load_tile, async_copy_shared_to_global=self.store_tile, store_wait=self.store_wait
                ),
                "mbarrier": SimpleNamespace(
                    MBarrierLayout=lambda: None, init=lambda barrier, count: barrier.init(count),
                    wait=self.wait, arrive=self.arrive, expect=self.expect,
                ),
                "fence_async_shared": self.fence, "warpgroup_mma": self.mma, "warpgroup_mma_wait": self.mma_wait, "warpgroup_mma_init": Accumulator,
            }  # fmt: skip
        return self.namespaces[module]


class _Barriers:
    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: int) -> Barrier:
        assert i >= 0
        return self.barriers[i]


def _least(a: Any, b: Any) -> Any:
    return torch.minimum(*_tensors(a, b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else min(a, b)


def _largest(a: Any, b: Any) -> Any:
    return torch.maximum(*_tensors(a, b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else max(a, b)


def _tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    like = a if isinstance(a, Tensor) else b
    return tuple(x if isinstance(x, Tensor) else torch.full_like(like, x) for x in (a, b))  # type: ignore[return-value]


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    if isinstance(pointer.offset, int):
        assert 0 <= pointer.offset < pointer.data.numel(), "a load outside the tensor"
        return pointer.data[pointer.offset].item()
    index = pointer.offset.long()
    inside = torch.ones_like(index, dtype=torch.bool) if mask is None else torch.broadcast_to(mask, index.shape)
    assert bool(((index >= 0) & (index < pointer.data.numel()))[inside].all()), "a load outside the tensor"
    value = pointer.data[index.where(inside, 0)]
    return torch.where(inside, value, torch.full_like(value, other))


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    index = pointer.offset.long()[mask]
    assert bool(((index >= 0) & (index < pointer.data.numel())).all()), "a store outside the tensor"
    pointer.data[index] = value[mask].to(pointer.data.dtype)


def _gluon(model: Model) -> SimpleNamespace:
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return SimpleNamespace(
        constexpr=None, float32=torch.float32, int64=None, int32=torch.int32, uint32=None, uint64=None,
        program_id=lambda axis: model.program[axis], num_programs=lambda axis: model.grid[axis], static_range=range,
        arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        cast=lambda value, dtype: value, convert_layout=lambda value, layout: value,
        inline_asm_elementwise=lambda asm, constraints, args, **options: args[0],
        minimum=_least, maximum=_largest, where=torch.where, exp2=torch.exp2, log2=torch.log2,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), load=_load, store=_store,
        allocate_shared_memory=model.allocate, warp_specialize=model.specialize,
        NVMMADistributedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing, NVMMASharedLayout=nothing,
    )  # fmt: skip
