"""Whether the text that a model is evaluated on is the text that it was trained on, which its run's folder knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.checkpoint.place import CHECKPOINTS
from cllm.cli.run_name import same_place
from cllm.runtime.errors import CLLMError
from cllm.train.run_folder import StoredRun, identity, own_tokens, stored_run
from cllm.train.run_place import DATA

if TYPE_CHECKING:
    from cllm.data.documents.scan import Reading
    from cllm.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainedOn:
    """`files` of the `of` files that are evaluated hold text that the model of the run in `out` was trained on."""

    files: int
    of: int
    out: Path

    def __str__(self) -> str:
        what = "This is text" if self.files == self.of else f"{self.files:,} of these {self.of:,} files {'holds' if self.files == 1 else 'hold'} text"
        return (
            f"{what} that {self.out} was trained on: the figures tell how well the model remembers it, not how well it predicts other text."
            f"{_validation(self.out)}"
        )


def run_of(checkpoint: str) -> StoredRun | None:
    """The run that a checkpoint belongs to, by its folder; None for a model that stands alone."""
    path = Path(checkpoint).resolve()
    out = path if (path / CHECKPOINTS).is_dir() else path.parent.parent if path.parent.name == CHECKPOINTS else None
    try:
        return None if out is None else stored_run(out)
    except CLLMError:
        return None


def trained_on(checkpoint: str, data: str, scratch: Path, tokenizer: Tokenizer, reading: Reading) -> TrainedOn | None:
    """What of the text at `data` the model was trained on; None for nothing, or where it cannot be told. scratch: where the text was prepared.

    Copies count, wherever they lie: contents are compared by their digests. Other fields of the same records are other text. reading: how the
    text was read there.
    """
    from cllm.data import is_packed
    from cllm.data.documents.changes import texts_of
    from cllm.data.tokens.chat import is_chat

    stored = run_of(checkpoint)
    if stored is None:
        return None
    out = stored.out if Path(checkpoint).is_absolute() else _shown(stored.out)
    if is_packed(data):
        return TrainedOn(1, 1, out) if _is_training_split(data, stored) else None
    same_file = same_place(data, stored.config.data.path) and stored.config.data.text_field == reading.text_field
    if not reading.text_field and is_chat(data):
        return TrainedOn(1, 1, out) if same_file or _is_same_chat(data, stored, tokenizer, reading.encoding) else None
    own, here = texts_of(stored.out / DATA), texts_of(scratch)
    if own:
        return TrainedOn(len(own & here), len(here), out) if own & here else None
    return TrainedOn(len(here), len(here), out) if same_file else None


def _is_training_split(data: str, stored: StoredRun) -> bool:
    """Whether packed tokens are the run's own and have no validation part, which would be evaluated instead."""
    from cllm.data import Dataset

    dataset = Dataset.open(data)
    return dataset.val.num_tokens <= 1 and identity(dataset) == stored.data


def _is_same_chat(data: str, stored: StoredRun, tokenizer: Tokenizer, encoding: str) -> bool:
    from cllm.data.tokens.chat import chat_key
    from cllm.data.tokens.chat_template import with_template

    try:
        info = own_tokens(stored).info
        return info.get("kind") == "chat" and chat_key(data, with_template(tokenizer), info["val_fraction"], encoding=encoding) == info["key"]
    except (CLLMError, OSError, KeyError):
        return False


def _validation(out: Path) -> str:
    """The loss on what the run kept out of its training, as a sentence; nothing where it kept nothing."""
    from cllm.monitor.metrics import read_metrics

    try:
        rows = [row for row in read_metrics(out / "metrics.jsonl") if row.get("kind") == "eval"]
        return f" On the part kept for validation its loss was {rows[-1]['loss']:.4f} nats per token (step {rows[-1]['step']:,})." if rows else ""
    except (OSError, KeyError, TypeError, ValueError):
        return ""


def _shown(path: Path) -> Path:
    """Relative where it lies below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
