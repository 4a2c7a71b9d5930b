"""What a person sees of a training run: a line that shows its progress, and a line for each event, which log.txt keeps as well."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.evaluate.loss import Evaluation
from cllm.monitor.guards import memory_bytes, peak_memory_bytes
from cllm.monitor.records import StepResult, StepTiming, TrainResult
from cllm.runtime import progress
from cllm.runtime.printable import printable_text
from cllm.runtime.watchdog import Watchdog
from cllm.shell import command

SLOWED = 4.0  # a run this many times slower than its best speed is warned about; noise does not reach it
_SMOOTHING = 0.1  # weight of the newest step in the speed that is shown


class Reporter:
    """Shows a run: its loss, speed, share of the machine's peak, memory and time left. A context manager that owns the progress line and watchdog.

    out: the folder of the run. A reporter is entered before the run is opened; `begin` follows when its number of steps is known.
    """

    def __init__(self, out: Path, config: TrainConfig) -> None:
        self.out, self._config = out, config
        self._log: Any = None
        self._progress: Any = None
        self._watchdog: Any = None
        self._stack, self._steps_shown = ExitStack(), ExitStack()
        self._began = time.perf_counter()
        self._step_seconds = 0.0  # of all steps but the first, which compiles
        self._step_tokens = 0  # targets of those steps
        self._smooth_speed = self._best_speed = 0.0
        self._told_slowed = False
        self._last_seconds = 0.0
        self._warm = False
        self._flops_per_token = 0.0
        self._peak_flops = 0.0
        self._device: torch.device | None = None
        self.split = dict.fromkeys(("data", "forward", "backward", "optimizer", "checkpoint", "evaluation"), 0.0)  # seconds of each part of the run
        self._evaluations, self._evaluation_seconds = 0, 0.0  # how many there were, and their seconds without compilation
        self._evaluates_parts = False  # of the validation split, so that each line says which
        self._reading = 0.0  # seconds that the last batch took to make
        self._cpu_before = _cpu_seconds()
        self._doing = "starting"

    def __enter__(self) -> Reporter:
        self._log = self._stack.enter_context(open(self.out / "log.txt", "a", encoding="utf-8"))
        if self._config.log.watchdog_seconds:
            self._watchdog = self._stack.enter_context(Watchdog(self._config.log.watchdog_seconds, self._stalled))
        return self

    def __exit__(self, *exc: object) -> None:
        self.steps_done()
        self._stack.close()

    @property
    def seconds(self) -> float:
        """Seconds since this start of the run."""
        return time.perf_counter() - self._began

    @property
    def tokens_per_second(self) -> float:
        """Targets per second over all steps but the first, which compiles."""
        return self._step_tokens / self._step_seconds if self._step_seconds else 0.0

    def begin(self, step: int, steps: int, config: TrainConfig, model: ModelConfig, device: torch.device) -> None:
        """Opens the progress line, at `step` of `steps`, and finds the peak that speed is measured against."""
        self._config, self._device = config, device
        self._flops_per_token = model.flops_per_token(config.train.seq_len)
        self._peak_flops = _peak_flops(config.train.precision, device)
        self._steps = steps
        self._progress = progress.Progress(steps, "training", initial=step, unit="steps")
        self._steps_shown.enter_context(self._progress)

    def ends_after(self, steps: int) -> None:
        """Moves the end of the run that is shown."""
        self._steps = self._progress.total = steps

    def steps_done(self) -> None:
        """Ends the progress line: what follows is work of its own."""
        self._steps_shown.close()

    def say(self, text: str) -> None:
        """Shows a line, and adds it to log.txt."""
        text = printable_text(text)
        progress.say(text)
        try:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()
        except OSError as error:  # a full disk ends the run at its next checkpoint or row of metrics, where something would be lost
            progress.say(f"could not write {self.out / 'log.txt'}: {error.strerror or error}")

    def beat(self, *_: object) -> None:
        """Tells the watchdog that the run is moving."""
        if self._watchdog is not None:
            self._watchdog.beat()

    def _stalled(self, seconds: float) -> None:
        """Says where the run stands still. With on_stall = stop the process ends, for a supervisor to start it again."""
        stop = self._config.train.on_stall == "stop"
        then = f" The run ends (on_stall = stop). Go on with: {command('train', '--resume', '--out', self.out)}" if stop else ""
        self.say(f"stalled for {seconds:.0f} s while {self._doing}.{then}")
        if stop:
            os._exit(1)  # the thread that hangs cannot be asked to stop, and checkpoints are complete at any moment

    @contextmanager
    def _at(self, doing: str) -> Iterator[None]:
        before, self._doing = self._doing, doing
        self.beat()
        yield
        self._doing = before
        self.beat()

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """To be entered while the batches of update number `step` (from 0) are made."""
        began = time.perf_counter()
        with self._at(f"reading the data of step {step + 1:,}"):
            yield
        self._reading = time.perf_counter() - began

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """To be entered while update number `step` (from 0) is computed. The first one of a process, which compiles kernels, is shown as work of its
        own when it takes long."""
        began = time.perf_counter()
        with self._at(f"computing step {step + 1:,}"):
            if self._warm:
                yield
            else:
                with progress.stage("first step: compiling kernels for this GPU" if self._on_gpu else "first step"):
                    yield
        self._last_seconds = time.perf_counter() - began

    @contextmanager
    def stage(self, label: str, part: str | None = None) -> Iterator[Callable[[int, int], None]]:
        """To be entered during work between steps. It is shown when it takes long, and counted as a `part` of the run's time.

        Gives a function that shows how far the work is: it takes the number of tokens done, and that of all of them.
        """
        began, working = time.perf_counter(), progress.compilation.clock()
        with self._at(label), progress.stage(label) as stage:

            def moved(done: int, total: int) -> None:
                self.beat()
                stage.advance(done, total, "tokens")

            yield moved
        if part is not None:
            self.split[part] += time.perf_counter() - began
        if part == "evaluation":
            self._evaluation_seconds += progress.compilation.clock() - working

    def trained(self, step: int, tokens: int, result: StepResult, seconds: Mapping[str, float]) -> StepTiming:
        """Shows a step and returns its timing for the metrics. seconds: those of its parts, such as "forward", where they were measured."""
        parts_seconds = {"data": self._reading, **seconds}
        for part, each in parts_seconds.items():
            self.split[part] += each
        if "forward" not in seconds:  # on a GPU, where the parts overlap, and in several processes
            rest = "forward and backward" if seconds else "training steps"
            self.split[rest] = self.split.get(rest, 0.0) + self._last_seconds - sum(seconds.values())
        used, self._cpu_before = _cpu_seconds() - self._cpu_before, _cpu_seconds()
        busy = used / max(1e-9, self._last_seconds + self._reading) / runtime.device.usable_cores()
        memory = self._memory()
        speed = result.num_targets / max(self._last_seconds, 1e-9)
        if self._warm:
            self._step_seconds += self._last_seconds
            self._step_tokens += result.num_targets
            self._smooth_speed = speed if not self._smooth_speed else (1 - _SMOOTHING) * self._smooth_speed + _SMOOTHING * speed
            self._warn_when_slowed(step)
        self._warm = True
        share = (self._smooth_speed or speed) * self._flops_per_token / self._peak_flops if self._peak_flops else 0.0
        parts = [
            f"step {step:,}/{self._steps:,}",
            f"{_short(tokens)} tokens",
            f"loss {result.loss:.4f}",
            f"lr {result.learning_rate:.2e}",
            f"grad {result.gradient_norm:.2f}",
            f"{_short(self._smooth_speed)} tok/s" if self._smooth_speed else "",
            f"{100 * share:.0f}% of peak" if share and self._smooth_speed else "",
            f"{memory / 1e9:.2f} GB",
        ]
        self._progress.update(step, "  ".join(part for part in parts if part))
        return StepTiming(
            tokens_per_second=round(speed, 1),
            share_of_peak=round(share, 4),
            memory_bytes=memory,
            cpu_share=round(min(1.0, busy), 4),
            gpu_share=self._gpu_share(),
            **{f"{part}_seconds": round(each, 6) for part, each in parts_seconds.items()},
        )

    def _gpu_share(self) -> float | None:
        """The share of the last moments in which the GPU was busy, where that is known."""
        return runtime.nvml.utilization(self._device.index or 0) if self._device is not None and self._on_gpu else None

    def _warn_when_slowed(self, step: int) -> None:
        """Says once that steps have become much slower, for which other programs on the same cores are the usual reason."""
        self._best_speed = max(self._best_speed, self._smooth_speed)
        if self._smooth_speed < self._best_speed / SLOWED and not self._told_slowed:
            self._told_slowed = True
            self.say(
                f"step {step:,}: {self._best_speed / self._smooth_speed:.0f} times slower than this run has been. Other programs probably use the "
                "cores: end them, or let the run go on with what they leave; its bits stay the same"
            )

    def _memory(self) -> int:
        """Memory of the process in bytes, or on a GPU what PyTorch has reserved there."""
        return int(torch.cuda.memory_reserved(self._device)) if self._on_gpu else memory_bytes()

    def _peak_memory(self) -> int:
        """The most of it so far."""
        return int(torch.cuda.max_memory_reserved(self._device)) if self._on_gpu else peak_memory_bytes()

    @property
    def _on_gpu(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def evaluated(self, step: int, result: Evaluation, unigram: float | None, best: bool) -> None:
        """Shows an evaluation. unigram: the loss of a model that knows token frequencies only. best: whether no loss before was lower."""
        baseline = "" if unigram is None else f" (token frequencies alone: {unigram:.4f})"
        every = self._config.train.eval_every or self._steps
        self._evaluations += 1
        self._progress.later_seconds = (-(-self._steps // every) - step // every) * self._evaluation_seconds / self._evaluations
        self._evaluates_parts = self._evaluates_parts or result.num_targets < result.split_targets
        extent = f" on {result.extent}" if self._evaluates_parts else ""
        self.say(
            f"step {step:,}: validation loss {result.loss:.4f}{extent}{baseline}, perplexity {result.perplexity:,.2f}, "
            f"{result.bits_per_byte:.3f} bits per byte, accuracy {100 * result.accuracy:.1f} %{', best so far' if best else ''}"
        )

    def finish(self, result: TrainResult) -> None:
        """Shows what the run came to and where its time went."""
        if result.stopped_early:
            patience = self._config.train.patience
            self.say(f"stopped early: no better validation loss in {patience} evaluations; the best was at step {result.best_step:,}")
        if result.better_than_unigram is False:
            assert result.validation is not None
            self.say(
                "warning: the model ends no better than token frequencies alone "
                f"({result.validation.loss:.4f} against {result.unigram_loss:.4f} nats): it has learnt nothing that helps on the validation text. "
                "Train longer, raise learning_rate, or check the data."
            )
        if result.validation is None:
            self.say("there was no validation text, so nothing says how well the model does on text that it has not seen")
        spent = sorted(((seconds, part) for part, seconds in self.split.items()), reverse=True)
        total = sum(self.split.values())
        if total:
            self.say("time: " + ", ".join(f"{part} {100 * seconds / total:.0f} %" for seconds, part in spent if seconds / total >= 0.005))
        peak = f"peak memory {self._peak_memory() / 1e9:.2f} GB{' on the GPU' if self._on_gpu else ''}"
        self.say(f"done: {result.step:,} steps, {_short(result.tokens)} tokens in {progress.duration(result.seconds)}, {peak}")


def _peak_flops(precision: str, device: torch.device) -> float:
    """Floating-point operations per second that the fastest kernel reached on this machine in a measurement, which is stored."""
    if device.type == "cuda":
        with progress.stage("measuring this GPU's peak"):
            return runtime.gpu.measured_rates(device)[precision] * 1e9
    # Measured with all cores, whatever this run uses, because the number is stored for other runs.
    with progress.stage("measuring this machine's peak"), runtime.use(threads=runtime.device.usable_cores()):
        return runtime.ceilings().gflops(precision) * 1e9


def _cpu_seconds() -> float:
    """Processor time of this process in seconds, all threads together."""
    used = os.times()
    return used.user + used.system


def _short(count: float) -> str:
    """1234567 -> 1.23M"""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"
