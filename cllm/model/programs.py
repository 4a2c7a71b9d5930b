"""What is computed of one batch after another of the same shape, as recorded programs with no Python between their kernels: steps and evaluations.

A kind of batch that comes for the second time is recorded while it is computed (`runtime/workers/program.py`). For the third time it is computed both
ways, and the program is believed only if it gives the bits of the single operations in every result. From then on it is replayed. What a program does
not hold for runs operation by operation: another shape, a document longer than a row, other settings, other weights in the place of those that it was
recorded with, and whatever somebody watches. `CLLM_STEP_PROGRAM=0` lets everything run so.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cllm import runtime
from cllm.data.tokens.batch import IGNORE, Batch
from cllm.model.memory import MOST_PROGRAM_BYTES, predict
from cllm.runtime import profiler, progress

if TYPE_CHECKING:
    from cllm.model.model import Model
    from cllm.runtime.workers.program import Program, Recorder

MOST_KINDS = 64  # of batches that are remembered
TOO_MUCH = "it needs too much memory"  # which is no surprise: Python's share of a large step is small

Results = list[Tensor | None]
Run = Callable[[Batch, "Recorder | None"], Results]
Seconds = dict[str, float]  # how long the parts of the work took


class Programs:
    """The programs of one kind of work with one model. what: the work, in the plural. parts: of a program, in order. differentiated: whether the work
    takes gradients."""

    def __init__(self, model: Model, what: str, parts: Sequence[str], differentiated: bool) -> None:
        self._model, self._what, self._parts = model, what, parts
        self._kinds: OrderedDict[tuple[object, ...], Kind] = OrderedDict()
        self._watch = _Watch(model, differentiated)
        self._busy = threading.Lock()
        self._told = {TOO_MUCH}

    @property
    def programs(self) -> list[Program]:
        """Those that are recorded."""
        return [kind.program for kind in self._kinds.values() if kind.program is not None]

    @property
    def bytes(self) -> int:
        """What all of them have of memory to themselves."""
        return sum(each.bytes for each in self.programs)

    @property
    def num_replayed(self) -> int:
        """How many batches were computed by a program alone."""
        return sum(kind.num_replayed for kind in self._kinds.values())

    @property
    def reasons(self) -> list[str]:
        """Why some kinds of batches are not replayed."""
        return [kind.reason for kind in self._kinds.values() if kind.reason is not None]

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Whether programs may be used inside: by one thread at a time, and while nobody wants to see the operations."""
        if not self._watch.is_quiet() or not self._busy.acquire(blocking=False):
            yield False
            return
        try:
            yield True
        finally:
            self._busy.release()

    def kind_of(self, batch: Batch, options: tuple[object, ...]) -> Kind | None:
        """The kind of a batch: all that a program is recorded for. options: what else its results depend on."""
        model, (tokens, targets, bounds, *_) = self._model, batch
        tensors = (tokens, targets) if bounds is None else (tokens, targets, bounds)
        if any(each.device.type != "cpu" for each in tensors) or tokens.dim() != 2 or targets.shape != tokens.shape:
            return None
        addresses = self._watch.addresses()
        if tokens.dtype != torch.int64 or targets.dtype != torch.int64 or addresses is None:
            return None
        settings = model.compute_dtype, model.recompute, model.training, model.config, runtime.settings()
        key = tokens.shape, bounds is None, options, settings, addresses
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = Kind(model, self._parts)
            if len(self._kinds) > MOST_KINDS:  # batches may differ in shape for ever
                self._kinds.pop(next((each for each, found in self._kinds.items() if found.program is None), key))
        return kind

    def computed(self, batch: Batch, kind: Kind | None, numbers: Mapping[str, float], run: Run, seconds: Seconds) -> Results:
        """What `run` gives for a batch, by its operations or by its program. Of a program the results are there until it is replayed again.

        numbers: what differs from batch to batch, by name. run: gets the batch, or its twin at a place that stays, and who records it.
        """
        if kind is None or not kind.take(batch):
            return run(batch, None)
        if kind.proven:
            return kind.replay(numbers, seconds)
        if kind.program is not None:
            expected = run(batch, None)
            kind.prove(numbers, expected)
            self._tell(kind)
            return expected
        if profiler.recording is not None:
            return run(batch, None)
        from cllm.kernels.numba import copies  # noqa: F401 - what torch does between kernels, as launches
        from cllm.runtime.workers.program import record

        with ExitStack() as recording:
            try:
                recorder = recording.enter_context(record(max(0, MOST_PROGRAM_BYTES - self.bytes), numbers, longest=batch.tokens.shape[1]))
            except MemoryError:  # of addresses, of which a limit may leave few
                kind.reason = TOO_MUCH
                return run(batch, None)
            results = run(kind.batch, recorder)
        kind.keep(recorder, results)
        self._tell(kind)
        return results

    def _tell(self, kind: Kind) -> None:
        """Says once why something is not replayed that could have been."""
        if kind.reason is not None and kind.reason not in self._told:
            self._told.add(kind.reason)
            progress.say(f"{self._what} run operation by operation instead of as a recorded program: {kind.reason}.")


class Kind:
    """One kind of batch, and its program once it is recorded."""

    def __init__(self, model: Model, parts: Sequence[str]) -> None:
        self._model, self._parts = model, parts
        self.seen = 0
        self.num_replayed = 0
        self.reason: str | None = None
        """Why it is not replayed."""
        self.program: Program | None = None
        self.proven = False
        self._results: Results = []
        self.batch = Batch(torch.empty(0), torch.empty(0))

    def take(self, batch: Batch) -> bool:
        """Puts a batch where the program reads it; whether there is, or may be, a program for it."""
        self.seen += 1
        if self.seen == 1 or self.reason is not None:
            return False
        if self.batch.tokens.dim() != 2 and not self._make_room(batch):
            return False
        # What is wrong is told by the operations; the kernels alone would read beyond the end of a table.
        most = self._model.embedding_weight.shape[0]
        tokens, targets = batch.tokens.numpy(), batch.targets.numpy()
        predicted = targets if targets.min() >= 0 else targets[targets != IGNORE]
        if tokens.min() < 0 or tokens.max() >= most or (predicted.size and (predicted.min() < 0 or predicted.max() >= most)):
            return False
        self.batch.tokens.numpy()[...] = tokens
        self.batch.targets.numpy()[...] = targets
        return batch.cu_seqlens is None or self._take_documents(batch.cu_seqlens.numpy())

    def _take_documents(self, bounds: np.ndarray) -> bool:
        """Puts the bounds of documents in their place, filled up with empty documents, and the position of each token in its document."""
        assert self.batch.cu_seqlens is not None and self.batch.positions is not None
        (num_tokens,), (_, longest) = self.batch.positions.shape, self.batch.tokens.shape
        if bounds.dtype != np.int32 or not 2 <= bounds.size <= num_tokens + 1:
            return False
        lengths = np.diff(bounds)
        if bounds[0] != 0 or bounds[-1] != num_tokens or lengths.min() < 0 or lengths.max() > min(longest, self._model.config.max_seq_len):
            return False
        there = self.batch.cu_seqlens.numpy()
        there[: bounds.size], there[bounds.size :] = bounds, num_tokens
        self.batch.positions.numpy()[...] = np.arange(num_tokens) - np.repeat(bounds[:-1], lengths)
        return True

    def _make_room(self, batch: Batch) -> bool:
        model, tokens = self._model, batch.tokens
        precision = "fp32" if model.compute_dtype == torch.float32 else "bf16"
        if not predict(model.config, tokens.shape[0], tokens.shape[1], precision, model.recompute).program:
            self.reason = TOO_MUCH
            return False
        documents = batch.cu_seqlens is not None
        bounds = torch.empty(tokens.numel() + 1, dtype=torch.int32) if documents else None
        self.batch = Batch(
            torch.empty(tokens.shape, dtype=torch.int64),
            torch.empty(tokens.shape, dtype=torch.int64),
            bounds,
            (),
            torch.empty(tokens.numel(), dtype=torch.int64) if documents else None,
        )
        return True

    def keep(self, recorder: Recorder, results: Results) -> None:
        """Takes what was recorded, and with which results."""
        self.program = recorder.program() if all(recorder.arena.holds(each) for each in results if each is not None) else None
        if self.program is None:
            self._give_up(recorder.reason or "its results lie elsewhere")
        self._results = results

    def replay(self, numbers: Mapping[str, float], seconds: Seconds) -> Results:
        """numbers: what depends on more than the batch."""
        assert self.program is not None
        self.num_replayed += 1
        self.program.numbers.update(numbers)
        for part in self._parts:
            began = time.perf_counter()
            with profiler.span(part):
                self.program.run(part)
            seconds[part] += time.perf_counter() - began
        return self._results

    def prove(self, numbers: Mapping[str, float], expected: Results) -> None:
        """Compares a replay with what the operations found for the same batch."""
        found = self.replay(numbers, dict.fromkeys(self._parts, 0.0))
        self.num_replayed -= 1
        self.proven = all(map(_have_the_same_bits, found, expected)) and self.program is not None and self.program.holds()
        if not self.proven:
            self._give_up("it gives other bits than its operations one by one")

    def _give_up(self, reason: str) -> None:
        self.program, self.reason = None, reason


def _have_the_same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class _Watch:
    """Notices what a program would pass over: hooks and modes that want to see operations, modules and parameters that have changed."""

    def __init__(self, model: Model, differentiated: bool) -> None:
        self._model, self._differentiated = model, differentiated
        self._modules = list(model.modules())
        self._parameters = [each._parameters for each in self._modules if each._parameters]
        self._children = [(each._modules, tuple(each._modules.values())) for each in self._modules]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(each, kind) for each in self._modules for kind in kinds]

    def is_quiet(self) -> bool:
        """Whether nobody wants to see the operations and modules that a program leaves out."""
        return (
            os.environ.get("CLLM_STEP_PROGRAM") != "0"
            and torch.is_grad_enabled() == self._differentiated
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._len_torch_function_stack()
            and not torch.autograd._profiler_enabled()
            and not torch.is_anomaly_enabled()
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
            and "loss" not in vars(self._model)
            and not any(self._hooks)
            and all(tuple(now.values()) == then for now, then in self._children)
        )

    def addresses(self) -> tuple[int, ...] | None:
        """Where each parameter lies and whether it is trained; None where somebody wants to see a gradient as it is made."""
        found = []
        for parameters in self._parameters:
            for each in parameters.values():
                if each is not None:
                    if each._backward_hooks or each._post_accumulate_grad_hooks:
                        return None
                    found.append(each.data_ptr() | each.requires_grad)
        return tuple(found)
