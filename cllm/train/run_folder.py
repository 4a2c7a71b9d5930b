"""The run in a folder: what its newest checkpoint says about it, the packed tokens that it learns from, and whether a command goes on with it.

    OUT/.lock                      held while a process trains here (`cllm.monitor.guards.RunLock`)
        config.toml                written when the run begins, and again with every value filled in
        data/tokens-DIGEST/        packed tokens; chats are in data/chat-DIGEST. Never overwritten by those of other text
        checkpoints/step-N/        state.json carries the settings, the tokenizer's hash and the digests of the tokens

A run goes on with the tokens that it began with, wherever the text is by then. All of this is compared before anything is written, so that a
command that is refused leaves the folder as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.checkpoint.folder import STATE, read_manifest, read_state
from cllm.checkpoint.place import CHECKPOINTS
from cllm.checkpoint.safetensors import sha256_of
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.weights import check_tokenizer
from cllm.config.pace import Pace
from cllm.config.schedule import Schedule, lr
from cllm.config.schema import SETTINGS
from cllm.config.train import TrainConfig
from cllm.monitor.guards import BestLoss
from cllm.runtime import files
from cllm.runtime.errors import CheckpointError, DataError, UserError
from cllm.shell import command
from cllm.train.run_place import DATA, PLACES

if TYPE_CHECKING:
    from cllm.data import Dataset, TokenSplit

_TIME = ("train.hours", "train.minutes")
_END = ("train.steps", "train.epochs", "train.patience", *_TIME)  # settings that only say where a run ends


# -- what is in a folder ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredRun:
    """A run as one of its checkpoints describes it, without the weights: asking costs nothing.

    data: {"train": {"tokens": count, "digest": of all their bytes}, "val": ...}. vocab_size: rows of the model's embedding.
    """

    out: Path
    step: int
    config: TrainConfig
    tokenizer_hash: str | None
    vocab_size: int
    data: dict[str, dict[str, Any]]
    best: BestLoss

    @classmethod
    def of(cls, out: Path, step: int, state: Mapping[str, Any]) -> StoredRun:
        """From the state.json of the checkpoint of `step`; CheckpointError when it is not that of a run."""
        try:
            config = TrainConfig.from_dict(state["config"], state["sources"])
            rows = int(state["model"]["vocab_size"])
            return cls(out, step, config, state["tokenizer_hash"], rows, dict(state["data"]), BestLoss.from_dict(state["best"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint of step {step:,} in {out} is not that of a run ({type(error).__name__}: {error}).") from error

    @property
    def finished(self) -> bool:
        """Whether all steps are done. A run that stopped early for want of a better loss is not known to be finished before it evaluates again."""
        return self.step >= (self.config.train.steps or 0)


def stored_run(out: Path) -> StoredRun | None:
    """The run in a folder by its newest checkpoint whose description is undamaged; None where there is no checkpoint.

    Raises CheckpointError where there are checkpoints and none can be read: to start afresh there would be a silent loss.
    """
    store = CheckpointStore(out / CHECKPOINTS)
    steps = store.steps()
    for step in reversed(steps):
        path = store.path(step)
        try:
            if sha256_of(path / STATE) == read_manifest(path)["files"][STATE]["sha256"]:
                return StoredRun.of(out, step, read_state(path, step))
        except (CheckpointError, OSError, KeyError):
            continue
    if steps:
        found = store.newest_good(with_optimizer=False)  # names what is wrong with each
        assert found is not None
        return StoredRun.of(out, found.step, found.state)
    return None


def true_sources(config: TrainConfig, file: Path, stored: StoredRun | None) -> TrainConfig:
    """The settings read from a run's own config.toml, which lists all of them, each with the source that it had when the run began.

    What was edited since has the file as its source. Before the first checkpoint the sources are not known; defaults are told by their value.
    """
    there = {} if stored is None else stored.config.flat()
    for key, value in config.flat().items():
        if stored is not None and key == "train.pace":  # the checkpoint knows better than the file, which is written when the run begins and ends
            config = config.replace(stored.config.sources[key], pace=there[key])
        if config.sources[key] != f"file {file}":
            continue
        source = stored.config.sources[key] if stored is not None and there[key] == value else ""
        if not source or source.startswith("file "):  # also of a run that an older version resumed
            source = "default" if value == SETTINGS[key].default else config.sources[key]
        config = config.replace(source, **{key: value})
    return config


# -- its tokens ------------------------------------------------------------------------------------------------------------


def identity(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What tells one packed data set from another, wherever it lies: for each split its length and a digest of all its bytes."""
    return {name: _split_identity(getattr(dataset, name)) for name in ("train", "val")}


def _split_identity(split: TokenSplit) -> dict[str, Any]:
    """The digest is taken of the checksums of the shards and document bounds, which index.json holds: no token is read."""
    index = json.loads((split.folder / "index.json").read_bytes())
    sums = [*(shard["blake2b"] for shard in index["shards"]), index["offsets"]["blake2b"]]
    return {"tokens": split.num_tokens, "digest": hashlib.sha256(" ".join(sums).encode()).hexdigest()[:32]}


def packed_folders(out: Path) -> list[Path]:
    """The folders of packed tokens inside a run, also those of its older layout (data/tokens, data/chat), by name."""
    return sorted(each.parent for each in (out / DATA).glob("*/dataset.json") if each.parent.name.partition("-")[0] in ("tokens", "chat"))


def own_tokens(stored: StoredRun) -> Dataset:
    """The packed tokens that a run began with: its own, or where its data was a packed folder, that one.

    Raises DataError that says what is missing, damaged or changed.
    """
    from cllm.data import Dataset, is_packed

    packed = Path(stored.config.data.path)
    places = [*packed_folders(stored.out), *([packed] if is_packed(packed) else [])]
    problems = []
    for place in places:
        try:
            dataset = Dataset.open(place, stored.tokenizer_hash)
            if identity(dataset) == stored.data:
                return dataset
            problems.append(f"{place} holds others ({words_of(identity(dataset))})")
        except (DataError, OSError, ValueError, KeyError) as error:
            problems.append(str(error).rstrip("."))
    found = "; ".join(problems) if problems else f"{stored.out / DATA} holds no packed tokens"
    raise DataError(f"the packed tokens that {stored.out} began with ({words_of(stored.data)}) are missing: {found}.")


def words_of(data: Mapping[str, Mapping[str, Any]]) -> str:
    """The identity of a data set for people."""
    return f"{data['train']['tokens']:,} tokens for training, {data['val']['tokens']:,} for validation"


def prune_tokens(out: Path, needed: Path) -> None:
    """Removes packed tokens other than `needed` from a run, and what a preparation that was killed has left half-written.

    Safe only under the run's lock, and where no checkpoint refers to any of them: nothing is removed where there are checkpoints.
    """
    if CheckpointStore(out / CHECKPOINTS).steps():
        return
    doomed = [each for each in packed_folders(out) if not each.samefile(needed)]
    for each in doomed:
        files.remove_folder(each)
    files.clean(out / DATA, alone=True)


# -- going on --------------------------------------------------------------------------------------------------------------


def go_on(
    config: TrainConfig, stored: StoredRun, data: Mapping[str, Mapping[str, Any]], tokenizer_hash: str | None, *, new_end: bool
) -> tuple[TrainConfig, str | None]:
    """The settings with which a stored run goes on, and a sentence for people where it ends elsewhere than it was to.

    config: resolved. data: the `identity` of the tokens at hand. new_end: whether another number of steps (or patience) may be meant; the learning
    rates of the steps that are done must then be those of the new schedule as well.
    Raises UserError that lists what differs from the run in the folder, CheckpointError for another tokenizer.
    """
    there = stored.config
    if there.seconds is not None:
        config = config.adopt_choice(there)
    asked = _steps_asked_for(config, there)
    config = config.adopt(there)
    for key in PLACES:
        if config[key] and there[key] and os.path.abspath(config[key]) == os.path.abspath(there[key]):
            config = config.replace(config.sources[key], **{key: there[key]})
    sentence = problem = None
    if asked is not None:
        config = config.replace(config.sources["train.steps"], steps=asked)
        problem, sentence = _other_end(stored, asked)
    different = config.differences(there, apart_from=_END if new_end else ("train.steps", "train.epochs"))
    if asked is not None and (problem or not new_end):
        hint = problem or (how_to_train_longer(stored) if asked > (there.train.steps or 0) else "")
        different.append(f"train.steps: {there.train.steps:,} there, {asked:,} here. {hint}".rstrip())
    if data != stored.data:
        different.append(f"data: {words_of(stored.data)} there, {words_of(data)} here: the text, or how it was packed, is another")
    if different:
        raise UserError(
            f"{stored.out} holds a run of another configuration:\n  "
            + "\n  ".join(different)
            + "\nGive the same settings to go on with it, or choose another folder with --out."
        )
    check_tokenizer(tokenizer_hash, stored.tokenizer_hash, stored.out)
    return config, sentence


def _steps_asked_for(config: TrainConfig, there: TrainConfig) -> int | None:
    """The number of steps that was asked for, directly or in epochs, where it is not the stored run's."""
    given = not config.sources["train.steps"].startswith("derived") or (config.train.epochs is not None and config.train.epochs != there.train.epochs)
    return config.train.steps if given and config.train.steps != there.train.steps else None


def _schedule(config: TrainConfig, steps: int | None = None) -> Schedule:
    optim = config.optim
    assert optim.learning_rate is not None and optim.min_lr is not None and optim.warmup is not None and config.train.steps is not None
    pace = None if config.train.pace is None else Pace.of_text(config.train.pace)
    return Schedule(optim.learning_rate, optim.min_lr, optim.warmup, steps or config.train.steps, optim.schedule, pace)


def _first_other_rate(old: Schedule, new: Schedule, done: int) -> int | None:
    """The first of the steps that are done whose learning rate the new schedule would have made another."""
    return next((step for step in range(done) if lr(step, old) != lr(step, new)), None)


def _other_end(stored: StoredRun, steps: int) -> tuple[str | None, str | None]:
    """(why a stored run cannot end after this number of steps, None) or (None, what that means).

    Whether it can follows from the learning rates alone: those of the steps that are done must not depend on the number of steps. Of a wsd
    schedule in its decay they do; it goes on all the same, from its decayed weights at the full rate (Wen et al. 2024, arXiv 2410.05192, WSD-S).
    """
    old, new = _schedule(stored.config), _schedule(stored.config, steps)
    if new.steps < stored.step:
        return f"{stored.step:,} steps are done already.", None
    sentence = f"the run ends after {new.steps:,} steps instead of {old.steps:,}"
    if _first_other_rate(old, new, stored.step) is None:
        return None, sentence
    if new.kind == "wsd" and new.steps > old.steps:
        before, after = lr(stored.step - 1, old), lr(stored.step, new)
        return None, f"{sentence}; the learning rate had begun to decay, to {before:.3g}, and continues at {after:.3g} (WSD-S, Wen et al. 2024)"
    return how_to_train_longer(stored), None


def how_to_train_longer(stored: StoredRun) -> str:
    """What to do for more steps than a run was to make, as sentences with the commands."""
    old = _schedule(stored.config)
    another = command("train", "DATA", "--from", stored.out, "--out", "NEW")
    if stored.config.seconds is not None and old.kind == "wsd":
        time = "--hours" if stored.config.train.minutes is None else "--minutes"
        return (
            f"To give it more time in all: {command('train', '--resume', '--out', stored.out, time, 'MORE')}. "
            f"To go on from its weights as a run of its own, with the same or with other text: {another}."
        )
    if old.kind == "wsd" or _first_other_rate(old, _schedule(stored.config, 2 * old.steps), stored.step) is None:
        return (
            f"To train it longer: {command('train', '--resume', '--out', stored.out, '--steps', 'MORE')}. "
            f"To go on from its weights as a run of its own, with the same or with other text: {another}."
        )
    return (
        f"Its {old.kind} schedule was made for {old.steps:,} steps, which cannot be changed afterwards. To go on from its weights as a run of its "
        f"own, with the same or with other text: {another} (with --schedule wsd or constant that run can be made longer later)."
    )
