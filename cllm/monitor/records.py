"""What a run records: one type for each row of metrics.jsonl and environment.jsonl, for samples, and for the results of a step and of a run.

The writer constructs these types and every reader gets them back, so a field that one of them misspells does not exist. `typed_json.py` has
what is common to them: in a file a record is a JSON object, and one of another version or a damaged one is read as far as it can be.

    row = TrainRow(step=1, loss=4.2, ...)
    row_from_dict(json.loads(json.dumps(row.to_dict()))) == row
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cllm.monitor.typed_json import Record

if TYPE_CHECKING:
    from cllm.evaluate.loss import Evaluation


def measured(default: Any = dataclasses.MISSING) -> Any:
    """A field that depends on the machine and the hour and not on the training: a resumed run writes another value."""
    return dataclasses.field(default=default, metadata={"measured": True})


# -- metrics.jsonl ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row(Record):
    """A row of metrics.jsonl, which holds its `kind` as well."""

    kind: ClassVar[str]

    step: int
    """Updates done when the row was written."""

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **super().to_dict()}


@dataclass(frozen=True, kw_only=True)
class StepTiming(Record):
    """Time, memory and use of the machine of one step. Where nobody measured a field, it is left out."""

    tokens_per_second: float | None = measured(None)
    """Targets of the step over its seconds; making its batch is not counted."""
    share_of_peak: float | None = measured(None)
    """Arithmetic done per second, as a share of the fastest product that this machine was measured at in the run's precision."""
    memory_bytes: int | None = measured(None)
    """Memory of the process, on a GPU what PyTorch has reserved there, in bytes."""
    cpu_share: float | None = measured(None)
    """Processor time of the process over the time of the step on all usable cores, from 0 to 1."""
    gpu_share: float | None = measured(None)
    """Share of the last moments in which the GPU was busy, from 0 to 1, where NVIDIA's library for that is installed."""
    data_seconds: float | None = measured(None)
    """Seconds spent on making the batch."""
    forward_seconds: float | None = measured(None)
    """Seconds of the forward passes. On a GPU, where the parts overlap, it is left out, like the two below."""
    backward_seconds: float | None = measured(None)
    """Seconds of the backward passes."""
    optimizer_seconds: float | None = measured(None)
    """Seconds of clipping and updating."""

    def parts(self) -> dict[str, float]:
        """Seconds of the step's parts by name, in the order in which they happen."""
        parts = {
            "data": self.data_seconds,
            "forward": self.forward_seconds,
            "backward": self.backward_seconds,
            "optimizer": self.optimizer_seconds,
        }
        return {name: seconds for name, seconds in parts.items() if seconds is not None}


@dataclass(frozen=True, kw_only=True)
class TrainRow(StepTiming, Row):
    """One update, at every `log.metrics_every` steps and at every update that was not finite."""

    kind: ClassVar[str] = "train"

    loss: float
    """Mean loss of the targets before the update, in nats, label smoothing and z-loss included."""
    learning_rate: float
    """Learning rate of the update."""
    gradient_norm: float
    """L2 norm of the gradient of all weights together, before clipping."""
    largest_gradient: float
    """Largest absolute value in the gradient."""
    num_nonfinite: int
    """Values of the gradient that are NaN or infinite; 1 where the loss was, whose gradient is not looked at."""
    updated: bool
    """Whether the update was made; false for one that was left out because it was not finite."""
    tokens: int
    """Targets that the run has learnt from so far."""
    seconds: float = measured()
    """Seconds that the run has trained so far, over all its starts."""
    noise_scale: float | None = None
    """Gradient noise scale in tokens (McCandlish et al. 2018), at every `log.noise_scale_every` steps."""

    @classmethod
    def of(cls, step: int, result: StepResult, tokens: int, seconds: float, timing: StepTiming) -> TrainRow:
        """The row of the update after which `step` updates are done."""
        return cls(
            step=step,
            loss=result.loss,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            largest_gradient=result.largest_gradient,
            num_nonfinite=result.num_nonfinite,
            updated=result.updated,
            tokens=tokens,
            seconds=round(seconds, 3),
            noise_scale=result.noise_scale,
            **timing.values(),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationFigures(Record):
    """How well validation text is predicted."""

    loss: float
    """Mean cross entropy of the targets, in nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """The same loss in bits per byte of text, which compares models with different tokenizers."""
    accuracy: float
    """Share of the targets that the model ranks first, from 0 to 1."""
    num_targets: int
    """Targets that were evaluated."""
    split_targets: int | None = None
    """Targets of the whole validation split."""
    unigram_loss: float | None = None
    """Loss on the same targets of a model that knows only how often each token occurs in the training text, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRow(EvaluationFigures, Row):
    """One evaluation during a run, at every `train.eval_every` steps and at the end, always on the same part of the validation split."""

    kind: ClassVar[str] = "eval"

    best: bool
    """Whether no evaluation of the run before had a lower loss."""
    top5_accuracy: float | None = None
    """Share of the targets among the five that the model ranks first, from 0 to 1. This field and those below need `log.classes`."""
    calibration_error: float | None = None
    """Mean distance between confidence and accuracy (Guo et al. 2017), from 0 to 1."""
    class_targets: int | None = None
    """Targets that the classes were counted over."""
    classes: dict[str, dict[str, float | None]] | None = None
    """Of each class of tokens precision, recall, f1 and the number of targets. Null is a ratio whose denominator is zero."""
    confusion: dict[str, dict[str, int]] | None = None
    """confusion[a][b]: targets of class a for which the model's first choice was of class b."""


@dataclass(frozen=True, kw_only=True)
class FinalRow(EvaluationFigures, Row):
    """The weights that a run leaves: on the whole validation split where `train.eval_budget` allows it, and where `train.restore_best` has brought
    back others than the last ones."""

    kind: ClassVar[str] = "final"


@dataclass(frozen=True, kw_only=True)
class LayersRow(Row):
    """The update seen parameter by parameter, at every `log.layers_every` steps."""

    kind: ClassVar[str] = "layers"

    gradient_norms: dict[str, float]
    """L2 norm of each parameter's gradient, before clipping."""
    update_ratios: dict[str, float]
    """Of each parameter the L2 norm of its change over the norm of its values, from a sample of them."""
    exploding: tuple[str, ...] = ()
    """Matrices whose gradient is 1000 times larger than that of the median matrix, by root mean square, or is not finite."""
    vanishing: tuple[str, ...] = ()
    """Matrices whose gradient is 1000 times smaller than that of the median matrix, or is zero."""
    gradient_histogram: dict[str, int] | None = None
    """Sampled gradients in each decade of their absolute value: "1e-3" counts those from 0.001 to 0.01. The ends count all beyond them."""


@dataclass(frozen=True, kw_only=True)
class ActivationsRow(Row):
    """The residual stream after each block, on the first validation batch, at every evaluation with `log.activations`."""

    kind: ClassVar[str] = "activations"

    blocks: dict[str, dict[str, float]]
    """Of each block the mean, the standard deviation (std) and the largest absolute value (largest) of the stream."""


@dataclass(frozen=True, kw_only=True)
class FaultRow(Row):
    """A step that went wrong, and what was done about it. After a rollback `step` is the step that the run went back to."""

    kind: ClassVar[str] = "event"

    event: str
    """What went wrong: nonfinite, spike, explosion or vanishing."""
    action: str
    """What was done: warn, skip, stop or rollback."""
    text: str
    """The same for people, with the figures that were seen."""
    fault_step: int
    """Updates done after the step that went wrong."""
    data: int
    """Number of the data that the step learnt from: the number of its update, plus the updates whose data were left out before it."""
    documents: tuple[str, ...] = ()
    """Names of documents that the step learnt from, at most twenty."""


@dataclass(frozen=True, kw_only=True)
class MachineRow(Row):
    """What the machine did to the run. A run that is repeated need not meet it again."""

    kind: ClassVar[str] = "machine"

    event: str
    """What happened: slow_disk."""
    action: str
    """What was done: wait."""
    text: str
    """The same for people."""
    seconds: float = measured()
    """How long it took."""


@dataclass(frozen=True, kw_only=True)
class PaceRow(Row):
    """A decision of the clock in a run with `train.hours` or `train.minutes`: when it ends. The learning rates follow from these rows alone."""

    kind: ClassVar[str] = "pace"

    steps: int
    """Updates after which the run is to end, as decided at this step."""
    share: float
    """Share of the schedule that has passed, from 0 to 1."""
    early: bool = False
    """Whether the cooldown began before its time, because the validation loss no longer fell."""
    seconds: float = measured(0.0)
    """Seconds that the run has taken so far, over all its starts, from the beginning of the command."""


@dataclass(frozen=True, kw_only=True)
class RoundRow(Record):
    """A row of rounds.jsonl: one round of a training that follows text which grows. Losses are in nats per token of text that is never learnt."""

    round: int
    """Number of the round, from 1."""
    documents: int
    """New documents."""
    bytes: int
    """What it learnt of them, as JSON lines, in bytes."""
    held_out: int
    """How many of them were held out, or their ends where there are few."""
    replayed_bytes: int
    """Bytes of earlier rounds that it learnt from again."""
    sources: dict[str, int]
    """New documents by file or top folder, the twenty largest."""
    accepted: bool
    """Whether the round was kept; one that was not is undone, and the next begins where this one did."""
    reason: str
    """Why, in words."""
    steps: int
    """Updates of the round."""
    old_before: float | None = None
    """Loss of the text that earlier rounds held out, before the round; left out where there was none."""
    old_after: float | None = None
    """The same after the round."""
    new_before: float | None = None
    """Loss of the text that this round holds out, before the round; left out in the first."""
    new_after: float | None = None
    """The same after the round."""
    seconds: float = measured(0.0)
    """Seconds from the beginning of the round to its end, over the last start."""


ROWS: dict[str, type[Row]] = {
    each.kind: each for each in (TrainRow, EvaluationRow, FinalRow, LayersRow, ActivationsRow, FaultRow, MachineRow, PaceRow)
}
TIME_FIELDS = frozenset(each.name for row in ROWS.values() for each in dataclasses.fields(row) if each.metadata.get("measured"))


def row_from_dict(values: Mapping[str, Any]) -> Row:
    """A row of metrics.jsonl. Raises UnknownKindError for a kind of another version, ValueError for an object that is no row."""
    kind = values.get("kind")
    if not isinstance(kind, str):
        raise ValueError("a row without a kind")
    if kind not in ROWS:
        raise UnknownKindError(kind)
    return ROWS[kind].from_dict(values)


class UnknownKindError(ValueError):
    """A row of a kind that this version does not know."""


# -- other files of a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Device(Record):
    """A device of the machine."""

    name: str
    """The maker's name."""
    workers: int
    """Cores, or multiprocessors of a GPU, that work at the same time."""
    memory_gib: float
    """Its memory in GiB."""


@dataclass(frozen=True, kw_only=True)
class Environment(Record):
    """A line of environment.jsonl: what the run was trained on, and where its settings came from, at each start. Nothing names machine or user."""

    started: str
    """Time of the start, in UTC."""
    devices: tuple[Device, ...] = ()
    """Devices of the machine."""
    system: str = ""
    """Operating system, architecture and version of Python."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of the packages that decide about bits and speed."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where the value of each setting came from: default, argument, a flag, a file, or the rule that it was derived by."""


@dataclass(frozen=True, kw_only=True)
class Sample(Record):
    """Text that the model wrote from nothing. samples.txt holds one after the other, for people to read."""

    step: int
    """Updates done when it was written."""
    text: str
    """What the model wrote."""

    def to_text(self) -> str:
        """The sample as samples.txt holds it."""
        return f"=== step {self.step}\n{self.text}\n\n"

    @staticmethod
    def all_in(content: str) -> list[Sample]:
        """The samples in a part of samples.txt; what is before the first heading is left out."""
        parts = re.split(r"^=== step (\d{1,15})\n", content, flags=re.MULTILINE)
        return [Sample(step=int(step), text=text.rstrip("\n")) for step, text in zip(parts[1::2], parts[2::2])]


# -- results ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult(Record):
    """What one training step did."""

    loss: float
    """Mean loss of the targets before the update, in nats, label smoothing and z-loss included."""
    gradient_norm: float
    """L2 norm of the gradient of all weights together, before clipping."""
    largest_gradient: float
    """Largest absolute value in the gradient."""
    num_nonfinite: int
    """Values of the gradient that are NaN or infinite; 1 where the loss was."""
    num_targets: int
    """Targets that the step learnt from."""
    learning_rate: float
    """Learning rate of the update."""
    updated: bool
    """Whether the update was made."""
    noise_scale: float | None = None
    """Gradient noise scale in tokens, where it was measured."""
    rescaled: bool = False
    """In fp16 alone: the gradient overflowed under a loss scale that has been halved since, which is no fault of the data or the model."""

    @property
    def finite(self) -> bool:
        """Whether the loss and all of the gradient are finite."""
        return self.num_nonfinite == 0 and math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    step: int
    """Updates done."""
    tokens: int
    """Targets that the run has learnt from."""
    train_loss: float | None
    """Loss of the last step, in nats; None when no step was made."""
    validation: Evaluation | None
    """The last evaluation; None without validation text."""
    best_loss: float | None
    """The lowest validation loss, in nats per token."""
    best_step: int | None
    """The step of the lowest validation loss."""
    unigram_loss: float | None
    """Loss on the validation text of a model that knows only how often each token occurs, in nats per token."""
    seconds: float
    """Seconds that the run has trained, over all its starts."""
    tokens_per_second: float
    """Targets per second over all steps of this start but the first, which compiles."""
    skipped_steps: int
    """Updates that were left out because they were not finite."""
    stopped_early: bool
    """Whether `train.patience` ended the run."""
    resumed_from: int | None
    """The step that this start went on from; None for a new run."""
    checkpoint: Path
    """Folder of the last checkpoint."""
    out: Path
    """Folder of the run."""

    @property
    def better_than_unigram(self) -> bool | None:
        """Whether the model predicts better than the mere frequency of each token does; None without validation text."""
        if self.validation is None or self.unigram_loss is None:
            return None
        return self.validation.loss < self.unigram_loss

    def to_dict(self) -> dict[str, Any]:
        """Plain values, None included."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values |= {"checkpoint": str(self.checkpoint), "out": str(self.out), "better_than_unigram": self.better_than_unigram}
        return values | {"validation": None if self.validation is None else self.validation.to_dict()}
