"""`cllm train DATA --follow`: rounds of training as the text grows, each kept or undone by what it did to held-out text."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.cli.console import Console
from cllm.cli.interrupt import stopping_with
from cllm.cli.run_name import RUNS, name_of
from cllm.config.follow import FollowSettings
from cllm.config.train import TrainConfig
from cllm.monitor.guards import RunLock
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.progress import ByteProgress, duration, say
from cllm.runtime.quantities import counted, size
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.monitor.records import RoundRow
    from cllm.train.rounds import Losses, Round, Rounds

VAL_SHARE = 0.02  # of a round's text for its own validation: what decides about the round is held out already
# What a model settles, so that later rounds, which start from one, must not say it again.
_OF_THE_MODEL = ("data.tokenizer", "data.vocab_size", "optim.learning_rate", "optim.min_lr", "finetune.start_from")
WAITING = "stopped between two rounds; nothing is lost, and the same command goes on"


def follow(console: Console, config: TrainConfig, settings: FollowSettings, out: Path | None, once: bool) -> None:
    """Trains in rounds until it is stopped, or with `once` until there is nothing new. The folder is `out`, or one named after the data."""
    from cllm.data.documents.scan import Reading
    from cllm.monitor.rounds import MODEL, ROWS
    from cllm.train.rounds import Rounds

    out = out or RUNS / f"{name_of(config.data.path)}-followed"
    if (out / "config.toml").exists():
        raise UserError(f"{out} holds a single run. Name another folder with --out; to begin with its model, add --from {out}.")
    reading = Reading.of(config.data.text_field, config.data.separator, config.data.encoding)
    with RunLock(out):
        rounds = Rounds(out, config.data.path)
        waiting, told = False, ""
        while True:
            now = rounds.begun()
            if now is None:
                with stopping_with(WAITING):
                    try:
                        with ByteProgress(None) as bar:
                            now = rounds.begin(source_of(config.data.path, out), settings, reading, bar)
                    except DataError as error:
                        if once and not rounds.rows:
                            raise
                        if str(error) != told:
                            told = str(error)
                            console.print(f"no round yet: {told}")
                    if now is None and once:
                        break
                    if now is None:
                        if not waiting:
                            console.print(f"waiting for {size(settings.round_bytes)} of new text; looking every {duration(settings.look_every)}")
                        waiting = True
                        time.sleep(settings.look_every)
                        continue
            waiting = False
            row = _go_round(console, config, settings, rounds, now)
            rounds.end(row, settings.keep_text)
            console.print(_told(row))
    kept = sum(row.accepted for row in rounds.rows)
    if rounds.new_bytes:
        console.print(f"{size(rounds.new_bytes)} of new text wait for more: a round begins with {size(settings.round_bytes)} (--round-bytes)")
    if rounds.rows:
        console.print(f"{counted(len(rounds.rows), 'round')}, {kept} kept: {out / ROWS}")
    if kept:
        console.print(f"The model is in {out / MODEL}. Next:\n  {command('generate', out / MODEL, '--prompt', 'The ')}\n  {command('report', out)}")
    console.result({"out": str(out), "rounds": [row.to_dict() for row in rounds.rows], "model": str(out / MODEL) if kept else None})


def is_crawl(data: str) -> bool:
    """Whether the data are the folder of a crawl."""
    return (Path(data) / "crawl.sqlite").is_file()


def source_of(data: str, out: Path) -> Path:
    """Where the text is: the data themselves, or, of the folder of a crawl, the documents that are extracted from its finished pages."""
    if not is_crawl(data):
        return Path(data)
    from cllm.data.preparation.plan import prepare
    from cllm.data.preparation.recipe import Recipe
    from cllm.data.preparation.runner import runner_of

    runner = runner_of("pool", len(os.sched_getaffinity(0)))
    try:
        prepare([data], out / "documents", Recipe(), runner, lambda question: True)
    finally:
        runner.close()
    return out / "documents"


def _go_round(console: Console, config: TrainConfig, settings: FollowSettings, rounds: Rounds, now: Round) -> RoundRow:
    """Trains and judges a round that has begun, from wherever it was left."""
    from cllm.checkpoint import load
    from cllm.cli.training import train_in
    from cllm.monitor.records import RoundRow
    from cllm.train.rounds import losses, verdict

    began = time.monotonic()
    previous = rounds.previous()
    console.print(
        f"\nround {now.number}: {counted(now.documents, 'new document')}, {size(now.bytes)}, {size(now.replayed_bytes)} replayed, "
        f"{now.held_out:,} held out"
    )
    trained = train_in(now.run, round_config(config, now, previous), console)
    assert trained is not None
    with stopping_with(f"interrupted while round {now.number} was judged; its training is complete, and the same command goes on"):

        def judged(run: Path) -> Losses:
            model, tokenizer = load(run, say)
            return losses(model, tokenizer, rounds.old_held_out(), now.held_out_text, config.train.seq_len, rounds.out / "held_out_tokens")

        before, after = None if previous is None else judged(previous), judged(now.run)
    accepted, reason = verdict(before, after, settings.tolerance)
    return RoundRow(
        round=now.number,
        documents=now.documents,
        bytes=now.bytes,
        held_out=now.held_out,
        replayed_bytes=now.replayed_bytes,
        sources=now.sources,
        accepted=accepted,
        reason=reason,
        steps=trained.result.step,
        old_before=_known(before.old if before else None),
        old_after=_known(after.old),
        new_before=_known(before.new if before else None),
        new_after=_known(after.new),
        seconds=round(time.monotonic() - began, 1),
    )


def round_config(config: TrainConfig, now: Round, previous: Path | None) -> TrainConfig:
    """The settings of a round's run: those that were given, on the round's text, from the model of the last round that was kept."""
    values: Mapping[str, Any] = config.flat()
    sources = dict(config.sources)
    changed: dict[str, Any] = {"data.path": str(now.text.resolve())}
    if config.data.val_fraction is None:
        changed["data.val_fraction"] = VAL_SHARE
    if previous is not None:
        dropped = [key for key in values if key.startswith("model.") or key in _OF_THE_MODEL]
        values = {key: value for key, value in values.items() if key not in dropped}
        sources = {key: source for key, source in sources.items() if key not in dropped}
        changed["finetune.start_from"] = str(previous.resolve())
    told = f"round {now.number}"
    return TrainConfig(sources={**sources, **dict.fromkeys(changed, told)}, **{**values, **changed})


def _known(loss: float | None) -> float | None:
    return None if loss is None or math.isnan(loss) else loss


def _told(row: RoundRow) -> str:
    return f"round {row.round} {'kept' if row.accepted else 'undone'}: {row.reason}"
