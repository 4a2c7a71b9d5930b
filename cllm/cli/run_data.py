"""Which packed tokens a command learns from: those of the run that it goes on with, or freshly prepared ones. Prints what it found."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.cli.console import Console
from cllm.cli.run_name import same_place
from cllm.config.schema import SETTINGS
from cllm.files import RUN, write_file
from cllm.monitor.guards import RunLock
from cllm.runtime import files, progress
from cllm.runtime.errors import CLLMError, DataError, UserError
from cllm.runtime.printable import printable
from cllm.shell import command
from cllm.train.run_folder import StoredRun, identity, own_tokens, packed_folders, prune_tokens, stored_run
from cllm.train.run_place import CONFIG, DATA, holds_run

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.data import Dataset
    from cllm.data.tokens.tokenizer import Tokenizer

# Settings that packed tokens depend on; these two say what batches are made of them.
_PACKING = tuple(key for key, each in SETTINGS.items() if key.startswith("data.") and each.result and each.name not in ("document_mask", "shuffle"))
_CACHES = ("sources.json", "sources.bin", "tokenizer.json", "tokenizer_config.json", "training.json")


def prepare_data(config: TrainConfig, folder: Path, console: Console, tokenizer: Tokenizer | None, *, run: Path | None = None) -> Dataset:
    """Packs the data of a configuration into `folder`, beside what is there; `run` is never part of the data."""
    from cllm.data.documents.scan import Reading
    from cllm.data.pipeline import prepare
    from cllm.data.tokens.chat import is_chat, prepare_chat
    from cllm.data.tokens.conversations import NO_FIM

    settings, exclude = config.data, _excluded(config, run)
    reading = Reading.of(settings.text_field, settings.separator, settings.encoding)
    if not settings.text_field and is_chat(settings.path):
        if tokenizer is None:
            raise UserError(
                f"{settings.path} holds chats, which teach a trained model to answer. Give the model with --from. "
                "To learn one field of them as plain text instead, name it: --set data.text_field=NAME."
            )
        if settings.fim_rate:
            raise UserError(NO_FIM)
        return prepare_chat(
            settings.path, folder, tokenizer, settings.val_fraction, exclude=exclude, keep_others=True, encoding=reading.encoding, log=console.print
        )
    return prepare(
        settings.path,
        folder,
        tokenizer=tokenizer or settings.tokenizer,
        vocab_size=settings.vocab_size,
        sample_bytes=1_000_000 * settings.tokenizer_sample,
        val_fraction=settings.val_fraction,
        exclude=exclude,
        reading=reading,
        fim=settings.fim_rate > 0,
        keep_others=True,
        log=console.print,
    )


def data_of_new_run(config: TrainConfig, out: Path, lock: RunLock, console: Console, tokenizer: Tokenizer | None) -> Dataset:
    """Packs the data of a run that begins. From here on the folder says whose it is, so that also a run that is killed now is found again."""
    lock.sign()
    write_file(out / CONFIG, config.to_toml().encode(), RUN)
    try:
        dataset = prepare_data(config, out / DATA, console, tokenizer, run=out)
    except BaseException:
        if lock.made_folder and not (out / DATA).exists():  # there was no text: nothing of the run is left
            (out / CONFIG).unlink(missing_ok=True)
        raise
    prune_tokens(out, dataset.folder)
    return dataset


def data_of_run(stored: StoredRun, config: TrainConfig, console: Console) -> Dataset:
    """The tokens that a run began with, wherever its text is by now; says so where the text has changed.

    Raises UserError where the command names other data, DataError where the tokens are missing and the text does not give them again.
    """
    check_same_data(stored, config, console)
    try:
        dataset = own_tokens(stored)
    except DataError as missing:
        return _packed_again(stored, config, console, missing)
    _tell(stored, dataset, console)
    _tell_of_changes(stored, config, dataset, console)
    return dataset


@contextmanager
def data_for_a_look(config: TrainConfig, out: Path, console: Console, tokenizer: Tokenizer | None) -> Iterator[Dataset]:
    """The tokens for `--plan` and `--find-lr`, which write nothing into a run.

    They are the run's own where it learns from the same data. Otherwise they are packed in a temporary folder, or, where there is no run yet, in
    the folder of the run to come, which then finds them there.
    """
    dataset = _own_for_a_look(config, stored_run(out), console, tokenizer) or _packed_ahead(config, out, console, tokenizer)
    if dataset is not None:
        yield dataset
        return
    with tempfile.TemporaryDirectory(prefix="cllm-look-") as scratch:
        place = Path(scratch)
        for name in _CACHES:
            if (out / DATA / name).is_file():
                shutil.copy(out / DATA / name, place / name)
        for folder in packed_folders(out):  # what fits is found through these links, and never written to: another key is another name
            (place / folder.name).symlink_to(folder.resolve(), target_is_directory=True)
        yield prepare_data(config, place, console, tokenizer, run=out)


def _own_for_a_look(config: TrainConfig, stored: StoredRun | None, console: Console, tokenizer: Tokenizer | None) -> Dataset | None:
    """The tokens of the run in the folder, where the command means these."""
    if stored is None or any(config.adopt(stored.config)[key] != stored.config[key] for key in _PACKING):
        return None
    try:
        check_same_data(stored, config, console)
        dataset = own_tokens(stored)
    except CLLMError as error:
        console.print(f"A training there would be refused: {error}")
        return None
    if tokenizer is not None and tokenizer.hash != stored.tokenizer_hash:
        return None
    _tell(stored, dataset, console)
    _tell_of_changes(stored, config, dataset, console)
    return dataset


def _packed_ahead(config: TrainConfig, out: Path, console: Console, tokenizer: Tokenizer | None) -> Dataset | None:
    """The tokens in the folder of a run to come; None where there is a run, or one is just about to begin."""
    if holds_run(out):
        return None
    with ExitStack() as held:
        try:
            held.enter_context(RunLock(out))
        except CLLMError:
            return None
        return prepare_data(config, out / DATA, console, tokenizer, run=out)


def check_same_data(stored: StoredRun, config: TrainConfig, console: Console) -> None:
    """UserError where a command names other data than the run learns from; the same text may have moved."""
    here, there = config.data.path, stored.config.data.path
    if same_place(here, there):
        return
    if _same_text(stored, here, config):
        console.print(f"{printable(here)} holds the text that {stored.out} learns from, which was in {printable(there)}.")
        return
    raise UserError(
        f"{stored.out} learns from {there}, and this command names {here}, which is other data. "
        f"To train on it from nothing: {command('train', Path(here), '--out', 'NEW')}. "
        f"To teach it to the model of that run: {_taught(here, stored)}."
    )


def _packed_again(stored: StoredRun, config: TrainConfig, console: Console, missing: DataError) -> Dataset:
    """The tokens of a run that has lost them, from its text where that still gives the same; otherwise `missing`, and why not."""
    from cllm.data import Dataset
    from cllm.data.tokens.tokenizer import Tokenizer

    console.print(f"{missing} Packing the text again.")
    data = stored.out / DATA
    # A folder inside the run: what fits is only renamed. The run's lock is held, so what is there already was left by a process that was killed.
    for leftover in data.glob(".again-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    data.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".again-", dir=data))
    try:
        tokenizer = Tokenizer.load(stored.out / "tokenizer.json")
        dataset = prepare_data(config, place, console, tokenizer, run=stored.out)
        if identity(dataset) != stored.data:
            raise DataError("it gives other tokens than then, because the text, its place or the way it is read has changed.")
        if not dataset.folder.is_relative_to(place):  # the data is packed tokens elsewhere, which were put back meanwhile
            return dataset
        target = data / dataset.folder.name
        if target.exists():  # damaged
            files.remove_folder(target)
        os.rename(dataset.folder, target)
        for name in _CACHES:
            if (place / name).is_file() and not (data / name).exists():
                os.rename(place / name, data / name)
        return Dataset.open(target)
    except CLLMError as error:
        raise DataError(
            f"{missing} {config.data.path} does not give them again: {error} "
            f"Put back either of them, or begin a new run with the weights of this one: {_taught(config.data.path, stored)}."
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if not any(data.iterdir()):
            data.rmdir()


def _tell(stored: StoredRun, dataset: Dataset, console: Console) -> None:
    from cllm.data.tokens.dataset import left_out_briefly, token_words

    console.print(f"tokens: {token_words(dataset.train, dataset.val)}, as {stored.out} began with them (cached)")
    briefly = left_out_briefly(dataset.info)
    if briefly:
        console.print(f"  {briefly}")


def _tell_of_changes(stored: StoredRun, config: TrainConfig, dataset: Dataset, console: Console) -> None:
    """One line where the text is not any more what the tokens were made from."""
    from cllm.data import is_packed

    path = config.data.path
    if is_packed(path):
        return
    if not os.path.exists(path):
        console.print(f"the text in {printable(path)} is not there any more; the run goes on with the tokens it began with")
    elif _same_text(stored, path, config, dataset) is False:
        console.print(
            f"the text in {printable(path)} has changed since this run began; it goes on with the tokens it began with. "
            f"To learn the new text: {_taught(path, stored)}"
        )


def _same_text(stored: StoredRun, path: str, config: TrainConfig, dataset: Dataset | None = None) -> bool | None:
    """Whether the text at `path`, read as the settings say, is what a run learns from; None where it cannot be told."""
    from cllm.data import is_packed
    from cllm.data.documents.changes import same_text
    from cllm.data.documents.scan import Reading
    from cllm.data.tokens.chat import chat_key, is_chat

    try:
        if is_packed(path):
            from cllm.data import Dataset

            return identity(Dataset.open(path)) == stored.data
        dataset = dataset or own_tokens(stored)
        reading = Reading.of(config.data.text_field, config.data.separator, config.data.encoding)
        if dataset.info.get("kind") == "chat":
            if reading.text_field or not is_chat(path):
                return False
            excluded, info = _excluded(config, stored.out), dataset.info
            return chat_key(path, dataset.tokenizer, info["val_fraction"], excluded, reading.encoding) == info["key"]
        with progress.stage(f"comparing the text in {printable(path)} with that of the run"):
            return same_text(path, stored.out / DATA, _excluded(config, stored.out), reading)
    except (CLLMError, OSError):
        return None


def _taught(data: str, stored: StoredRun) -> str:
    """The command that teaches text to the model of a run, as a run of its own."""
    return command("train", Path(data), "--from", stored.out, "--out", "NEW")


def _excluded(config: TrainConfig, run: Path | None) -> list[Path]:
    names = [part.strip() for part in config.data.exclude.split(",") if part.strip()]
    return [*(Path(config.data.path) / name for name in names), *([] if run is None else [run])]
