"""The training loop: batch -> step -> metrics -> checkpoint -> evaluation, and everything that makes it stop and go on without a trace.

    result = Trainer(model, dataset, TrainConfig(steps=1000), out="runs/demo", tokenizer=tokenizer).fit()

Nothing random hides in the loop: the data of a step is a function of (seed, step), the learning rate of the step, the weights of both. So
a run that was stopped anywhere, also by SIGKILL, and resumed writes the same bits as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import distributed, runtime
from cllm.checkpoint.folder import Checkpoint, read_checkpoint
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.weights import check_tokenizer, load_weights, weights_of
from cllm.config.pace import Pace
from cllm.config.schedule import Schedule, lr
from cllm.config.train import TrainConfig
from cllm.files import RUN, Appender, write_file
from cllm.model.lora import lora_state
from cllm.model.memory import choose_recompute, explained_out_of_memory
from cllm.monitor.diagnostics import Diagnostics
from cllm.monitor.environment import record_environment
from cllm.monitor.guards import RunLock
from cllm.monitor.metrics import Metrics
from cllm.monitor.records import ActivationsRow, EvaluationRow, FaultRow, FinalRow, PaceRow, Sample, StepResult, TrainResult, TrainRow
from cllm.monitor.reporter import Reporter
from cllm.monitor.silent import SilentMetrics, SilentReporter
from cllm.monitor.stop_signals import BEFORE_TRAINING, Interrupted, StopRequested, StopSignals
from cllm.runtime.device import resolve
from cllm.runtime.errors import CheckpointError, UserError
from cllm.shell import command
from cllm.train.averages import put
from cllm.train.build import divide, make_step, make_store, memory_options
from cllm.train.checkpoints import Checkpoints
from cllm.train.evaluations import Evaluations, Measured
from cllm.train.faults import ROLLBACKS, Fault, FaultError, NonFiniteError, advice
from cllm.train.run_folder import StoredRun, go_on, identity
from cllm.train.samples import sample_text
from cllm.train.staging import for_device
from cllm.train.state import RunState
from cllm.train.timed_end import TimedEnd
from cllm.train.update_data import UpdateData

if TYPE_CHECKING:
    from cllm.data import Dataset
    from cllm.data.tokens.batch import Batch
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model


_OF_EVALUATIONS = (EvaluationRow.kind, ActivationsRow.kind, FinalRow.kind)


class Trainer:
    """Trains `model` on `dataset` (train and val token splits) with `config`, in the folder `out`.

    Raises UserError for settings that do not fit, DataError for data that cannot be trained on, CheckpointError for a run that cannot be
    resumed or written, Interrupted (exit status 130) after a stop by signal, all with the run left ready to go on.
    lock: that of `out`, where the caller holds it already; otherwise it is taken while the run is trained.
    began: when the time of a run with `train.hours` began, by time.perf_counter; now, where it is None.
    """

    def __init__(
        self,
        model: Model,
        dataset: Dataset,
        config: TrainConfig | None = None,
        *,
        out: str | Path,
        tokenizer: Tokenizer | None = None,
        lock: RunLock | None = None,
        began: float | None = None,
    ) -> None:
        self.model, self.dataset, self.out = model, dataset, Path(out)
        self.tokenizer = tokenizer if tokenizer is not None else getattr(dataset, "tokenizer", None)
        self.config = (config or TrainConfig()).resolve(model.config, dataset.train.num_tokens)
        self._lock = lock
        self._began = time.perf_counter() if began is None else began
        self._world = distributed.current()
        self.device = resolve(self.config.train.device)[0] if self._world is None else self._world.device
        self._leads = self._world is None or self._world.leads  # whether this process prints and writes
        self._share, self._sharding = divide(self.config, self._world)
        _check_fit(model, dataset, self.config, self.tokenizer)
        if self.config.clocked and self._world is not None:
            raise UserError("hours and minutes work in one process. Give --steps or --epochs, or run it without torchrun.")
        self._end: TimedEnd | None = None  # of a run that was given its time
        self._metrics: Metrics  # these are made when the folder of the run is opened
        self._checkpoints: Checkpoints
        self._evaluations: Evaluations
        self._schedule: Schedule
        self.state = RunState.first(self.config)
        ready = partial(for_device, model=model, device=self.device) if self.device.type == "cuda" else None
        self.data = UpdateData(dataset.train, self.config, self.state.faults, self._share, ready)
        if self.tokenizer is not None and self.config.data.fim_rate:
            self.tokenizer = self.tokenizer.with_fim()  # so that whoever has the model knows that it can fill in
        self._seconds_before = 0.0  # training time of the lives of this run before this one
        self._resumed_from: int | None = None
        self._former_end: int | None = None  # the last step of a run that was finished and is now trained longer
        self._last_step: StepResult | None = None
        self._unwritten: Callable[[], None] | None = None  # shows the last step and writes its row of metrics
        self._measured: Measured | None = None  # the last evaluation

    @property
    def step(self) -> int:
        """The number of updates done."""
        return self.state.step

    @property
    def spent(self) -> float | None:
        """Seconds that a run which was given its time has taken so far, over all its starts; None without a clock."""
        return None if self._end is None or self._end.clock is None else self._end.clock.elapsed

    def fit(self, resume: str | bool = "auto") -> TrainResult:
        """Trains to the end. resume: "auto" goes on where `out` holds this run, True demands it, False refuses it.

        SIGINT and SIGTERM raise Interrupted, after a checkpoint where there is something to save; the weights in `model` may then be of no use.
        """
        try:
            return self._fit(resume)
        except StopRequested as request:
            assert request.ends_with is not None  # there was nothing to save, or it has been saved
            raise request.ends_with from None

    def _fit(self, resume: str | bool) -> TrainResult:
        if resume not in ("auto", True, False):
            raise UserError(f'resume must be "auto", True or False, got {resume!r}.')
        if self._leads and self._lock is None:
            self._lock = RunLock(self.out, sign=False)
        reporter = Reporter(self.out, self.config) if self._leads else SilentReporter()
        signals = StopSignals(self._nothing_to_lose)
        with self._lock or nullcontext(), runtime.use(threads=self.config.train.threads), reporter as self._report, signals as self._stop:
            with self._out_of_memory():
                self._open(resume)
            with self._metrics:
                with self._out_of_memory(), self.data, self._checkpoints, self._saving_when_stopped():
                    self._train()
                if self._end is not None and self._leads:
                    self._write_settings()  # with what the clock decided
                result = self._result()
                self._report.finish(result)
                if result.validation is not None:
                    self._metrics.hyperparameters(self.config.flat(), {"validation_loss": result.validation.loss})
                return result

    def whole_model(self) -> Model | None:
        """The model with all its weights where the run shares them out; None in all processes but the first."""
        whole = self._train_step.whole_model()
        return whole if self._leads else None

    # -- the algorithm ------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        settings, state, report = self.config.train, self.state, self._report
        assert settings.checkpoint_every is not None
        report.begin(state.step, self._steps, self.config, self.model.config, self.device)
        # The run may have stopped between this checkpoint and its evaluation; the checkpoint of a former last step does not know its own either.
        if self._evaluations.due(state.step) or (self._evaluations.possible and state.step == self._former_end):
            self._evaluate()
        if state.step == 0 and state.faults.may_roll_back:
            self._save()  # where a fault in the first steps goes back to
        self._follow(None if self._end is None else self._end.begin(state.step, self._steps))
        if state.step < self._steps:
            self._evaluations.forget()
        while state.step < self._steps and not state.best.exhausted(settings.patience):
            with report.reading(state.step), self._left_at_once():
                microbatches = self.data.microbatches(state.step)
            with report.step(state.step):
                ahead = partial(self._while_computing, state.step + 1)
                result = self._train_step.run(microbatches, self._learning_rate(), self._beat, ahead, self._before_update)
            state.step += 1
            state.tokens += result.num_targets
            self._record(result)
            self._follow(None if self._end is None else self._end.updated(state.step, self._steps))
            fault = state.faults.judge(state.step, result)
            if fault is not None:
                self._handle(fault)
            self._checkpoints.check()
            if state.step % settings.checkpoint_every == 0 or state.step == self._steps:
                self._save()
            if self._evaluations.due(state.step):
                self._evaluate()
            if settings.sample_every and state.step % settings.sample_every == 0:
                self._sample()
            if state.step < self._steps:
                self._check_stop()
        report.steps_done()
        self._save()  # after early stopping; the last step has its checkpoint already
        self._checkpoints.finish()
        self._leave_weights_to_use()
        self._evaluate_what_is_left()

    @property
    def _steps(self) -> int:
        """After how many updates the run ends."""
        assert self.config.train.steps is not None
        return self.config.train.steps

    def _learning_rate(self) -> float:
        """The learning rate of the next update."""
        rate, plateau = lr(self.state.step, self._schedule), self.state.plateau
        return rate if plateau is None else plateau.scaled(rate, self._schedule.min_lr)

    def _beat(self) -> None:
        """After each microbatch: no weight has changed yet, so that the step may be left."""
        self._report.beat()
        if self._world is None and self.device.type == "cpu":
            self._check_stop()

    def _before_update(self) -> None:
        """Gradients are complete, and no weight has changed."""
        self._diagnostics.before_update(self.state.step, self._train_step.loss_scale)
        self._checkpoints.before_update()

    def _record(self, result: StepResult) -> None:
        """Shows the step that was just made and writes its rows of metrics: at once, or while a GPU computes the next one."""
        self._write_what_is_left()
        first, step = self._last_step is None, self.state.step
        self._last_step = result
        self._unwritten = partial(self._write_step, step, result, self.state.tokens, self._seconds_before + self._report.seconds)
        layers = self._diagnostics.after_update(step)
        if first or layers is not None or not self._train_step.works_ahead:
            self._write_what_is_left()
        if layers is not None:
            self._metrics.write(layers[0])
            self._metrics.histograms("gradients", step, layers[1])

    def _write_step(self, step: int, result: StepResult, tokens: int, seconds: float) -> None:
        timing = self._report.trained(step, tokens, result, self._train_step.seconds)
        if step % self.config.log.metrics_every == 0 or not result.finite:
            self._metrics.write(TrainRow.of(step, result, tokens, seconds, timing))

    def _write_what_is_left(self) -> None:
        """Of the last step. Comes before everything that is written after it, its checkpoint above all."""
        write, self._unwritten = self._unwritten, None
        if write is not None:
            write()

    def _while_computing(self, following: int) -> list[Batch]:
        """What the host does while a GPU computes an update. Returns the microbatches of update number `following`."""
        self._write_what_is_left()
        return self.data.microbatches(following)

    def _evaluate(self) -> None:
        """Comes after the checkpoint of the same step was written: an evaluation that fails costs nothing."""
        state, report, rate = self.state, self._report, self._learning_rate()
        self._write_what_is_left()
        self._checkpoints.before_update()  # weights may be swapped for their averages
        with self._aside(), self._train_step.evaluation_weights(), self._left_at_once():
            self._measured = found = self._evaluations.measure(report, self._check_stop)
        best = state.take_evaluation(found.evaluation.loss)
        if found.activations is not None:
            self._metrics.write(ActivationsRow(step=state.step, blocks=found.activations))
        measured = {**found.evaluation.to_dict(), **found.classes}
        self._metrics.write(EvaluationRow(step=state.step, best=best, unigram_loss=found.unigram_loss, **measured))
        report.evaluated(state.step, found.evaluation, found.unigram_loss, best)
        if state.plateau is not None and self._learning_rate() < rate:
            waited = state.plateau.patience
            report.say(f"step {state.step:,}: no better loss in {waited} evaluations, the learning rate falls to {self._learning_rate():.3g}")
        if best:
            self._save()
            self._checkpoints.mark_best(state.step)
        else:
            self._end_early()

    def _sample(self) -> None:
        """A sample to samples.txt."""
        model = self._train_step.whole_model()
        if self.tokenizer is None or model is None or not self._leads:
            return
        self._checkpoints.before_update()
        with self._aside(), self._report.stage("sampling"), self._train_step.evaluation_weights(), self._left_at_once():
            text = sample_text(model, self.tokenizer, self.dataset.train, seed=self.state.step)
        with Appender(self.out / "samples.txt", RUN) as file:
            file.write(Sample(step=self.state.step, text=text).to_text())
        self._metrics.text("sample", self.state.step, text)

    def _leave_weights_to_use(self) -> None:
        """Leaves in the model, and with restore_best in the last checkpoint, the weights to use: averages, or the best evaluation's."""
        best = self.state.best.step
        if not self.config.train.restore_best or best is None or best == self.state.step:
            averages = self._train_step.averages()
            if averages is not None:
                put(self._train_step.optimizer.parameters, averages)
            return
        training = {name: tensor.clone() for name, tensor in self._train_step.state_dict(training_weights=True).items()}
        found = read_checkpoint(self._checkpoints.store.path(best), with_optimizer=False)
        load_weights(self.model, found.weights, found.path)
        self._report.say(f"restored the weights of step {best:,}, the best evaluation")
        self._measured = None
        self._checkpoints.save(self.state.step, weights_of(self.model), training, self._state_to_store())

    def _evaluate_what_is_left(self) -> None:
        """The weights that the run leaves, on the whole validation split where the budget allows it."""
        evaluations, report = self._evaluations, self._report
        plan, clock = evaluations.plan, None if self._end is None else self._end.clock
        whole = plan.whole_at_end and (clock is None or clock.has_time_for(plan.split_rows / plan.rows))
        if not evaluations.possible or not (whole or self._measured is None):
            return
        with self._left_at_once():
            self._measured = found = evaluations.loss(report, self._check_stop, whole=whole)
        self._metrics.write(FinalRow(step=self.step, unigram_loss=found.unigram_loss, **found.evaluation.to_dict()))
        report.evaluated(self.step, found.evaluation, found.unigram_loss, best=False)

    def _result(self) -> TrainResult:
        state = self.state
        return TrainResult(
            step=state.step,
            tokens=state.tokens,
            train_loss=None if self._last_step is None else self._last_step.loss,
            validation=None if self._measured is None else self._measured.evaluation,
            best_loss=state.best.loss if state.best.step is not None else None,
            best_step=state.best.step,
            unigram_loss=None if self._measured is None else self._measured.unigram_loss,
            seconds=self._seconds_before + self._report.seconds,
            tokens_per_second=self._report.tokens_per_second,
            skipped_steps=state.faults.skipped,
            stopped_early=state.best.exhausted(self.config.train.patience),
            resumed_from=self._resumed_from,
            checkpoint=self._checkpoints.store.path(state.step),
            out=self.out,
        )

    # -- a run that was given its time --------------------------------------------------------------------------------------

    def _follow(self, pace: Pace | None) -> None:
        """Takes over a decision about the end of the run, and records it. With the next checkpoint it is as durable as the weights that follow from
        it."""
        if pace is None or self._end is None:
            return
        self._write_what_is_left()
        so_far = pace.until(self.step)
        now, early = so_far.decisions[-1], so_far.most_steps is not None
        self._metrics.write(PaceRow(step=self.step, steps=now.steps, share=now.share, early=early, seconds=round(self.spent or 0.0, 3)))
        self._take_pace(pace)
        self._report.ends_after(now.steps)

    def _take_pace(self, pace: Pace) -> None:
        assert self._end is not None
        by_clock, steps = "derived: decided by the clock", pace.steps(self.step)
        source = by_clock if self._end.clock is not None else self.config.sources["train.pace"]
        self.config = self.config.replace(by_clock, steps=max(1, steps)).replace(source, pace=pace.to_text())
        self._end.pace, self._evaluations.steps = pace, steps
        self._schedule = replace(self._schedule, steps=max(1, steps), pace=pace)

    def _end_early(self) -> None:
        """Where the validation loss no longer falls."""
        waited = self.state.best.without_gain
        pace = None if self._end is None else self._end.no_longer_falls(self.step, self._steps, waited)
        if pace is not None:
            self._report.say(
                f"step {self.step:,}: the validation loss has not fallen in {waited} evaluations. The learning rate falls from here on, and the run "
                f"ends early, after {pace.steps(self.step):,} steps: this text teaches the model no more"
            )
            self._follow(pace)

    def _aside(self) -> AbstractContextManager[None]:
        """Around work between updates, which the clock keeps apart from them."""
        return nullcontext() if self._end is None else self._end.aside()

    # -- signals that ask the run to stop -----------------------------------------------------------------------------------

    def _nothing_to_lose(self, asked: str) -> Interrupted | None:
        """What to tell where the run may be left at any moment: its folder holds everything. None where it must first write a checkpoint."""
        if self._world is not None:  # several processes leave together
            return None
        if self._last_step is None and self._resumed_from is None:
            return Interrupted(BEFORE_TRAINING)
        return self._interrupted(asked) if self._last_step is None or self._checkpoints.hold(self.step) else None

    def _interrupted(self, asked: str) -> Interrupted:
        steps, left = self.config.train.steps, ", before it was evaluated to its end" if self.step == self.config.train.steps else ""
        return Interrupted(
            f"stopped by {asked} after step {self.step:,} of {steps:,}{left}; the checkpoint is {self._checkpoints.store.path(self.step)}. "
            f"Go on from there with: {command('train', '--resume', '--out', self.out)}"
        )

    def _asked(self) -> str:
        """The signal that asked this or another process of the run to stop; empty where none has."""
        return (self._stop.asked if self._world is None else self._world.agreed(self._stop.asked)) or ""

    def _check_stop(self) -> None:
        """Raises StopRequested where the run was asked to stop."""
        if self._world is None:
            self._stop.check()
        elif self._asked():
            raise StopRequested

    def _left_at_once(self) -> AbstractContextManager[None]:
        """Around work that changes nothing which a checkpoint holds: a signal ends it wherever it is. Several processes agree between its batches."""
        return self._stop.at_once() if self._world is None else nullcontext()

    @contextmanager
    def _saving_when_stopped(self) -> Iterator[None]:
        """Around the loop: writes a checkpoint when it is asked to stop at a point where the folder does not hold everything, and however the loop
        ends the row of its last step."""
        try:
            yield
        except StopRequested as request:
            if request.ends_with is None:
                request.ends_with = self._interrupted(self._asked())
                self._save()
                self._checkpoints.finish()
            raise
        finally:
            self._write_what_is_left()

    # -- steps that went wrong ----------------------------------------------------------------------------------------------

    def _handle(self, fault: Fault) -> None:
        """Records what went wrong in the step before, and does what its policy says."""
        self._write_what_is_left()
        data, documents = self.data.number(self.step - 1), self.data.documents(self.step - 1)
        where = f"data {data:,} from {', '.join(documents[:3])}{f' and {len(documents) - 3} more' if len(documents) > 3 else ''}"
        row = partial(FaultRow, event=fault.kind, action=fault.action, text=fault.text, fault_step=self.step, data=data, documents=tuple(documents))
        if fault.action == "rollback":
            self._roll_back(fault, where)
            self._metrics.write(row(step=self.step))
            return
        self._metrics.write(row(step=self.step))
        self._report.say(f"{fault.text}; {where}{': the update was left out' if fault.action == 'skip' else ''}")
        if fault.action == "stop":
            error = NonFiniteError if fault.kind == "nonfinite" else FaultError
            self._checkpoints.finish()  # the advice names the last one
            raise error(f"{fault.text} ({where}). {advice(fault, self._last_checkpoint())}")

    def _roll_back(self, fault: Fault, where: str) -> None:
        """Goes back to the newest good checkpoint and writes it anew with the note that other data follows, so that a resume knows it too."""
        self._checkpoints.finish()
        failed, faults, store = self.step, self.state.faults, self._checkpoints.store
        found = store.newest_good(self._report.say)
        assert found is not None  # one was written before the first step
        if not faults.roll_back(failed - 1, found.step):
            tried = f"after {ROLLBACKS} rollbacks to step {found.step:,}"
            raise FaultError(f"{fault.text} ({where}), {tried}. {advice(fault, found.path)}")
        rollbacks = list(faults.rollbacks)
        self._train_step.restore(found)
        self.state.load(found)
        faults.rollbacks, self._checkpoints.newest_step = rollbacks, None
        if self._end is not None and self._end.clock is not None:
            self._take_pace(self._end.pace.until(self.step))
        self._metrics.truncate(self._belongs_before_step)
        self._save()
        self._checkpoints.finish()
        since = failed - self.step
        self._report.say(f"{fault.text}; {where}: back to step {self.step:,}, and on with other data than that of the {since:,} steps since")

    def _last_checkpoint(self) -> Path | None:
        store = self._checkpoints.store
        steps = store.steps()
        return store.path(steps[-1]) if steps else None

    # -- the run's folder ---------------------------------------------------------------------------------------------------

    def _open(self, resume: str | bool) -> None:
        """Prepares everything for the step to start from: a fresh run's first, or the one after the newest good checkpoint."""
        report = self._report
        store = make_store(self.out / "checkpoints", self.model, self.config, self._world, self._sharding)
        store.clean()
        found = self._found_in(store, resume)
        if self._lock is not None:
            self._lock.sign()
        config = self.config
        assert config.optim.learning_rate is not None and config.optim.min_lr is not None
        assert config.optim.warmup is not None and config.train.steps is not None
        self.model.to(self.device)
        sizes = self.model.config, config.train.batch_size, config.train.seq_len, config.train.precision
        self.model.recompute, why = choose_recompute(config.train.recompute, *sizes, self.device, **memory_options(config))
        if self.model.recompute != "none":
            report.say(f"the backward computes again: {self.model.recompute} ({why})")
        self._schedule = Schedule(config.optim.learning_rate, config.optim.min_lr, config.optim.warmup, config.train.steps, config.optim.schedule)
        self._train_step = make_step(self.model, config, self._world, self._share, self._sharding)
        if self._leads:
            if self.tokenizer is not None:
                self.tokenizer.save(self.out / "tokenizer.json")
            self._write_settings()
            record_environment(self.out, config.sources)
        self._metrics = Metrics(self.out, config.log.tensorboard, config.log.prometheus_port) if self._leads else SilentMetrics()
        self._metrics.text("config", self.step, config.to_toml())
        # Several processes write together; that needs them all at the same place.
        self._checkpoints = Checkpoints(store, config.train.async_checkpoint and self._world is None, report, self._metrics)
        looks = self._leads and self._sharding is None  # into layers, which takes whole weights
        parameters = self._train_step.optimizer.parameters if looks else {}
        self._diagnostics = Diagnostics(self.model, parameters, self.dataset, self.tokenizer, config)
        self._evaluations = Evaluations(self.model, self.dataset, config, self._diagnostics)
        if found is not None:
            self._train_step.restore(found)
            self.state.load(found)
            self._resumed_from = self._checkpoints.newest_step = found.step
            self._seconds_before = float(found.state["seconds"])
            self._evaluations.keep_to(self.state.evaluation_rows)
            report.say(f"resuming after step {self.step:,} from {found.path}")
        self.state.evaluation_rows = self._evaluations.plan.rows
        if config.seconds is not None:
            most_steps = config.steps_of_epochs(self.dataset.train.num_tokens)
            self._end = TimedEnd(config, self._began, self.out, found, self._evaluations.plan, most_steps)
            self._take_pace(self._end.pace)
        again = self._metrics.truncate(self._belongs_before_step)
        if self._world is None:  # several processes evaluate together, and only the first has these rows
            self._evaluations.recall(row for row in again if row["step"] == self.step and row["kind"] in _OF_EVALUATIONS)

    def _write_settings(self) -> None:
        write_file(self.out / "config.toml", self.config.to_toml().encode(), RUN)

    def _found_in(self, store: CheckpointStore, resume: str | bool) -> Checkpoint | None:
        """The checkpoint to go on from, of this very run; None for a run that begins."""
        steps = store.steps()
        if resume is False and steps:
            raise UserError(f"{self.out} already holds a run. Resume it (resume=True or --resume), or choose another folder with --out.")
        found = store.newest_good(self._report.say) if steps else None
        if found is None and resume is True:
            raise CheckpointError(f"{self.out} holds no checkpoint to resume. Start without --resume.")
        if found is not None:
            self._check_same_run(found, new_end=resume is True)
        return found

    def _check_same_run(self, found: Checkpoint, new_end: bool) -> None:
        """A run goes on with the settings, data and tokenizer that it began with; anything else would be another run under its name."""
        stored = StoredRun.of(self.out, found.step, found.state)
        tokenizer_hash = None if self.tokenizer is None else self.tokenizer.hash
        self.config, sentence = go_on(self.config, stored, identity(self.dataset), tokenizer_hash, new_end=new_end)
        if sentence is not None:
            self._former_end = found.step if stored.finished else None
            self._report.say(sentence)

    def _belongs_before_step(self, row: dict[str, Any]) -> bool:
        """Whether a row of metrics stays when the run goes on from `step`: later rows, and the evaluation after its checkpoint, come again."""
        if row["step"] == self.step and row["kind"] == PaceRow.kind and self._end is not None:  # it may have been decided after the checkpoint
            return any((each.step, each.steps) == (self.step, row.get("steps")) for each in self._end.pace.decisions)
        return row["step"] < self.step or (row["step"] == self.step and row["kind"] not in _OF_EVALUATIONS)

    def _save(self) -> None:
        """The checkpoint of this step, where there is none yet."""
        self._write_what_is_left()
        if self._checkpoints.newest_step != self.step:
            self._checkpoints.save(self.step, self._train_step.weights(), self._train_step.state_dict(), self._state_to_store())

    def _state_to_store(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "config": self.config.to_dict(),
            "sources": dict(self.config.sources),
            "tokenizer_hash": self.tokenizer.hash if self.tokenizer is not None else None,
            "data": identity(self.dataset),
            **self.state.to_dict(),
            "seconds": self._seconds_before + self._report.seconds,
            **({} if self.spent is None else {"spent": self.spent}),
            "lora": lora_state(self.model),
            "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _out_of_memory(self) -> AbstractContextManager[None]:
        settings, run = self.config.train, {"device": self.device, **memory_options(self.config)}
        sizes = self.model.config, settings.batch_size, settings.seq_len, settings.precision
        return explained_out_of_memory(*sizes, self.model.recompute, **run)


def _check_fit(model: Model, dataset: Dataset, config: TrainConfig, tokenizer: Tokenizer | None) -> None:
    """What must agree between model, data, tokenizer and settings before anything is written."""
    if config.train.seq_len > model.config.max_seq_len:
        raise UserError(f"seq_len must be <= the model's max_seq_len ({model.config.max_seq_len}), got {config.train.seq_len}.")
    if tokenizer is not None:
        check_tokenizer(tokenizer.hash, dataset.train.tokenizer_hash, dataset.train.folder)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        size = tokenizer.vocab_size
        raise UserError(f"the tokenizer has {size} tokens, the model only {model.config.vocab_size}. Build the model with vocab_size={size}.")
