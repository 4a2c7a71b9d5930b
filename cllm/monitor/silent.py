"""The Reporter and the Metrics of a process that leaves reporting to the first one: every method is there, and none does anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cllm.monitor.metrics import Metrics
from cllm.monitor.records import StepTiming
from cllm.monitor.reporter import Reporter

if TYPE_CHECKING:
    import torch

    from cllm.config.model import ModelConfig
    from cllm.config.train import TrainConfig
    from cllm.evaluate.loss import Evaluation
    from cllm.monitor.records import Row, StepResult, TrainResult


class SilentReporter(Reporter):
    """Shows nothing and writes no log; only `seconds` is measured."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __enter__(self) -> SilentReporter:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def tokens_per_second(self) -> float:
        return 0.0

    def begin(self, step: int, steps: int, config: TrainConfig, model: ModelConfig, device: torch.device) -> None:
        pass

    def ends_after(self, steps: int) -> None:
        pass

    def steps_done(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def beat(self, *_: object) -> None:
        pass

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        yield

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        yield

    @contextmanager
    def stage(self, label: str, part: str | None = None) -> Iterator[Callable[[int, int], None]]:
        yield self.beat

    def trained(self, step: int, tokens: int, result: StepResult, seconds: Mapping[str, float]) -> StepTiming:
        return StepTiming()

    def evaluated(self, step: int, result: Evaluation, unigram: float | None, best: bool) -> None:
        pass

    def finish(self, result: TrainResult) -> None:
        pass


class SilentMetrics(Metrics):
    """Keeps no rows."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> SilentMetrics:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def truncate(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        return []

    def write(self, row: Row) -> None:
        pass

    def histograms(self, kind: str, step: int, tensors: Mapping[str, Any]) -> None:
        pass

    def text(self, name: str, step: int, text: str) -> None:
        pass

    def hyperparameters(self, settings: Mapping[str, Any], outcome: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
