"""CUDA graphs emulated on a CPU, to prove without a GPU that a captured step does what the step does operation by operation.

`EmulatedGraphs` takes the place of `cllm.runtime.cuda_graphs.CudaGraphs` and keeps to the rules of CUDA:

- A capture changes nothing. Operators run during it, since only so their results are known, and what they wrote is put back; kernels that are
  launched outside of an operator are recorded and not run.
- A replay runs what was recorded, on the tensors and with the numbers of the capture, and none of the Python around it.
- What a graph allocates belongs to the graphs: it is overwritten with NaN before every replay, of whichever graph.
- Everything else is somebody else's: the record holds it by weak references, and a replay that would use memory which was freed meanwhile fails.
- The host cannot look at a value: `.item()`, `bool()`, `.tolist()`, `nonzero` and the like fail during a capture.

An operator of `cllm` counts as one, whatever its implementation on a CPU does inside. What those of a GPU do is checked on a fake device instead.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import cllm.kernels.triton.adamw  # noqa: F401 - launches kernels outside of an operator
from cllm.kernels.triton import launch as launching
from cllm.runtime.cuda_graphs import WARM_UPS, Body

GARBAGE = 0xFF  # the byte that makes a NaN of every floating-point dtype and -1 of integers
VALUE_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
LOOKS = ("tolist", "numpy")  # methods of a tensor that give its values to the host past the dispatcher


class GraphError(AssertionError):
    """What CUDA would answer with an error or with wrong numbers."""


class _Place(NamedTuple):
    """Where a tensor lies: in memory that the graph made and keeps, or in that of others, which may be freed."""

    memory: torch.UntypedStorage | StorageWeakRef
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    user: str

    def tensor(self) -> torch.Tensor:
        storage = self.memory
        if isinstance(storage, StorageWeakRef):
            storage = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        if storage is None:
            raise GraphError(f"{self.user} in the graph uses a {self.dtype} tensor {tuple(self.shape)} whose memory was freed after the capture.")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


class Call(NamedTuple):
    """One operator or launch of a record. `writes`: the addresses of the memory that it is known to write to."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Any]
    writes: frozenset[int]

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", self.function))

    def places(self) -> Iterator[_Place]:
        yield from (each for each in _leaves((self.args, self.kwargs, self.results)) if isinstance(each, _Place))


class Record:
    """What runs while a graph is captured: `operator` and `launch` run or note one call each, `end` puts back what operators wrote meanwhile."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.made: dict[int, torch.UntypedStorage] = {}  # by address
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # memory of others that was written, and a copy of it
        self._constants: dict[int, torch.UntypedStorage] = {}  # tensors that the body made of numbers of the host: part of the record
        self._within = False

    def end(self) -> None:
        for storage, copy in self._before.values():
            storage.copy_(copy)
        self._before.clear()

    def replay(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                _run(call)

    def spoil(self) -> None:
        """Overwrites what the graph made."""
        for storage in self.made.values():
            storage.fill_(GARBAGE)

    def operator(self, function: Any, args: Any, kwargs: Any, form: Callable[..., Any] | None = None) -> Any:
        """Runs an operator and writes it down; form: what computes the same on a CPU, where that is not the operator itself."""
        if depends_on_values(function, args):
            raise GraphError(f"the host reads values during a capture: {function}")
        borrowed = {each.untyped_storage().data_ptr() for each in tensors_of((args, kwargs))}
        if function is torch.ops.aten.lift_fresh.default:
            self._constants |= {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors_of(args)}
        for written in written_by(function._schema, args, kwargs):
            self._keep(written.untyped_storage())
        self._within = True
        try:
            results = (form or function)(*args, **kwargs)
        finally:
            self._within = False
        new = [each for each in tensors_of(results) if each.untyped_storage().data_ptr() not in borrowed]
        self.made |= {each.untyped_storage().data_ptr(): each.untyped_storage() for each in new}
        self._write(form or function, args, kwargs, results, [*written_by(function._schema, args, kwargs), *new])
        return results

    def launch(self, run: Callable[..., None], args: Any, kwargs: Any) -> bool:
        """Writes down a launch outside of any operator; True where that was all that there was to do."""
        if not self._within:
            self._write(run, args, kwargs, None, [])
        return not self._within

    def _write(self, function: Callable[..., Any], args: Any, kwargs: Any, results: Any, written: list[torch.Tensor]) -> None:
        def noted(value: Any) -> Any:
            return self._noted(value, str(getattr(function, "__name__", function))) if isinstance(value, torch.Tensor) else value

        args, kwargs = tree_map(noted, (args, kwargs))
        writes = frozenset(each.untyped_storage().data_ptr() for each in written)
        self.calls.append(Call(function, args, kwargs, [noted(each) for each in tensors_of(results)], writes))

    def _noted(self, tensor: torch.Tensor, user: str) -> _Place:
        storage = tensor.untyped_storage()
        own = storage.data_ptr() in self.made | self._constants or not storage.data_ptr()
        memory = storage if own else StorageWeakRef(storage)
        return _Place(memory, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), user)

    def _keep(self, storage: torch.UntypedStorage) -> None:
        at = storage.data_ptr()
        if at and at not in self.made and at not in self._before:
            self._before[at] = storage, storage.clone()


class _Recording(TorchDispatchMode):
    """While entered, every operator goes to a record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __enter__(self) -> _Recording:
        for method in LOOKS:
            setattr(torch.Tensor, method, self._refusing(method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for method in LOOKS:
            delattr(torch.Tensor, method)
        self.record.end()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.record.operator(function, args, kwargs or {})

    def _refusing(self, method: str) -> Callable[[torch.Tensor], Any]:
        original, capturing = getattr(torch.Tensor, method), threading.get_ident()

        def look(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == capturing and not self.record._within:  # other threads may, as in CUDA's mode "thread_local"
                raise GraphError(f"the host reads values during a capture: Tensor.{method}")
            return original(tensor, *args, **kwargs)

        return look


def _leaves(tree: Any) -> list[Any]:
    return tree_leaves(tree, is_leaf=lambda each: isinstance(each, _Place))


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def depends_on_values(function: Any, args: Any) -> bool:
    """Whether the host has to know values before the operator can be called, or gets some from it."""
    if function is torch.ops.aten.index.Tensor:  # with numbers of places the shape is known, with masks it is not
        return any(each.dtype in (torch.bool, torch.uint8) for each in tensors_of(args[1]))
    return any(tag in function.tags for tag in VALUE_DEPENDENT)


def written_by(schema: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operator says it writes to."""
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from tensors_of(given)


class EmulatedGraphs:
    """The graphs of one training step on a CPU. `replays` counts what was replayed, `records` holds those of all captures."""

    def __init__(self, device: torch.device) -> None:
        self.records: list[Record] = []
        self.replays = 0

    def capture(self, body: Body) -> Body:
        for _ in range(WARM_UPS):
            body()
        record = Record()
        try:
            with _launches_to(record), _Recording(record):
                body()
        except torch.OutOfMemoryError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904 - as the end of a capture says
        self.records.append(record)

        def replay() -> None:
            self.replays += 1
            for each in self.records:
                each.spoil()
            record.replay()

        return replay


def _run(call: Call) -> None:
    args, kwargs, results = tree_map(_there, (call.args, call.kwargs, call.results), is_leaf=lambda each: isinstance(each, _Place))
    for recorded, new in zip(results, tensors_of(call.function(*args, **kwargs)), strict=True):
        if recorded.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            recorded.copy_(new)


def _there(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Place) else value


@contextmanager
def _launches_to(record: Record) -> Iterator[None]:
    """While entered, launches of Triton kernels are shown to `record` wherever they are made."""
    original = launching.launch

    def launch(*args: Any, **kwargs: Any) -> None:
        if not record.launch(original, args, kwargs):
            original(*args, **kwargs)

    holders = [module for name, module in list(sys.modules.items()) if name.startswith("cllm.kernels.") and vars(module).get("launch") is original]
    for module in holders:
        module.launch = launch
    try:
        yield
    finally:
        for module in holders:
            module.launch = original
