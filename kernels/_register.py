"""How an operation becomes a torch operator, and how a call finds the backend that serves it.

An operation is a `torch.library` custom op in the namespace `cllm` with a fake (shapes for the compiler) and, where it has one, an
autograd formula. Its implementation asks `backend(...)` for a module: the runtime's plan names the backend, the table here names
the module, and the module is imported when it first serves. A new backend is one more entry in `_BACKENDS`.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm import runtime
from cllm.runtime import profiler
from cllm.runtime.errors import UserError
from cllm.runtime.gpu import gpu_of

# Operation as the plan knows it -> the file that holds it in each backend's folder.
OPERATIONS = {
    "attention": "attention",
    "feed_forward": "feed_forward",
    "rms_norm": "norm",
    "layer_norm": "norm",
    "rotary": "rotary",
    "softmax": "softmax",
    "embedding": "embedding",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "matmul": "matmul",
    "quantized": "quantized",
    "adamw": "adamw",
}


class _Backend(NamedTuple):
    package: str
    device_types: tuple[str, ...]
    priority: int  # the highest that can serve is chosen


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_BACKENDS = {
    "numba": _Backend("cllm.kernels.numba", ("cpu",), 100),
    "triton": _Backend("cllm.kernels.triton", ("cuda",), 100),
    "gluon": _Backend("cllm.kernels.gluon", ("cuda",), 90),
    "sdpa": _Backend("cllm.kernels.sdpa", ("cuda",), 80),
    "torch": _Backend("cllm.kernels.torch", ("cpu", "cuda", "mps", "xpu"), 0),
}

if _INTERPRETED:  # Triton then runs on the CPU, for whoever asks for it by name: slow, and exact enough to test every kernel
    for _name in ("triton", "sdpa"):
        _BACKENDS[_name] = _BACKENDS[_name]._replace(device_types=("cuda", "cpu"))

Shapes = tuple[tuple[int, ...], ...]
_MAX_HEAD_DIM = 256
_MAX_CACHED_PLANS = 4096
_modules: dict[tuple[Any, ...], ModuleType] = {}


def _can_serve(op: str, name: str) -> Callable[..., tuple[bool, str]]:
    """Whether the kernels of backend `name` can serve `op`."""
    module_name = f"{_BACKENDS[name].package}.{OPERATIONS[op]}"
    library = "numba" if name == "numba" else "triton"
    three = ("float32", "bfloat16", "float16")
    dtypes = {"numba": ("float32", "bfloat16"), "triton": three, "gluon": ("bfloat16", "float16"), "sdpa": three}[name]
    praise = {
        "numba": "explicit SIMD, every core", "triton": "fused Triton kernels", "gluon": "warp-specialised for Hopper",
        "sdpa": "torch's own attention: cuDNN or flash",
    }[name]  # fmt: skip

    def can_serve(shapes: Shapes, dtype: torch.dtype | str, device: str) -> tuple[bool, str]:
        if str(dtype).removeprefix("torch.") not in dtypes:
            return False, f"the {name} kernels compute {', '.join(dtypes)}, not {str(dtype).removeprefix('torch.')}"
        if op == "attention" and shapes and shapes[0][-1] > _MAX_HEAD_DIM:
            return False, f"head size {shapes[0][-1]} is larger than {_MAX_HEAD_DIM}"
        if name == "gluon" and (op != "attention" or not gpu_of(torch.device(device)).is_hopper):
            return False, "there are Gluon kernels for attention on Hopper alone"
        if name == "gluon" and shapes and shapes[0][-1] not in (64, 128, 256):
            return False, f"the Gluon kernels take heads of 64, 128 and 256, not {shapes[0][-1]}"
        if name == "sdpa" and op != "attention":
            return False, "torch's own kernels are offered for attention alone"
        if importlib.util.find_spec(library) is None:
            return False, f"{library} is not installed"
        if importlib.util.find_spec(module_name) is None:
            return False, f"there is no {module_name}"
        return True, praise

    return can_serve


def _torch_can_serve(shapes: Shapes, dtype: torch.dtype | str, device: str) -> tuple[bool, str]:
    return True, "plain torch serves every dtype and device"


def _register_backends() -> None:
    for op in OPERATIONS:
        for name, entry in _BACKENDS.items():
            can_serve = _torch_can_serve if name == "torch" else _can_serve(op, name)
            for device_type in entry.device_types:
                priority = {"triton": -1, "sdpa": -2}.get(name, entry.priority) if device_type == "cpu" else entry.priority
                runtime.register_backend(op, name, device_type, priority, can_serve)


def backend_serves(op: str, name: str, shapes: Shapes, dtype: torch.dtype, device: str) -> bool:
    """Whether backend `name` could serve, were it asked for."""
    return op in OPERATIONS and name in _BACKENDS and (name == "torch" or _can_serve(op, name)(shapes, dtype, device)[0])


def backend(op: str, shapes: Shapes, dtype: torch.dtype, device_type: str, work: float) -> Any:
    """The module that serves `op` on these shapes; `work` is its floating-point operations, or bytes moved where that is more."""
    settings = runtime.settings()
    key = (op, shapes, dtype, device_type, settings.backend, settings.threads)
    module = _modules.get(key)
    if module is None:
        plan = runtime.plan(op, shapes, dtype, device_type, work)
        module = importlib.import_module(f"{_BACKENDS[plan.backend].package}.{OPERATIONS[op]}")
        if len(_modules) >= _MAX_CACHED_PLANS:  # decoding meets a new key length at every step
            _modules.clear()
        _modules[key] = module
    recording = profiler.recording
    return module if recording is None else recording.watch(op, module)


def operation(
    name: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    mutates_args: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as the operator `cllm::name` and return what calls it."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"cllm::{name}", function, mutates_args=mutates_args)
        op.register_fake(fake)
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)
        operator = getattr(torch.ops.cllm, name).default
        if mutates_args:  # the dispatcher counts the versions of what an operator changes
            return operator

        def call(*args: Any) -> Any:
            return operator(*args) if _is_observed(args) else function(*args)

        return call

    return make


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_TYPES = _TENSORS | {type(None), bool, int, float, str, torch.dtype}


def _is_observed(args: tuple[Any, ...]) -> bool:
    """Whether anything but the implementation has to see this call: autograd, a compiler, a dispatch mode, a transform, a profiler, a tensor
    subclass.

    In the backward pass and in generation nothing else does; going past the dispatcher then halves the cost of a small call.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.autograd._profiler_enabled():  # which shows operators by their names
        return True
    differentiated = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind not in _PLAIN_TYPES or (kind in _TENSORS and (arg.is_meta or (differentiated and arg.requires_grad))):
            return True
    return False


def tensor_or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None: an absent result is an empty tensor."""
    return like.new_empty(0) if value is None else value


def like_weight(gradient: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient in the memory layout of its weight, which autograd would otherwise copy it to, slowly, at every step."""
    if weight is None or gradient.stride() == (layout := torch.empty_like(weight, device="meta")).stride():
        return gradient
    return torch.empty_strided(layout.shape, layout.stride(), dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-row statistics such as log-sum-exp: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Activations of one call: floating point, and all of the first one's dtype and device."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            if not tensor.is_floating_point():
                raise UserError(f"{op}: {name} must be floating point, got {tensor.dtype}. Convert it first.")
            first, first_name = tensor, name
        elif tensor.dtype != first.dtype or tensor.device != first.device:
            raise UserError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device} and {first_name} is {first.dtype} on {first.device}. "
                "They must agree: convert one of them."
            )


def check_weight(op: str, activation: Tensor, **weights: Tensor | None) -> None:
    """Weights may be the float32 master copy or have the activation's dtype."""
    for name, weight in weights.items():
        if weight is None:
            continue
        if weight.dtype != activation.dtype and weight.dtype != torch.float32:
            raise UserError(f"{op}: {name} is {weight.dtype}, expected torch.float32 or the activations' {activation.dtype}. Convert it first.")
        if weight.device != activation.device:
            raise UserError(f"{op}: {name} is on {weight.device} and the activations on {activation.device}. Move one.")


def check_integer_range(op: str, name: str, values: Tensor, end: int, ignored: int | None = None) -> None:
    """Indices within [0, end): read on the CPU only, because elsewhere the answer would stall the device."""
    if values.device.type != "cpu" or values.numel() == 0:
        return
    found = values.detach().numpy()  # a few microseconds for a batch of tokens; torch's aminmax and its comparisons take 40
    if found.min() >= 0 and found.max() < end:
        return
    wrong = (values < 0) | (values >= end)
    if ignored is not None:
        wrong &= values != ignored
    if wrong.any():
        raise UserError(
            f"{op}: {name} holds {int(values[wrong][0])}, expected 0 <= {name} < {end}"
            + (f" or {ignored} where there is nothing to predict" if ignored is not None else "")
            + ". Check that tokenizer and vocabulary size belong together."
        )


_register_backends()
