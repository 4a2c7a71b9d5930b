"""Muon's update of all matrices at once on a CPU: what `cllm.train.optimizers.muon` says in plain operations, as one list of launches."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import cllm.runtime as runtime
from cllm.kernels._register import backend_for
from cllm.runtime import profiler

NUM_STEPS = 5  # of the iteration


def work_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """Of memory that `MuonAgain` keeps for updates of float32 matrices of these shapes on a CPU; 0 where it does not serve."""
    return _work_bytes(tuple(shapes), runtime.settings()) if shapes and _is_served_by_numba(shapes[0]) else 0


@lru_cache(maxsize=64)
def _work_bytes(shapes: tuple[tuple[int, int], ...], settings: object) -> int:
    from cllm.kernels.numba import muon

    return muon.work_bytes(shapes, NUM_STEPS)


def _is_served_by_numba(shape: Sequence[int]) -> bool:
    rows, columns = shape
    return backend_for("matmul", ((rows, columns), (columns, rows)), torch.float32, "cpu").name == "numba"


class MuonAgain:
    """Muon's update of float32 matrices on a CPU. What follows from the matrices alone is found out once, for as long as they lie where they lay.

    coefficients: a, b and c of the polynomial a X + (b X X^T + c (X X^T)^2) X. steps: how often it is applied.
    """

    def __init__(self, coefficients: tuple[float, float, float], steps: int = NUM_STEPS) -> None:
        self._polynomial = coefficients, steps
        self._key: tuple[object, ...] = ()
        self._places: Any = None

    def call(
        self, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], *,
        learning_rate: float, momentum: float, weight_decays: list[float], clip: float,
    ) -> bool:  # fmt: skip
        """One update in place of matrices (R, C), from gradients that are multiplied by `clip`; False, with nothing done, where it is not served: on
        other devices, for other dtypes than float32 (gradients also bfloat16), for empty matrices and for those that do not lie row by row."""
        if not params or params[0].device.type != "cpu" or not _is_served_by_numba(params[0].shape):
            return False
        key = (
            *(each.data_ptr() if each.is_contiguous() and each.numel() else None for matrices in (params, momenta) for each in matrices),
            momentum, runtime.settings(), *weight_decays,
        )  # fmt: skip
        if None in key or any(each.dtype != torch.float32 for each in params) or not all(map(_is_served, grads)):
            return False
        from cllm.kernels.numba import muon

        serving = muon if profiler.recording is None else profiler.recording.watch("muon", muon)
        if key != self._key:
            self._places = None  # its work space is free before the next is taken
            self._key, self._places = key, serving.Places(params, momenta, weight_decays, momentum, *self._polynomial)
        serving.apply(grads, self._places, learning_rate, clip)
        increment_version([*params, *momenta])
        return True


def _is_served(grad: Tensor) -> bool:
    return grad.is_contiguous() and grad.dtype in (torch.float32, torch.bfloat16)
