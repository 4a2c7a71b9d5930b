"""The folder of a training that follows text which grows, as far as its readers need to know it."""

import json
from pathlib import Path

from cllm.monitor.records import RoundRow
from cllm.runtime.errors import CheckpointError

ROWS = "rounds.jsonl"
MODEL = "model"  # a link to the run of the last round that was kept


def read_rounds(out: Path) -> list[RoundRow]:
    """The rounds that have ended in a folder, the first one first. Raises CheckpointError for a damaged file."""
    try:
        lines = (out / ROWS).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    try:
        return [RoundRow.from_dict(json.loads(line)) for line in lines]
    except ValueError as error:
        raise CheckpointError(f"{out / ROWS} is damaged ({error}). Put back a copy of it, or follow the text in a new folder with --out.") from None
