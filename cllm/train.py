"""The training loop: batch -> step -> metrics -> checkpoint -> evaluation, and everything that makes it stop and go on without a trace.

    result = Trainer(model, dataset, TrainConfig(steps=1000), out="runs/demo", tokenizer=tokenizer).fit()

Nothing random hides in the loop: the data of a step is a function of (seed, step), the learning rate of the step, the weights of both. So
a run that was stopped anywhere, also by SIGKILL, and resumed writes the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import runtime
from cllm.checkpoint import Checkpoint, CheckpointStore, check_tokenizer, load_weights, weights_of
from cllm.data import Batches
from cllm.data.chat import ChatBatches, ChatSplit
from cllm.device import choose_recompute, explained_out_of_memory, resolve
from cllm.evaluate import Evaluation, evaluate
from cllm.lora import lora_state
from cllm.metrics import Metrics
from cllm.monitor import BestLoss, Interrupted, NonFinitePolicy, RunLock, StopSignals
from cllm.reporter import Reporter
from cllm.runtime.errors import CheckpointError, UserError
from cllm.schedule import Schedule, lr
from cllm.step import Microbatch, StepResult, TrainStep
from cllm.storage import tensors_bytes, write_atomic
from cllm.train_config import TrainConfig

if TYPE_CHECKING:
    from cllm.data import Dataset, TokenSplit
    from cllm.model import Model
    from cllm.tokenizer import Tokenizer


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
        self.device, _ = resolve(self.config.train.device)
        _check_fit(model, dataset, self.config, self.tokenizer)
        self._batches = make_batches(dataset.train, self.config)
        self.step = 0
        self.tokens = 0
        self._seconds_before = 0.0  # of the runs that this one resumes
        self._best = BestLoss()
        self._nonfinite = NonFinitePolicy(self.config.train.on_nonfinite)
        self._last_evaluation = 0
        self._last_saved: int | None = None
        self._resumed_from: int | None = None
        self._last_step: StepResult | None = None
        self._prepared: tuple[int, list[Microbatch]] = (-1, [])
        self._validation: Evaluation | None = None
        self._unigram: float | None = None

    # -- the algorithm ------------------------------------------------------------------------------------------------------

    def fit(self, resume: str | bool = "auto") -> TrainResult:
        """Trains to the end. resume: "auto" goes on where `out` holds this run, True demands it, False refuses it."""
        if resume not in ("auto", True, False):
            raise UserError(f'resume must be "auto", True or False, got {resume!r}.')
        _make_folder(self.out)
        with RunLock(self.out), runtime.use(threads=self.config.train.threads), Reporter(self.out, self.config) as report, StopSignals() as stop:
            with self._out_of_memory():
                self._open(resume, report)
            with self._metrics:
                with self._out_of_memory():
                    self._loop(report, stop)
                result = self._result(report)
                report.finish(result)
                return result

    def _loop(self, report: Reporter, stop: StopSignals) -> None:
        settings = self.config.train
        assert settings.steps is not None
        report.begin(self.step, settings.steps, self.config, self.model.config, self.device)
        if self._evaluation_due():  # the run may have stopped between this checkpoint and its evaluation
            self._evaluate(report)
        while self.step < settings.steps and not self._best.exhausted(settings.patience):
            microbatches = self._microbatches(self.step)
            with report.step(self.step):
                result = self._train_step.run(microbatches, lr(self.step, self._schedule), report.beat, partial(self._microbatches, self.step + 1))
            self.step += 1
            self._record(result, report)
            if self._checkpoint_due():
                self._save(report)
            if self._evaluation_due():
                self._evaluate(report)
            if settings.sample_every and self.step % settings.sample_every == 0:
                self._sample(report)
            if stop.asked and self.step < settings.steps:
                self._save(report)
                raise Interrupted(
                    f"stopped by {stop.asked} after step {self.step:,} of {settings.steps:,}; the checkpoint is "
                    f"{self._store.path(self.step)}. Go on from there with: cllm train --resume --out {self.out}"
                )
        self._save(report)  # after early stopping; the last step has its checkpoint already

    def _microbatches(self, step: int) -> list[Microbatch]:
        """The data of update number `step`: always the first batch when one batch is to be learnt by heart. The last answer is kept."""
        settings = self.config.train
        if self._prepared[0] != step:
            first = 0 if settings.overfit_one_batch else step * settings.grad_accum
            batches = (self._batches.batch(first + number) for number in range(settings.grad_accum))
            self._prepared = step, [Microbatch(each.tokens, each.targets, each.cu_seqlens) for each in batches]
        return self._prepared[1]

    def _record(self, result: StepResult, report: Reporter) -> None:
        self._last_step = result
        self.tokens += result.num_targets
        timing = report.trained(self.step, self.tokens, result)
        if result.finite:
            self._nonfinite.finite()
        if self.step % self.config.log.metrics_every == 0 or not result.finite:
            self._metrics.write(
                "train", self.step, loss=result.loss, learning_rate=result.learning_rate, gradient_norm=result.gradient_norm,
                largest_gradient=result.largest_gradient, num_nonfinite=result.num_nonfinite, updated=result.updated, tokens=self.tokens,
                seconds=round(self._seconds_before + report.seconds, 3), **timing,
            )
        if not result.finite:
            report.say(f"step {self.step:,}: loss {result.loss:g}, gradient norm {result.gradient_norm:g}: not finite, the update was left out")
            self._nonfinite(self.step, result.loss, result.gradient_norm, result.num_nonfinite, self._store.folder)

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
        settings = self.config.train
        with report.stage("evaluating"):
            self._validation = evaluate(
                self.model, self.dataset.val, seq_len=settings.seq_len, batch_size=settings.batch_size,
                document_mask=self.config.data.document_mask, progress=report.beat,
            )
        result = self._validation
        best = self._best.step == self.step if counted else self._best.update(self.step, result.loss)
        self._metrics.write("eval", self.step, **result.to_dict(), unigram_loss=self._unigram, best=best)
        report.evaluated(self.step, result, self._unigram, best)
        if best:
            self._save(report)
            self._store.mark_best(self.step)

    def _sample(self, report: Reporter) -> None:
        """Generated text to samples.txt, the only place where training calls generation."""
        if self.tokenizer is None:
            return
        from cllm.generate import generate

        with report.stage("sampling"):
            # Where a document begins; without an end-of-text token, as the training text begins.
            start = [int(self.dataset.train.read(0, 1)[0])] if self.tokenizer.eot_id is None else [self.tokenizer.eot_id]
            text = generate(self.model, self.tokenizer, start, max_tokens=200, temperature=0.8, seed=self.step)[0].text
            with open(self.out / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"=== step {self.step}\n{text}\n\n")

    def _result(self, report: Reporter) -> TrainResult:
        return TrainResult(
            step=self.step, tokens=self.tokens, train_loss=None if self._last_step is None else self._last_step.loss,
            validation=self._validation, best_loss=self._best.loss if self._best.step is not None else None, best_step=self._best.step,
            unigram_loss=self._unigram, seconds=self._seconds_before + report.seconds, tokens_per_second=report.tokens_per_second,
            skipped_steps=self._nonfinite.skipped, stopped_early=self._best.exhausted(self.config.train.patience),
            resumed_from=self._resumed_from, checkpoint=self._store.path(self.step), out=self.out,
        )

    # -- the run's folder ---------------------------------------------------------------------------------------------------

    def _open(self, resume: str | bool, report: Reporter) -> None:
        """Prepares everything for the step to start from: a fresh run's first, or the one after the newest good checkpoint."""
        self._store = CheckpointStore(self.out / "checkpoints", self.config.train.keep)
        self._store.clean()
        if resume is False and self._store.steps():
            raise UserError(f"{self.out} already holds a run. Resume it (resume=True or --resume), or choose another folder with --out.")
        found = self._store.newest_good(report.say) if self._store.steps() else None
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
        self._train_step = TrainStep(
            self.model, config.train.precision, config.optim.learning_rate, config.optim.grad_clip,
            weight_decay=config.optim.weight_decay, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps,
            label_smoothing=config.optim.label_smoothing, z_loss=config.optim.z_loss,
        )
        if self.dataset.val.num_tokens >= 2:
            self._unigram = self.dataset.val.unigram_nats(self.dataset.train)
        if self.tokenizer is not None:
            self.tokenizer.save(self.out / "tokenizer.json")
        write_atomic(self.out / "config.toml", config.to_toml().encode())
        self._metrics = Metrics(self.out, config.log.tensorboard)
        if found is not None:
            self._restore(found, report)
        # What a resumed run will write again is dropped: later steps, and the evaluation that follows the checkpoint of this one.
        self._metrics.truncate(lambda row: row["step"] < self.step or (row["step"] == self.step and row["kind"] != "eval"))

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
                f"{self.out} holds a run of another configuration:\n  " + "\n  ".join(different) +
                "\nGive the same settings to go on with it, or choose another folder with --out."
            )
        check_tokenizer(self.tokenizer.hash if self.tokenizer is not None else None, found.state["tokenizer_hash"], self.out)

    def _restore(self, found: Checkpoint, report: Reporter) -> None:
        load_weights(self.model, found.weights, found.path)
        self._train_step.load_state_dict(found.optimizer)
        state = found.state
        self.step = self._resumed_from = self._last_saved = found.step
        self.tokens, self._seconds_before = state["tokens"], state["seconds"]
        self._best = BestLoss.from_dict(state["best"])
        self._nonfinite = replace(self._nonfinite, skipped=state["skipped"], in_a_row=state["skipped_in_a_row"])
        self._last_evaluation = state["last_evaluation"]
        report.say(f"resuming after step {self.step:,} from {found.path}")

    def _data_identity(self) -> dict[str, Any]:
        return {name: _split_identity(getattr(self.dataset, name)) for name in ("train", "val")}

    def _save(self, report: Reporter) -> None:
        if self._last_saved == self.step:
            return
        weights, optimizer = weights_of(self.model), self._train_step.state_dict()
        state = {
            "model": self.model.config.to_dict(), "config": self.config.to_dict(), "sources": dict(self.config.sources),
            "tokenizer_hash": self.tokenizer.hash if self.tokenizer is not None else None, "data": self._data_identity(),
            "tokens": self.tokens, "seconds": self._seconds_before + report.seconds, "best": self._best.to_dict(),
            "skipped": self._nonfinite.skipped, "skipped_in_a_row": self._nonfinite.in_a_row, "last_evaluation": self._last_evaluation,
            "lora": lora_state(self.model), "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with report.stage(f"writing a checkpoint ({(tensors_bytes(weights) + tensors_bytes(optimizer)) / 1e6:,.0f} MB)"):
            self._store.save(self.step, weights, optimizer, state)
        self._last_saved = self.step


def make_batches(split: TokenSplit, config: TrainConfig) -> Batches | ChatBatches:
    """The training batches that a configuration describes: a pure function of its seed and the batch's number."""
    settings = config.train
    if isinstance(split, ChatSplit):
        return ChatBatches(split, settings.seq_len, settings.batch_size, settings.seed)
    return Batches(
        split, settings.seq_len, settings.batch_size, settings.seed, shuffle=config.data.shuffle, document_mask=config.data.document_mask
    )


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
