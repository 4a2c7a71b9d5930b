"""Two CUDA devices that are not there: tensors that say they lie on a GPU, and whose values the CPU computes.

`install(library)` makes them of this process, for good, so that it belongs at the start of a process of its own. The library is `device.cpp`, which
gives PyTorch a device guard: autograd then runs the backward of such tensors in a thread of the device, as it does on a GPU. `torch.cuda` gets
streams, events, graphs and figures of memory.

Code for a GPU runs as it is: its branches, its backends, its launches of kernels, which Triton's interpreter computes. What a GPU does not forgive
is an error here:

- tensors of two devices in one operator or one launch of a kernel;
- a wait of the host for the GPU, whether by `.item()`, `bool()`, a copy to the host or an operator whose shape depends on values, unless it is made
  by one of the functions that `waiting_allowed` names; in a capture always;
- in a capture also a copy from memory that is not pinned, and everything that `graphs.Record` finds at a replay;
- work on memory of another stream without a wait for it (`streams.py`).

`contexts` holds the devices on which the process has begun to use memory.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

library: Any = None


def load(path: str) -> None:
    """Before `torch` is imported: it looks for the guard once."""
    global library
    assert "torch" not in sys.modules
    library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


class DeviceError(AssertionError):
    """What goes wrong, or waits, on a GPU."""


def install() -> Any:
    """Makes the devices. Returns what is known of them: `waits`, how often each function waited; `waiting_allowed`, which may; `contexts`."""
    import torch
    import torch._dynamo  # every dispatch mode imports it, and it looks at functions that are replaced below
    from gpu_emulation import graphs, streams
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
    from torch.utils._pytree import tree_leaves, tree_map

    import cllm.kernels.triton.adamw  # noqa: F401 - so that all launches are found
    from cllm.kernels.triton import launch as launching
    from cllm.runtime import nvml

    about = SimpleNamespace(waits=Counter(), waiting_allowed=set(), contexts=set(), record=None, mode="", free_memory=[12 << 30, 12 << 30])
    order = streams.Order()
    aten = torch.ops.aten
    # Operators that only a GPU has.
    forms = {aten.mm.dtype: lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype))}
    pinned: dict[int, StorageWeakRef] = {}  # by address
    waiting: list[Any] = []  # streams whose work the host waits for at the end of this operator

    def current() -> int:
        return int(library.fake_cuda_current())

    def index_of(device: Any = None) -> int:
        if device is None:
            return current()
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return current() if index is None else index

    def in_main_thread() -> bool:
        """Or in one of autograd, which works for it."""
        thread = threading.current_thread()
        return thread is threading.main_thread() or type(thread).__name__ == "_DummyThread"

    def capturing() -> Any:
        """The record of the capture that this thread's work goes to; what other threads do during one goes on, or breaks one of mode "global"."""
        if about.record is None or in_main_thread():
            return about.record
        if about.mode == "global":
            raise DeviceError("another thread uses the GPU during a capture")
        return None

    def waits(what: str, *waited_for: Any) -> None:
        """The host waits for streams, only where it may."""
        if capturing() is not None:
            raise DeviceError(f"{what} waits for the GPU during a capture")
        frame: Any = sys._getframe(1)
        while frame is not None:
            name = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"
            if name in about.waiting_allowed:
                about.waits[name] += 1
                waiting.extend(waited_for)
                return
            frame = frame.f_back
        raise DeviceError(f"{what} waits for the GPU")

    def waited(result: Any = None) -> Any:
        order.host_waits_for(waiting)
        waiting.clear()
        return result

    class OnGPU(torch.Tensor):
        """A tensor on a device that is not there; `values` are its values."""

        values: torch.Tensor

        @staticmethod
        def __new__(cls, values: torch.Tensor, device: torch.device) -> OnGPU:
            about.contexts.add(device.index)
            made = torch.Tensor._make_wrapper_subclass(
                cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype, device=device
            )
            made.values = values
            return made

        __torch_function__ = torch._C._disabled_torch_function_impl

        def data_ptr(self) -> int:
            return self.values.data_ptr()

        def record_stream(self, stream: Any) -> None:
            order.used_by(self.values, stream)

        def tolist(self) -> Any:
            waits("tolist", current_stream(self.device))
            return waited(self.values.tolist())

        def numpy(self, **options: Any) -> Any:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return waited(run(function, args, kwargs or {}))

    class Devices(TorchDispatchMode):
        """Sees what no tensor of a device is part of yet: what is made there, and pinned memory."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return waited(run(function, args, kwargs or {}))

    def on_gpu(tree: Any) -> list[Any]:
        return [each for each in tree_leaves(tree) if isinstance(each, OnGPU)]

    def values_of(tree: Any) -> Any:
        return tree_map(lambda each: each.values if isinstance(each, OnGPU) else each, tree)

    def pin(tensor: torch.Tensor) -> None:
        pinned[tensor.untyped_storage().data_ptr()] = StorageWeakRef(tensor.untyped_storage())

    def is_pinned(tensor: torch.Tensor) -> bool:
        memory = pinned.get(tensor.untyped_storage().data_ptr())
        return memory is not None and not memory.expired()

    def run(function: Any, args: Any, kwargs: Any) -> Any:
        there = on_gpu((args, kwargs))
        if function.namespace == "cllm" and there:
            one_device(str(function), args, kwargs)
            with Devices():
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if function._can_decompose():  # inside of an operator they come as a whole
            with Devices():
                return function.decompose(*args, **kwargs)
        if function in (aten._pin_memory.default, aten.pin_memory.default):
            about.contexts.add(current())
            copy = args[0].clone()
            pin(copy)
            return copy
        if function is aten.is_pinned.default:
            return is_pinned(args[0])
        target = kwargs.get("device")
        pins = kwargs.get("pin_memory")
        if target is None and not there and not pins:
            for each in graphs.written_by(function._schema, args, kwargs) if pinned else ():
                if is_pinned(each):
                    order.host_writes(str(function), each)
            return function(*args, **kwargs)
        if function is aten.copy_.default:
            return copied(*args, *kwargs.values())
        device = there[0].device if there else None
        if target is not None:
            device = torch.device(target) if torch.device(target).type == "cuda" else None
            kwargs = kwargs | {"device": torch.device("cpu") if device is not None else target}
            if device is None and there and torch.device(target).type == "cpu":
                waits(f"{function} to the host", current_stream(there[0].device))
            if device is not None and not there and function is aten._to_copy.default:
                sent(args[0], device, kwargs.get("non_blocking", False))
        elif there:
            one_device(str(function), args, kwargs)
        if pins:
            about.contexts.add(current())
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        if device is not None and device.index is None:
            device = torch.device("cuda", current())
        if there and graphs.depends_on_values(function, args):
            waits(str(function), current_stream(there[0].device))
        plain = values_of((args, kwargs))
        schema = function._schema
        record = capturing()
        if record is not None and device is not None:
            results = record.operator(function, *plain, forms.get(function))
        else:
            results = forms.get(function, function)(*plain[0], **plain[1])
        if device is not None or (there and target is not None and torch.device(target).type == "cpu"):
            name = schema.name.removeprefix("aten::")
            used, new = graphs.tensors_of(plain), graphs.tensors_of(results)
            known = {each.untyped_storage().data_ptr() for each in used}
            written = [*graphs.written_by(schema, *plain), *(each for each in new if each.untyped_storage().data_ptr() not in known)]
            if written:  # a view uses no memory, and what is made like another tensor uses its own
                used = [] if name.endswith("_like") or name.startswith("new_") else used
                order.operator(name, device if device is not None else there[0].device, [*used, *new], written)
        if pins:
            pin(results)
        if device is None:
            return results
        wrapped = tree_map(lambda each: OnGPU(each, device) if isinstance(each, torch.Tensor) else each, results)
        return return_and_correct_aliasing(function, args, kwargs, wrapped) if there else wrapped

    def one_device(who: str, *tree: Any) -> None:
        places = {each.device for each in tree_leaves(tree) if isinstance(each, torch.Tensor) and (isinstance(each, OnGPU) or each.dim())}
        if len(places) > 1:
            raise DeviceError(f"{who} takes tensors of {' and '.join(sorted(map(str, places)))}")

    def sent(source: torch.Tensor, device: torch.device, non_blocking: bool) -> None:
        """A copy from the host: one from memory that is not pinned, or that is not told to go on, is waited for."""
        if capturing() is not None and not is_pinned(source):
            raise DeviceError("a copy from memory of the host that is not pinned during a capture")
        if not (non_blocking and is_pinned(source)) and source.dim():
            waits("a copy from the host", current_stream(device))

    def copied(target: Any, source: Any, non_blocking: bool = False) -> Any:
        """A copy between any two places, on the stream of the GPU that is part of it."""
        plain = values_of((target, source))
        ends = on_gpu((target, source))
        if not isinstance(target, OnGPU) and not (non_blocking and is_pinned(target)):
            waits("a copy to the host", *(current_stream(each.device) for each in ends))
        if isinstance(target, OnGPU) and not isinstance(source, OnGPU):
            sent(source, target.device, non_blocking)
        record = capturing()
        if record is not None:
            record.operator(aten.copy_.default, plain, {})
        else:
            plain[0].copy_(plain[1])
        for device in {each.device for each in ends}:
            order.operator("copy_", device, list(plain), [plain[0]])
        return target

    original = launching.launch

    def interpret(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        with _disable_current_modes():
            original(kernel, grid, *args, **constants)

    def launch(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if not any(isinstance(each, OnGPU) for each in tensors):
            return original(kernel, grid, *args, **constants)
        one_device(kernel.__name__, tensors)
        if any(hasattr(each, "block_shape") for each in args):
            raise NotImplementedError("tensor descriptors, which the interpreter's device does not get")
        plain = values_of(args)
        order.operator(kernel.__name__, tensors[0].device, graphs.tensors_of(plain), [])
        record = capturing()
        if record is None or not record.launch(interpret, (kernel, grid, *plain), constants):
            interpret(kernel, grid, *plain, **constants)
        return None

    for name, module in list(sys.modules.items()):
        if name.startswith("cllm.kernels.") and vars(module).get("launch") is original:
            module.launch = launch  # type: ignore[attr-defined]

    class device_guard:
        """torch.cuda.device"""

        def __init__(self, device: Any) -> None:
            self.index = index_of(device) if device is not None else None

        def __enter__(self) -> None:
            self.before = current()
            if self.index is not None:
                library.fake_cuda_set(self.index)

        def __exit__(self, *error: Any) -> None:
            library.fake_cuda_set(self.before)

    chosen: dict[int, dict[int, Any]] = {}  # current streams by thread; what autograd's threads do goes to those of the main thread

    def streams_here() -> dict[int, Any]:
        return chosen.setdefault(0 if in_main_thread() else threading.get_ident(), {})

    def current_stream(device: Any = None) -> Any:
        index = index_of(device)
        return streams_here().get(index) or order.default(index)

    class stream_scope:
        """torch.cuda.stream: also makes the stream's device the current one."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            if self.stream is not None:
                self.guard = device_guard(self.stream.device)
                self.guard.__enter__()
                self.before = streams_here().get(self.stream.device.index)
                streams_here()[self.stream.device.index] = self.stream

        def __exit__(self, *error: Any) -> None:
            if self.stream is not None:
                streams_here()[self.stream.device.index] = self.before
                self.guard.__exit__()

    class Stream(streams.Stream):
        def __init__(self, device: Any = None, priority: int = 0) -> None:
            super().__init__(order, index_of(device), current_stream)
            about.contexts.add(self.device.index)

        def synchronize(self) -> None:
            waits("Stream.synchronize", self)
            waited()

    class Event(streams.Event):
        def __init__(self, enable_timing: bool = False, **options: Any) -> None:
            super().__init__(order, current_stream)

        def record(self, stream: Any = None) -> None:
            super().record(stream)
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            waits("Event.synchronize", self)
            waited()

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at) + 1e-6

    order.current = current_stream

    class CUDAGraph:
        record: graphs.Record | None = None

        def replay(self) -> None:
            assert self.record is not None
            for each in pools[self.pool]:
                each.spoil()
            with _disable_current_modes():
                self.record.replay()
            order.replay(self.record, current_stream(self.device))

    pools: dict[Any, list[graphs.Record]] = {}

    class graph:
        """torch.cuda.graph"""

        def __init__(self, made: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> None:
            self.made, self.mode = made, capture_error_mode
            self.made.pool = object() if pool is None else pool
            self.scope = stream_scope(stream if stream is not None else Stream())

        def __enter__(self) -> None:
            waits("the beginning of a capture", *order.streams(current()))
            waited()
            self.scope.__enter__()
            self.made.device = torch.device("cuda", current())
            about.record, about.mode = graphs.Record(), self.mode
            self.made.record = about.record
            order.recording = True

        def __exit__(self, *error: Any) -> None:
            about.record = None
            assert self.made.record is not None
            self.made.record.end()
            order.recording = False
            pools.setdefault(self.made.pool, []).append(self.made.record)
            self.scope.__exit__()

    gib = 1 << 30
    properties = SimpleNamespace(
        name="a GPU that is not there", major=8, minor=0, multi_processor_count=3, total_memory=16 * gib, shared_memory_per_block_optin=163 << 10,
        shared_memory_per_multiprocessor=164 << 10, L2_cache_size=1 << 20, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        warp_size=32, uuid="0", pci_domain_id=0, pci_bus_id=0, pci_device_id=0,
    )  # fmt: skip

    def used(figure: Any) -> Any:
        def call(device: Any = None) -> Any:
            about.contexts.add(index_of(device))
            return figure

        return call

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        about.contexts.add(index_of(device))
        return about.free_memory[index_of(device)], 16 * gib

    def set_device(device: Any) -> None:
        about.contexts.add(index_of(device))
        library.fake_cuda_set(index_of(device))

    def synchronize(device: Any = None) -> None:
        waits("torch.cuda.synchronize", *order.streams(index_of(device)))
        waited()

    replaced = {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 2, "current_device": current, "set_device": set_device,
        "device": device_guard, "Stream": Stream, "Event": Event, "stream": stream_scope, "current_stream": current_stream,
        "default_stream": lambda device=None: order.default(index_of(device)), "synchronize": synchronize, "empty_cache": lambda: None,
        "mem_get_info": mem_get_info, "memory_reserved": used(3 * gib), "max_memory_reserved": used(5 * gib),
        "memory_allocated": used(2 * gib), "max_memory_allocated": used(4 * gib), "reset_peak_memory_stats": used(None),
        "get_device_name": lambda device=None: properties.name, "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (8, 0), "is_current_stream_capturing": lambda: capturing() is not None,
        "graph_pool_handle": object, "CUDAGraph": CUDAGraph, "graph": graph,
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    nvml.free_memory = lambda index: about.free_memory[index]
    compatible = torch._has_compatible_shallow_copy_type
    # A module that moves gets new parameters, since the old ones cannot become tensors of another class.
    torch._has_compatible_shallow_copy_type = lambda a, b: not isinstance(a, OnGPU) and not isinstance(b, OnGPU) and compatible(a, b)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes a tensor of the host and then moves it
    Devices().__enter__()
    work = threading.Thread.run

    def with_devices(thread: threading.Thread) -> None:
        with Devices():  # a mode belongs to a thread
            work(thread)

    threading.Thread.run = with_devices  # type: ignore[method-assign]
    return about
