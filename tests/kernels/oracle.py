"""What every kernel is measured with: the same inputs in any dtype, and the rule of the float64 oracle.

The rule: error <= 2 x the error of the same computation in plain torch in the same dtype + one rounding of the largest value.
`cases.py` holds the cases; `conftest.py` loads both and hands them to the tests as one fixture.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cllm import runtime

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Tensors = tuple[Tensor | None, ...]
Results = dict[str, Tensor | None]  # outputs and gradients, named out0, out1, ..., d_<input>


def device() -> str:
    """Where the backend in force computes: on the GPU where there is one, and numba's kernels on the CPU."""
    return "cpu" if runtime.settings().backend == "numba" else DEVICE


class Inputs:
    """Makes the same inputs in any dtype: values are drawn in float64, rounded to `rounding`, then cast to `dtype`.

    They are drawn on the CPU, so that they are the same everywhere, and lie where the backend in force computes.
    """

    def __init__(self, rounding: torch.dtype, dtype: torch.dtype, seed: int = 0):
        self.rounding, self.dtype, self.device = rounding, dtype, device()
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu") * scale + offset
        return values.to(self.rounding).to(self.dtype).to(self.device)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=self.generator, device="cpu").to(self.device)

    def master(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A weight that stays float32 beside bfloat16 activations; its values survive the rounding, so that the oracle agrees."""
        values = self.normal(*shape, scale=scale)
        return values.float() if self.dtype == torch.bfloat16 else values


_autograd = ThreadPoolExecutor(1, thread_name_prefix="autograd", initializer=torch.set_default_device, initargs=("meta",))


def backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    """`torch.autograd.backward` in another thread, where autograd runs it on a GPU: nothing that this thread has set holds there.

    A tensor that names no device is made nowhere in that thread, as in `serve` of conftest.py.
    """
    _autograd.submit(torch.autograd.backward, outputs, gradients).result()


@dataclass
class Case:
    """One operation on one kind of input: `ours` and `plain` compute the same from the tensors that `make` returns."""

    op: str
    name: str
    make: Callable[[Inputs], dict[str, Any]]
    ours: Callable[..., Tensor | Tensors]
    plain: Callable[..., Tensor | Tensors]
    constants: tuple[str, ...] = field(default=())
    lse_size: float = 0.0  # magnitude of a saved float32 log-sum-exp: its rounding is an error of that many roundings in exp(z - lse)
    known: dict[Any, tuple[Results, Results]] = field(default_factory=dict, repr=False)  # see `exact_and_plain`

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def leaves(case: Case, rounding: torch.dtype, dtype: torch.dtype) -> dict[str, Any]:
    """What `case` is computed from: floating-point tensors that gradients are asked of, unless they are constants, and all others."""
    inputs = Inputs(rounding, dtype)
    tensors: dict[str, Any] = {}
    for name, tensor in case.make(inputs).items():
        assert not isinstance(tensor, Tensor) or tensor.device.type == inputs.device, f"{case}: {name} is on {tensor.device}, not {inputs.device}"
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor = tensor.detach()  # keeps strides: a leaf may be a view
            if name not in case.constants:
                tensor.requires_grad_()
        tensors[name] = tensor
    return tensors


def run(case: Case, compute: Callable[..., Any], rounding: torch.dtype, dtype: torch.dtype) -> Results:
    """Outputs and gradients of one computation."""
    tensors = leaves(case, rounding, dtype)
    outputs = compute(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results: Results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    cotangents = Inputs(rounding, dtype, seed=1)
    graded = [(out, cotangents.normal(*out.shape).to(out.dtype)) for out in outputs if out.requires_grad]
    if graded:
        backward([out for out, _ in graded], [dout for _, dout in graded])
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            results[f"d_{name}"] = tensor.grad
    return results


def check_rule(what: str, ours: Tensor, plain: Tensor, exact: Tensor, slack: float = 1.0, float32_slack: float = 0.0) -> None:
    """The rule above; infinities must be where the oracle has them.

    `slack` counts the roundings allowed on top, `float32_slack` those of float32 values inside the computation.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    if not exact.is_floating_point():
        assert torch.equal(ours, exact), what
        return
    finite = torch.isfinite(exact)
    assert torch.equal(ours.double()[~finite], exact[~finite]), f"{what}: infinities differ"
    if not finite.any():
        return
    ours_error = (ours.double() - exact)[finite].abs().max().item()
    plain_error = (plain.double() - exact)[finite].abs().max().item()
    largest = exact[finite].abs().max().item()
    rounding = torch.finfo(ours.dtype).eps * largest
    allowed = 2 * plain_error + slack * rounding + float32_slack * torch.finfo(torch.float32).eps * largest + torch.finfo(torch.float32).tiny
    assert not math.isnan(ours_error), f"{what}: NaN in the result"
    assert ours_error <= allowed, f"{what}: error {ours_error:.3e}, plain torch {plain_error:.3e}, one rounding {rounding:.3e}"


def exact_and_plain(case: Case, dtype: torch.dtype) -> tuple[Results, Results]:
    """What plain torch comes to in float64 and in `dtype`, computed once for all backends of a device."""
    key = dtype, device()
    if key not in case.known:
        case.known[key] = run(case, case.plain, dtype, torch.float64), run(case, case.plain, dtype, dtype)
    return case.known[key]


def check_case(case: Case, dtype: torch.dtype) -> None:
    exact, plain = exact_and_plain(case, dtype)
    ours = run(case, case.ours, dtype, dtype)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        found = ours[name]
        assert expected is not None and found is not None and plain[name] is not None, f"{case} {name}: no gradient"
        slack = 64.0 if dtype == torch.float64 else 1.0  # plain torch is the oracle itself there: its error reads as 0
        float32_slack = case.lse_size if name.startswith("d_") and dtype != torch.float64 else 0.0
        check_rule(f"{case} {name} {dtype}", found, plain[name], expected, slack, float32_slack)
