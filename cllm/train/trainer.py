"""The training loop: batch -> step -> metrics -> checkpoint -> evaluation, and everything that makes it stop and go on without a trace.

    result = Trainer(model, dataset, TrainConfig(steps=1000), out="runs/demo", tokenizer=tokenizer).fit()

Nothing random hides in the loop: the data of a step is a function of (seed, step), the learning rate of the step, the weights of both. So
a run that was stopped anywhere, also by SIGKILL, and resumed writes the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import distributed, runtime
from cllm.checkpoint.safetensors import tensors_bytes, write_atomic
from cllm.checkpoint.store import Checkpoint, check_tokenizer, load_weights, read_checkpoint, weights_of
from cllm.checkpoint.writer import CheckpointWriter
from cllm.config.schedule import BatchRamp, Plateau, Schedule, lr
from cllm.config.train import TrainConfig
from cllm.evaluate.loss import Evaluation, evaluate
from cllm.model.lora import lora_state
from cllm.model.memory import choose_recompute, explained_out_of_memory
from cllm.monitor.diagnostics import Diagnostics
from cllm.monitor.environment import record_environment
from cllm.monitor.guards import BestLoss, Interrupted, RunLock, StopSignals
from cllm.monitor.metrics import Metrics
from cllm.monitor.reporter import Reporter
from cllm.monitor.silent import SilentMetrics, SilentReporter
from cllm.runtime.device import resolve
from cllm.runtime.errors import CheckpointError, UserError
from cllm.train.averages import put
from cllm.train.build import divide, make_batches, make_step, make_store
from cllm.train.faults import ROLLBACKS, Fault, FaultError, Faults, NonFiniteError, advice
from cllm.train.step import StepResult

if TYPE_CHECKING:
    from torch import Tensor

    from cllm.data import Batch, Dataset, TokenSplit
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model


_OF_EVALUATIONS = ("eval", "activations")
NAMED_DOCUMENTS = 20  # of a step that went wrong
SLOW_DISK_SECONDS = 1.0  # of waiting for the checkpoint before that are worth a line


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    step: int
    tokens: int
    train_loss: float | None
    validation: Evaluation | None
    best_loss: float | None
    best_step: int | None
    unigram_loss: float | None
    seconds: float
    tokens_per_second: float
    skipped_steps: int
    stopped_early: bool
    resumed_from: int | None
    checkpoint: Path
    out: Path

    @property
    def better_than_unigram(self) -> bool | None:
        """Whether the model predicts better than the mere frequency of each token does; None without validation data."""
        if self.validation is None or self.unigram_loss is None:
            return None
        return self.validation.loss < self.unigram_loss

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "validation"}
        validation = None if self.validation is None else self.validation.to_dict()
        paths = {"checkpoint": str(self.checkpoint), "out": str(self.out)}
        return {**values, **paths, "validation": validation, "better_than_unigram": self.better_than_unigram}


class Trainer:
    """Trains `model` on `dataset` (train and val token splits) with `config`, in the folder `out`.

    Raises UserError for settings that do not fit, DataError for data that cannot be trained on, CheckpointError for a run that cannot be
    resumed or written, Interrupted (exit status 130) after a stop by signal, all with the run left ready to go on.
    """

    def __init__(
        self, model: Model, dataset: Dataset, config: TrainConfig | None = None, *, out: str | Path, tokenizer: Tokenizer | None = None
    ) -> None:
        self.model, self.dataset, self.out = model, dataset, Path(out)
        self.tokenizer = tokenizer if tokenizer is not None else getattr(dataset, "tokenizer", None)
        self.config = (config or TrainConfig()).resolve(model.config, dataset.train.num_tokens)
        self._world = distributed.current()
        self.device = resolve(self.config.train.device)[0] if self._world is None else self._world.device
        self._leads = self._world is None or self._world.leads  # whether this process prints and writes
        self._share, self._sharding = divide(self.config, self._world)
        _check_fit(model, dataset, self.config, self.tokenizer)
        self._batches = make_batches(dataset.train, self.config)
        self.step = 0
        self.tokens = 0
        self._seconds_before = 0.0  # of the runs that this one resumes
        self._best = BestLoss()
        settings, optim = self.config.train, self.config.optim
        self._faults = Faults(settings.on_nonfinite, settings.on_spike, settings.on_gradient, settings.spike_sigmas)
        self._ramp = BatchRamp(settings.grad_accum, settings.batch_ramp)
        self._plateau = Plateau(optim.plateau_factor, optim.plateau_patience) if optim.schedule == "plateau" else None
        self._last_evaluation = 0
        self._last_saved: int | None = None
        self._resumed_from: int | None = None
        self._last_step: StepResult | None = None
        self._prepared: tuple[int, list[Batch]] = (-1, [])
        self._validation: Evaluation | None = None
        self._unigram: float | None = None

    # -- the algorithm ------------------------------------------------------------------------------------------------------

    def fit(self, resume: str | bool = "auto") -> TrainResult:
        """Trains to the end. resume: "auto" goes on where `out` holds this run, True demands it, False refuses it."""
        if resume not in ("auto", True, False):
            raise UserError(f'resume must be "auto", True or False, got {resume!r}.')
        _make_folder(self.out)
        lock = RunLock(self.out) if self._leads else nullcontext()
        reporter = Reporter(self.out, self.config) if self._leads else SilentReporter()
        with lock, runtime.use(threads=self.config.train.threads), reporter as report, StopSignals() as stop:
            with self._out_of_memory():
                self._open(resume, report)
            with self._metrics:
                with self._out_of_memory(), self._writing(report):
                    self._loop(report, stop)
                result = self._result(report)
                report.finish(result)
                if result.validation is not None:
                    self._metrics.hyperparameters(self.config.flat(), {"validation_loss": result.validation.loss})
                return result

    def whole_model(self) -> Model | None:
        """The model with all its weights where the run shares them out; None in all processes but the first."""
        whole = self._train_step.whole_model()
        return whole if self._leads else None

    def _loop(self, report: Reporter, stop: StopSignals) -> None:
        settings = self.config.train
        assert settings.steps is not None
        report.begin(self.step, settings.steps, self.config, self.model.config, self.device)
        if self._evaluation_due():  # the run may have stopped between this checkpoint and its evaluation
            self._evaluate(report)
        if self.step == 0 and self._faults.may_roll_back:
            self._save(report)  # where to go back to
        while self.step < settings.steps and not self._best.exhausted(settings.patience):
            with report.reading(self.step):
                microbatches = self._microbatches(self.step)
            with report.step(self.step):
                ahead = partial(self._microbatches, self.step + 1)
                result = self._train_step.run(microbatches, self._learning_rate(), report.beat, ahead, self._before_update)
            self.step += 1
            self._record(result, report)
            fault = self._faults.judge(self.step, result)
            if fault is not None:
                self._handle(fault, report)
            self._writer.check()
            if self._checkpoint_due():
                self._save(report)
            if self._evaluation_due():
                self._evaluate(report)
            if settings.sample_every and self.step % settings.sample_every == 0:
                self._sample(report)
            asked = stop.asked if self._world is None else self._world.agreed(stop.asked)
            if asked and self.step < settings.steps:
                self._save(report)
                self._finish_writing(report)
                raise Interrupted(
                    f"stopped by {asked} after step {self.step:,} of {settings.steps:,}; the checkpoint is "
                    f"{self._store.path(self.step)}. Go on from there with: cllm train --resume --out {self.out}"
                )
        self._save(report)  # after early stopping; the last step has its checkpoint already
        self._finish_writing(report)
        self._conclude(report)

    def _learning_rate(self) -> float:
        rate = lr(self.step, self._schedule)
        return rate if self._plateau is None else self._plateau.scaled(rate, self._schedule.min_lr)

    def _conclude(self, report: Reporter) -> None:
        """Leaves in the model, and with restore_best in the last checkpoint, the weights to use: averages, or the best evaluation's."""
        best = self._best.step
        if not self.config.train.restore_best or best is None or best == self.step:
            averages = self._train_step.averages()
            if averages is not None:
                put(self._train_step.optimizer.parameters, averages)
            return
        state = {name: tensor.clone() for name, tensor in self._train_step.state_dict(training_weights=True).items()}
        found = read_checkpoint(self._store.path(best), with_optimizer=False)
        load_weights(self.model, found.weights, found.path)
        report.say(f"restored the weights of step {best:,}, the best evaluation")
        with report.stage("evaluating"):
            self._validation = self._evaluated(report)
        self._write(report, weights_of(self.model), state)

    def _microbatches(self, step: int) -> list[Batch]:
        """The data of update number `step`: always the first batch when one batch is to be learnt by heart. The last answer is kept."""
        settings = self.config.train
        if self._prepared[0] != step:
            data = 0 if settings.overfit_one_batch else self._faults.data_of(step)
            if self._share is None:
                first = self._ramp.before(data)
                self._prepared = step, [self._batches.batch(first + number) for number in range(self._ramp.size(step))]
            else:
                self._prepared = step, self._share.microbatches(self._batches, data)
        return self._prepared[1]

    def _record(self, result: StepResult, report: Reporter) -> None:
        self._last_step = result
        self.tokens += result.num_targets
        timing = report.trained(self.step, self.tokens, result, self._train_step.seconds)
        if self.step % self.config.log.metrics_every == 0 or not result.finite:
            self._metrics.write(
                "train",
                self.step,
                loss=result.loss,
                learning_rate=result.learning_rate,
                gradient_norm=result.gradient_norm,
                largest_gradient=result.largest_gradient,
                num_nonfinite=result.num_nonfinite,
                updated=result.updated,
                tokens=self.tokens,
                **({} if result.noise_scale is None else {"noise_scale": result.noise_scale}),
                seconds=round(self._seconds_before + report.seconds, 3),
                **timing,
            )

        layers = self._diagnostics.after_update()
        if layers is not None:
            self._metrics.write("layers", self.step, **layers[0])
            self._metrics.histograms("gradients", self.step, layers[1])

    def _before_update(self) -> None:
        """Gradients are complete, and no weight has changed."""
        self._diagnostics.before_update(self.step, self._train_step.loss_scale)
        self._writer.before_update()

    def _handle(self, fault: Fault, report: Reporter) -> None:
        """Records what went wrong in the step before, and does what its policy says."""
        documents = self._documents_of(self.step - 1)
        data = self._faults.data_of(self.step - 1)
        where = f"data {data:,} from {', '.join(documents[:3])}{f' and {len(documents) - 3} more' if len(documents) > 3 else ''}"
        row = {"event": fault.kind, "action": fault.action, "text": fault.text, "fault_step": self.step, "data": data, "documents": documents}
        if fault.action == "rollback":
            self._roll_back(fault, where, row, report)
            return
        self._metrics.write("event", self.step, **row)
        if fault.action == "stop":
            report.say(f"{fault.text}; {where}")
            error = NonFiniteError if fault.kind == "nonfinite" else FaultError
            raise error(f"{fault.text} ({where}). {advice(fault, self._store.folder)}")
        report.say(f"{fault.text}; {where}{': the update was left out' if fault.action == 'skip' else ''}")

    def _roll_back(self, fault: Fault, where: str, row: dict[str, Any], report: Reporter) -> None:
        """Goes back to the newest good checkpoint and writes it anew with the note that other data follows, so that a resume knows it too."""
        self._finish_writing(report)
        failed, faults = self.step, self._faults
        found = self._store.newest_good(report.say)
        assert found is not None  # one was written before the first step
        if not faults.roll_back(failed - 1, found.step):
            tried = f"after {ROLLBACKS} rollbacks to step {found.step:,}"
            raise FaultError(f"{fault.text} ({where}), {tried}. {advice(fault, self._store.folder)}")
        rollbacks = list(faults.rollbacks)
        seconds, resumed = self._seconds_before, self._resumed_from
        self._restore(found)
        self._seconds_before, self._resumed_from = seconds, resumed
        faults.rollbacks, self._prepared, self._last_saved = rollbacks, (-1, []), None
        self._metrics.truncate(self._belongs_before_step)
        self._save(report)
        self._finish_writing(report)
        self._metrics.write("event", self.step, **row)
        report.say(f"{fault.text}; {where}: back to step {self.step:,}, and on with other data than that of the {failed - self.step:,} steps since")

    def _documents_of(self, update: int) -> list[str]:
        """The names of the documents that an update learnt from, at most NAMED_DOCUMENTS."""
        settings = self.config.train
        first = 0 if settings.overfit_one_batch else self._ramp.before(self._faults.data_of(update))
        numbers = sorted({each for number in range(self._ramp.size(update)) for each in self._batches.batch(first + number).documents})
        return [self.dataset.train.document_name(each) for each in numbers[:NAMED_DOCUMENTS]]

    def _belongs_before_step(self, row: dict[str, Any]) -> bool:
        """Whether a row of metrics stays when the run goes on from `step`: later rows, and the evaluation after its checkpoint, come again."""
        return row["step"] < self.step or (row["step"] == self.step and row["kind"] not in _OF_EVALUATIONS)

    def _checkpoint_due(self) -> bool:
        settings = self.config.train
        assert settings.checkpoint_every is not None
        return self.step % settings.checkpoint_every == 0 or self.step == settings.steps

    def _evaluation_due(self) -> bool:
        settings = self.config.train
        assert settings.eval_every is not None
        return self.step > 0 and (self.step % settings.eval_every == 0 or self.step == settings.steps)

    def _evaluate(self, report: Reporter) -> None:
        """Loss over the whole validation split. Runs after the checkpoint was written: an evaluation that fails costs nothing."""
        counted, self._last_evaluation = self._last_evaluation == self.step, self.step
        if self.dataset.val.num_tokens < 2:
            return
        self._writer.before_update()  # weights may be swapped for their averages
        with report.stage("evaluating", "evaluation"), self._train_step.evaluation_weights():
            self._validation = result = self._evaluated(report)
            classes, activations = self._diagnostics.classes(report.beat), self._diagnostics.activations()
        best = self._best.step == self.step if counted else self._best.update(self.step, result.loss)
        if activations is not None:
            self._metrics.write("activations", self.step, **activations)
        self._metrics.write("eval", self.step, **result.to_dict(), **classes, unigram_loss=self._unigram, best=best)
        report.evaluated(self.step, result, self._unigram, best)
        if self._plateau is not None and not counted and self._plateau.update(result.loss):
            rate = self._learning_rate()
            report.say(f"step {self.step:,}: no better loss in {self._plateau.patience} evaluations, the learning rate falls to {rate:.3g}")
        if best:
            self._save(report)
            self._writer.afterwards(partial(self._store.mark_best, self.step))

    def _evaluated(self, report: Reporter) -> Evaluation:
        """What the weights in the model make of the validation split."""
        settings = self.config.train
        return evaluate(
            self.model,
            self.dataset.val,
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
            document_mask=self.config.data.document_mask,
            progress=report.beat,
        )

    def _sample(self, report: Reporter) -> None:
        """Generated text to samples.txt, the only place where training calls generation."""
        model = self._train_step.whole_model()
        if self.tokenizer is None or model is None or not self._leads:
            return
        from cllm.generate.decoding import generate

        self._writer.before_update()
        with report.stage("sampling"), self._train_step.evaluation_weights():
            # Where a document begins; without an end-of-text token, as the training text begins.
            start = [int(self.dataset.train.read(0, 1)[0])] if self.tokenizer.eot_id is None else [self.tokenizer.eot_id]
            text = generate(model, self.tokenizer, start, max_tokens=200, temperature=0.8, seed=self.step)[0].text
            with open(self.out / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"=== step {self.step}\n{text}\n\n")
            self._metrics.text("sample", self.step, text)

    def _result(self, report: Reporter) -> TrainResult:
        return TrainResult(
            step=self.step,
            tokens=self.tokens,
            train_loss=None if self._last_step is None else self._last_step.loss,
            validation=self._validation,
            best_loss=self._best.loss if self._best.step is not None else None,
            best_step=self._best.step,
            unigram_loss=self._unigram,
            seconds=self._seconds_before + report.seconds,
            tokens_per_second=report.tokens_per_second,
            skipped_steps=self._faults.skipped,
            stopped_early=self._best.exhausted(self.config.train.patience),
            resumed_from=self._resumed_from,
            checkpoint=self._store.path(self.step),
            out=self.out,
        )

    # -- the run's folder ---------------------------------------------------------------------------------------------------

    def _open(self, resume: str | bool, report: Reporter) -> None:
        """Prepares everything for the step to start from: a fresh run's first, or the one after the newest good checkpoint."""
        self._store = make_store(self.out / "checkpoints", self.model, self.config, self._world, self._sharding)
        self._store.clean()
        # Several processes write together; that needs them all at the same place.
        self._writer = CheckpointWriter(self._store, self.config.train.async_checkpoint and self._world is None)
        steps = self._store.steps()
        if resume is False and steps:
            raise UserError(f"{self.out} already holds a run. Resume it (resume=True or --resume), or choose another folder with --out.")
        found = self._store.newest_good(report.say) if steps else None
        if found is None and resume is True:
            raise CheckpointError(f"{self.out} holds no checkpoint to resume. Start without --resume.")
        if found is not None:
            self._check_same_run(found)
        config = self.config
        assert config.optim.learning_rate is not None and config.optim.min_lr is not None
        assert config.optim.warmup is not None and config.train.steps is not None
        self.model.to(self.device)
        sizes = self.model.config, config.train.batch_size, config.train.seq_len, config.train.precision
        self.model.recompute, why = choose_recompute(config.train.recompute, *sizes, self.device)
        if self.model.recompute != "none":
            report.say(f"the backward computes again: {self.model.recompute} ({why})")
        self._schedule = Schedule(config.optim.learning_rate, config.optim.min_lr, config.optim.warmup, config.train.steps, config.optim.schedule)
        self._train_step = make_step(self.model, config, self._world, self._share, self._sharding)
        if self.dataset.val.num_tokens >= 2:
            self._unigram = self.dataset.val.unigram_nats(self.dataset.train)
        if self._leads:
            if self.tokenizer is not None:
                self.tokenizer.save(self.out / "tokenizer.json")
            write_atomic(self.out / "config.toml", config.to_toml().encode())
            record_environment(self.out)
        self._metrics = Metrics(self.out, config.log.tensorboard, config.log.prometheus_port) if self._leads else SilentMetrics()
        self._metrics.text("config", self.step, config.to_toml())
        looks = self._leads and self._sharding is None  # into layers, which takes whole weights
        parameters = self._train_step.optimizer.parameters if looks else {}
        self._diagnostics = Diagnostics(self.model, parameters, self.dataset, self.tokenizer, config)
        if found is not None:
            self._restore(found)
            report.say(f"resuming after step {self.step:,} from {found.path}")
        self._metrics.truncate(self._belongs_before_step)

    def _out_of_memory(self) -> AbstractContextManager[None]:
        settings = self.config.train
        return explained_out_of_memory(self.model.config, settings.batch_size, settings.seq_len, settings.precision, self.model.recompute)

    def _check_same_run(self, found: Checkpoint) -> None:
        """A run goes on with the settings, data and tokenizer that it began with; anything else would be another run under its name."""
        stored = TrainConfig.from_dict(found.state["config"], found.state["sources"])
        self.config = self.config.adopt(stored)
        different = self.config.differences(stored)
        if found.state["data"] != self._data_identity():
            different.append(f"data: {found.state['data']} there, {self._data_identity()} here")
        if different:
            raise UserError(
                f"{self.out} holds a run of another configuration:\n  "
                + "\n  ".join(different)
                + "\nGive the same settings to go on with it, or choose another folder with --out."
            )
        check_tokenizer(self.tokenizer.hash if self.tokenizer is not None else None, found.state["tokenizer_hash"], self.out)

    def _restore(self, found: Checkpoint) -> None:
        self._train_step.restore(found)
        state = found.state
        try:
            self.tokens, self._seconds_before = int(state["tokens"]), float(state["seconds"])
            self._best = BestLoss.from_dict(state["best"])
            self._faults.load(state.get("faults") or state)
            self._last_evaluation = int(state["last_evaluation"])
            if self._plateau is not None:
                self._plateau.restore(state["plateau"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the state of {found.path} is not that of a run ({type(error).__name__}: {error}).") from error
        self.step = self._resumed_from = self._last_saved = found.step

    def _data_identity(self) -> dict[str, Any]:
        return {name: _split_identity(getattr(self.dataset, name)) for name in ("train", "val")}

    def _save(self, report: Reporter) -> None:
        if self._last_saved == self.step:
            return
        self._write(report, self._train_step.weights(), self._train_step.state_dict())

    def _write(self, report: Reporter, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        state = {
            "model": self.model.config.to_dict(),
            "config": self.config.to_dict(),
            "sources": dict(self.config.sources),
            "tokenizer_hash": self.tokenizer.hash if self.tokenizer is not None else None,
            "data": self._data_identity(),
            "tokens": self.tokens,
            "seconds": self._seconds_before + report.seconds,
            "best": self._best.to_dict(),
            "faults": self._faults.to_dict(),
            "last_evaluation": self._last_evaluation,
            "plateau": None if self._plateau is None else self._plateau.to_dict(),
            "lora": lora_state(self.model),
            "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if self._writer.busy:
            began = time.perf_counter()
            self._finish_writing(report)
            waited = time.perf_counter() - began
            if waited > SLOW_DISK_SECONDS:
                text = f"step {self.step:,}: the disk is slow: training waited {waited:.1f} s for the checkpoint before this one"
                self._metrics.write("machine", self.step, event="slow_disk", action="wait", text=text, seconds=round(waited, 3))
                report.say(f"{text}. Raise checkpoint_every, or use a faster disk")
        with report.stage(f"writing a checkpoint ({(tensors_bytes(weights) + tensors_bytes(optimizer)) / 1e6:,.0f} MB)", "checkpoint"):
            self._writer.save(self.step, weights, optimizer, state)
        self._last_saved = self.step

    def _finish_writing(self, report: Reporter) -> None:
        if self._writer.busy:
            with report.stage("waiting for the disk to take the checkpoint"):
                self._writer.wait(report.beat)
        self._writer.check()

    @contextmanager
    def _writing(self, report: Reporter) -> Iterator[None]:
        """Around the loop: however it ends, the checkpoint on its way is completed. One more Ctrl-C ends that as well."""
        try:
            yield
        except BaseException:
            try:
                self._finish_writing(report)
            except CheckpointError as error:
                report.say(f"error: {error}")
            raise
        self._finish_writing(report)


def _check_fit(model: Model, dataset: Dataset, config: TrainConfig, tokenizer: Tokenizer | None) -> None:
    """What must agree between model, data, tokenizer and settings before anything is written."""
    if config.train.seq_len > model.config.max_seq_len:
        raise UserError(f"seq_len must be <= the model's max_seq_len ({model.config.max_seq_len}), got {config.train.seq_len}.")
    if tokenizer is not None:
        check_tokenizer(tokenizer.hash, dataset.train.tokenizer_hash, dataset.train.folder)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        size = tokenizer.vocab_size
        raise UserError(f"the tokenizer has {size} tokens, the model only {model.config.vocab_size}. Build the model with vocab_size={size}.")


def _split_identity(split: TokenSplit) -> dict[str, Any]:
    """What tells one split from another: its length, and the digest of the checksums of its shards and document bounds."""
    index = json.loads((split.folder / "index.json").read_bytes())
    sums = [*(shard["blake2b"] for shard in index["shards"]), index["offsets"]["blake2b"]]
    return {"tokens": split.num_tokens, "digest": hashlib.sha256(" ".join(sums).encode()).hexdigest()[:32]}


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the run folder {path}: {error.strerror or error}. Choose another with --out.") from error
