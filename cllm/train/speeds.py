"""How fast this machine trains models: measured over a few updates, and kept."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cllm import runtime
from cllm._version import __version__
from cllm.config.model import ModelConfig
from cllm.config.time_choice import Speed
from cllm.data.tokens.batch import Batch
from cllm.model.model import Model
from cllm.runtime import tuning
from cllm.train.build import make_step

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig

SHORT, LONG = 2, 16  # sequences in the updates that are measured; fewer would fit into caches that those of a training leave
WARM, ROUNDS = 3, 3  # updates that compile, are recorded and are compared (`step_program.py`), and those that are measured


class Speeds:
    """The speeds of models under the settings of `config`, which is resolved but for its sizes, on `device`.

    What was measured on this machine before is taken from the cache, and held against one small model that is measured anew: other programs may use
    the cores now. What has not been measured is estimated from the nearest model that was, by its arithmetic.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._measured: dict[ModelConfig, Speed] = {}
        self._slower = 1.0  # than when the cache was filled

    def begin(self, sizes: ModelConfig) -> None:
        """Measures a small model, and how busy the machine is by it."""
        before, now = self._cached(sizes), self._now(sizes)
        if before is not None:
            self._slower = max(1.0, now.update(LONG * self._config.train.seq_len) / before.update(LONG * self._config.train.seq_len))
        if before is None or self._slower == 1.0:
            self._keep(sizes, now)
        self._measured[sizes] = now

    def measure(self, sizes: ModelConfig) -> None:
        """Takes the speed of a model from the cache, or measures it."""
        before = self._cached(sizes)
        if before is not None:
            self._measured[sizes] = Speed(self._slower * before.overhead, self._slower * before.per_token)
            return
        self._measured[sizes] = now = self._now(sizes)
        self._keep(sizes, Speed(now.overhead / self._slower, now.per_token / self._slower))

    def knows(self, sizes: ModelConfig) -> bool:
        """Whether the speed of a model is measured and not estimated."""
        return sizes in self._measured

    def of(self, sizes: ModelConfig) -> Speed:
        """The speed of a model, measured or estimated; one has been measured."""
        if sizes in self._measured:
            return self._measured[sizes]
        length = self._config.train.seq_len
        near = min(self._measured, key=lambda each: abs(each.num_parameters() - sizes.num_parameters()))
        known = self._measured[near]
        work = sizes.flops_per_token(length) / near.flops_per_token(length)
        return Speed(known.overhead * sizes.num_layers / near.num_layers, known.per_token * work)

    def seconds_to_measure(self, sizes: ModelConfig) -> float:
        """About how long `measure` takes, kernels compiled."""
        speed, length = self.of(sizes), self._config.train.seq_len
        return 0.0 if self._cached(sizes) is not None else (WARM + ROUNDS) * (speed.update(SHORT * length) + speed.update(LONG * length))

    def _now(self, sizes: ModelConfig) -> Speed:
        length = self._config.train.seq_len
        model = Model(replace(sizes, max_seq_len=max(length, sizes.max_seq_len)), seed=0).to(self._device)
        step = make_step(model, self._config)
        seconds = {}
        generator = torch.Generator().manual_seed(0)
        for rows in (SHORT, LONG):
            tokens = torch.randint(sizes.vocab_size, (rows, length + 1), generator=generator)
            batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(self._device)
            taken = []
            for _ in range(WARM + ROUNDS):
                began = time.perf_counter()
                step.run([batch])
                taken.append(time.perf_counter() - began)
            seconds[rows] = statistics.median(taken[WARM:])
        per_token = max(1e-12, (seconds[LONG] - seconds[SHORT]) / ((LONG - SHORT) * length))
        return Speed(max(1e-9, seconds[SHORT] - per_token * SHORT * length), per_token)

    def _key(self, sizes: ModelConfig) -> str:
        settings, optim = self._config.train, self._config.optim
        machine: Any = runtime.device.cpu() if self._device.type == "cpu" else torch.cuda.get_device_name(self._device)
        threads = settings.threads or runtime.device.usable_cores()
        return "speed of updates " + tuning.digest(__version__, machine, threads, sizes, LONG, settings.seq_len, settings.precision, optim.optimizer)

    def _cached(self, sizes: ModelConfig) -> Speed | None:
        kept = tuning.load(self._key(sizes))
        try:
            return Speed(float(kept["overhead"]), float(kept["per_token"]))
        except (TypeError, KeyError, ValueError):
            return None

    def _keep(self, sizes: ModelConfig, speed: Speed) -> None:
        tuning.store(self._key(sizes), {"overhead": speed.overhead, "per_token": speed.per_token})
