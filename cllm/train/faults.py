"""What a run does about steps that went wrong: a policy for each kind of fault, judged from the losses and norms of the steps before.

    kind        means                                                                        policies
    nonfinite   the loss or a gradient is NaN or infinite                                    stop, skip, rollback
    spike       the loss is far above those of the last steps                                warn, stop, rollback
    explosion   the gradient's norm is far above those of the last steps                     warn, stop, rollback
    vanishing   the gradient is all but zero                                                 warn, stop, rollback

An update that is not finite never changes a weight, whatever the policy. `rollback` goes back to the last good checkpoint and takes other
data from there: all batches between it and the fault are left out, as in Chowdhery et al. 2022 (PaLM, section 5.1). Which data that is follows
from the list of rollbacks in the checkpoint's state, so that a resumed run is the same run.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.monitor.records import StepResult
from cllm.runtime.errors import CLLMError
from cllm.shell import command

IN_A_ROW = 20  # more steps than these in a row that had to be left out are no accident: the run has diverged
ROLLBACKS = 5  # as often may a run go back to one and the same checkpoint
WINDOW, LEAST = 64, 16  # steps that a loss is compared with, and how many there must be
EXPLOSION = 100.0  # times the median norm of the window
VANISHING = 1e-8  # norm of the gradient of all weights together


class FaultError(CLLMError):
    """A step went wrong and its policy is to stop, or it went wrong too often."""


class NonFiniteError(FaultError):
    """A loss or gradient was NaN or infinite and the policy is to stop."""


@dataclass(frozen=True)
class Fault:
    """One step that went wrong. `action`: warn, skip, stop or rollback; `text` says what was seen."""

    kind: str
    action: str
    text: str


@dataclass
class Faults:
    """Judges every step of a run and keeps what judging needs; `to_dict` and `load` carry it through a checkpoint."""

    on_nonfinite: str = "stop"
    on_spike: str = "warn"
    on_gradient: str = "warn"
    spike_sigmas: float = 12.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: list[tuple[int, int]] = field(default_factory=list)  # (update from which other data is taken, how many updates' data are left out)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _reported: str | None = None  # a fault that lasts is told once

    @property
    def may_roll_back(self) -> bool:
        return "rollback" in (self.on_nonfinite, self.on_spike, self.on_gradient)

    def data_of(self, update: int) -> int:
        """The number of the data that update number `update` learns from: the same, but for what rollbacks have left out before it."""
        return update + sum(count for first, count in self.rollbacks if first <= update)

    def judge(self, step: int, result: StepResult) -> Fault | None:
        """What is wrong with the step after which `step` updates are done, if anything. Raises nothing; the caller acts."""
        if result.rescaled:  # fp16 looks for its loss scale
            return None
        found = self._find(result)
        if result.finite and result.num_targets:
            self.losses.append(result.loss)
            self.norms.append(result.gradient_norm)
        if result.finite:
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        kind = None if found is None else found[0]
        told, self._reported = self._reported, kind
        if found is None:
            return None
        policy = self.on_nonfinite if kind == "nonfinite" else self.on_spike if kind == "spike" else self.on_gradient
        if policy == "skip" and self.skipped_in_a_row > IN_A_ROW:
            return Fault(found[0], "stop", f"step {step:,}: {found[1]}, and so were the {IN_A_ROW} steps before it: the run has diverged")
        if policy == "warn" and told == kind:
            return None
        return Fault(found[0], policy, f"step {step:,}: {found[1]}")

    def _find(self, result: StepResult) -> tuple[str, str] | None:
        loss, norm = result.loss, result.gradient_norm
        if not result.finite:
            return "nonfinite", f"the loss is {loss:g}, the gradient norm {norm:g} with {result.num_nonfinite:,} non-finite values"
        if not result.num_targets:
            return None
        if norm < VANISHING:
            return "vanishing", f"the gradient has vanished: its norm is {norm:.1e}"
        if len(self.losses) < LEAST:
            return None
        usual = statistics.median(self.losses)
        # The median distance, not the standard deviation: one spike must not hide the next. At least 1 % of the loss, for runs that stand still.
        spread = max(1.4826 * statistics.median(abs(each - usual) for each in self.losses), 0.01 * abs(usual))
        if self.spike_sigmas and loss > usual + self.spike_sigmas * spread:
            return "spike", f"the loss is {loss:.4f} where the last {len(self.losses)} had a median of {usual:.4f}"
        if norm > EXPLOSION * (usual := statistics.median(self.norms)):
            return "explosion", f"the gradient norm is {norm:.3g} where the last {len(self.norms)} had a median of {usual:.3g}"
        return None

    def roll_back(self, update: int, checkpoint: int) -> bool:
        """Leaves out the data of the updates from `checkpoint` up to number `update`. False when the run came back to there too often."""
        if sum(first == checkpoint for first, _ in self.rollbacks) >= ROLLBACKS:
            return False
        self.rollbacks.append((checkpoint, update + 1 - checkpoint))
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for state.json. float survives JSON bit by bit."""
        return {
            "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "rollbacks": [list(each) for each in self.rollbacks],
            "losses": list(self.losses), "norms": list(self.norms), "reported": self._reported,
        }  # fmt: skip

    def load(self, values: dict[str, Any]) -> None:
        """Takes over what `to_dict` gave; of runs before there were rollbacks, what there is."""
        self.skipped, self.skipped_in_a_row = int(values.get("skipped", 0)), int(values.get("skipped_in_a_row", 0))
        self.rollbacks = [(int(first), int(count)) for first, count in values.get("rollbacks", [])]
        self.losses = deque(map(float, values.get("losses", [])), WINDOW)
        self.norms = deque(map(float, values.get("norms", [])), WINDOW)
        self._reported = values.get("reported")


def advice(fault: Fault, checkpoint: Path | None) -> str:
    """What to do about a fault that ended the run. checkpoint: the last one, None where none was written yet."""
    if fault.kind == "nonfinite":
        other = " To leave such steps out: --on-nonfinite skip; to go back and take other data: --on-nonfinite rollback."
    else:
        other = f" To go back and take other data: --set train.{'on_spike' if fault.kind == 'spike' else 'on_gradient'}=rollback."
    if checkpoint is None:
        kept = "The run has no checkpoint yet: it starts from the beginning, also with other settings, when the command is given again."
    else:
        another = command("train", "DATA", "--from", checkpoint, "--out", "NEW")
        kept = f"The last good checkpoint is {checkpoint}; with other settings go on from it as a new run: {another}."
    return f"Lower learning_rate, lengthen warmup, or set grad_clip. {kept}{other}"
