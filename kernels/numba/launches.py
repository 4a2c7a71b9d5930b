"""A list of launches prepared once and run as one compiled call: what stands between the kernels of a token when each takes microseconds.

Every launch is a kernel of this folder on buffers that stay where they are. What changes from run to run are a few integers, which the caller
writes into the arrays that it gets here. N rows, E embed, K inputs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import matvec, norm
from cllm.kernels.numba.launch import Kernel, is_half
from cllm.kernels.numba.matvec import Output
from cllm.kernels.stack import Layer, Linear, Norm
from cllm.runtime.workers import Launch, run, table_of


def aligned(memory: Tensor) -> int:
    """The first address in it at which a line of the cache begins; 64 bytes more than needed make room for it."""
    return (memory.data_ptr() + 63) & ~63


def rows_of(out: Tensor) -> Output:
    return Output(out.data_ptr(), out.stride(0) * out.element_size())


class Launches:
    """workers: how many share each launch; scratch and scratch_bytes: address and size of each one's work space for products."""

    def __init__(self, workers: int, scratch: int, scratch_bytes: int) -> None:
        self.workers, self.scratch, self.scratch_bytes = workers, scratch, scratch_bytes
        self.kept: list[object] = []  # whatever the launches hold addresses of
        self._listed: list[Launch] = []
        self._table = table_of(())

    def add(self, kernel: Kernel, tasks: int, ints: Sequence[int] | np.ndarray, floats: Sequence[float] = (0.0,)) -> np.ndarray:
        """The launch of a kernel behind those added before; the integers that it will read."""
        p, f = np.array(ints, np.int64), np.array(floats, np.float64)
        self.kept += [p, f]
        self._listed.append(kernel.launch(p.ctypes.data, f.ctypes.data, tasks))
        return p

    def run(self) -> None:
        if not self._table:
            self._table = table_of(self._listed)
        run(self._table.buffer_info()[0], len(self._listed), self.workers)

    def norm(self, x: Tensor, added: Tensor | None, weights: Norm, y: Tensor, eps: float) -> None:
        """x (N, E), with `added` the sum of both, which is then stored in x -> y."""
        rows, columns = x.shape
        row = columns * x.element_size()
        weight = weights.weight.detach().contiguous()
        bias = None if weights.bias is None else weights.bias.detach().contiguous()
        mean, rstd = torch.empty(2, rows, dtype=torch.float32)
        self.kept += [weight, bias, mean, rstd]
        arguments = norm.forward_arguments(
            x=x.data_ptr() if added is None else added.data_ptr(),
            x_row=row,
            residual=0 if added is None else x.data_ptr(),
            residual_row=row,
            h=0 if added is None else x.data_ptr(),
            h_row=row,
            y=y.data_ptr(),
            y_row=row,
            half=is_half(x),
            weight=weight.data_ptr(),
            weight_half=is_half(weight),
            bias=0 if bias is None else bias.data_ptr(),
            bias_half=0 if bias is None else is_half(bias),
            mean=0 if bias is None else mean.data_ptr(),
            rstd=rstd.data_ptr(),
            rows=rows,
            columns=columns,
        )
        self.add(norm._forward_kernel, -(-rows // norm.ROWS_PER_TASK), arguments, norm.options(eps=eps))

    def products(self, products: Sequence[tuple[Tensor, Linear, Output]], partner: int = 0) -> list[np.ndarray]:
        """One launch for all of x (N, K) @ weight.T; their jobs."""
        jobs: list[np.ndarray] = []
        tasks = 0
        for x, linear, out in products:
            jobs.append(self._job(x, linear, out, tasks, partner))
            tasks += matvec.num_tasks(jobs[-1])
        self.add(matvec.kernel, tasks, matvec.launch_arguments(jobs, self.scratch, self.scratch_bytes))
        return jobs

    def _job(self, x: Tensor, linear: Linear, out: Output, first_task: int = 0, partner: int = 0) -> np.ndarray:
        weight, bias = linear.weight, linear.bias
        if isinstance(weight, Tensor):
            weight = weight.detach()
        if bias is not None:
            bias = bias.detach().to(torch.float32).contiguous()
        job = matvec.job(x, weight, bias, out, self.workers, first_task, partner)
        self.kept += [x, weight, bias, job]
        return job

    def feed_forward(self, x: Tensor, layer: Layer, z: Tensor, hidden: Tensor, out: Tensor, activation: str) -> None:
        """x (N, E) -> out (N, E); z and hidden (N, F) are written on the way."""
        gate = None if layer.gate is None else self._job(x, layer.gate, rows_of(z))
        end = Output(*rows_of(hidden)[:2], activation, 0 if gate is None else z.data_ptr())
        self.products([(x, layer.up, end)], 0 if gate is None else gate.ctypes.data)
        self.products([(hidden, layer.down, rows_of(out))])
