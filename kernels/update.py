"""Lion's and schedule-free AdamW's updates of all tensors at once on a CPU: what `cllm.train.optimizers` says in plain operations, as one launch."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import cllm.runtime as runtime
from cllm.kernels._operator import is_observed
from cllm.kernels._register import backend_for
from cllm.runtime import profiler


class UpdateAgain:
    """An update in place of float32 parameters and their state on a CPU. What follows from where they lie is found out once, for as long as they lie
    there.

    name: of the file in a backend's folder that has it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._key: tuple[object, ...] = ()
        self._places: Any = None

    def call(
        self, params: list[Tensor], grads: list[Tensor], states: list[Tensor], second_states: list[Tensor], weight_decays: list[float], **numbers: Any
    ) -> bool:
        """One update; False, with nothing done, where it is not served: on other devices, for other dtypes than float32 (gradients also bfloat16),
        for tensors that are not contiguous, and where whoever watches has to see the operations. numbers: those that the update takes beside."""
        kept = list(chain(params, states, second_states))
        if not params or any(each.device.type != "cpu" or each.dtype != torch.float32 for each in kept) or is_observed():
            return False
        if not all(map(Tensor.is_contiguous, chain(kept, grads))) or any(each.dtype not in (torch.float32, torch.bfloat16) for each in grads):
            return False
        chosen = backend_for("adamw", ((sum(each.numel() for each in params),),), torch.float32, "cpu")
        if not chosen.has(self._name):
            return False
        serving: Any = chosen.module(self._name)
        if profiler.recording is not None:
            serving = profiler.recording.watch(self._name, serving)
        key = (*map(Tensor.data_ptr, kept), runtime.settings(), *weight_decays)
        if key != self._key:
            places = chosen.module("adamw").Places
            self._key, self._places = key, places(params, grads, states, second_states, weight_decays)
        self._places.table.take(grads)
        serving.apply(self._places, **numbers)
        increment_version(kept)
        return True
