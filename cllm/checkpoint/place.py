"""What kind of thing holds a model at a path. This reads nine bytes at most and imports no library, so a wrong name is answered at once."""

from __future__ import annotations

from pathlib import Path

from cllm.files import foreign, reason
from cllm.runtime.errors import CheckpointError

MANIFEST = "manifest.json"  # of a checkpoint folder
CHECKPOINTS = "checkpoints"  # the folder of them in a run
HUGGING_FACE = "config.json"
NOT_A_CHECKPOINT = "Expected a run folder, a checkpoint folder, a .cllm file or a Hugging Face folder."


def kind_of(path: Path) -> str:
    """What holds the model at `path`: "file", "checkpoint", "run" or "hugging face".

    Raises CheckpointError for everything else, also for a file that is clearly no safetensors file.
    """
    try:
        if path.is_file():
            _check_header(path)
            return "file"
        if (path / MANIFEST).is_file():
            return "checkpoint"
        if (path / CHECKPOINTS).is_dir():
            return "run"
        if (path / HUGGING_FACE).is_file():
            return "hugging face"
        what = "is not a checkpoint" if path.exists() else "does not exist"
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}.") from error
    raise CheckpointError(f"{path} {what}. {NOT_A_CHECKPOINT}")


def unreadable(path: Path, why: str) -> CheckpointError:
    """The error for a file that is not a safetensors file. It says what the file is where that can be told, otherwise `why` it is none."""
    what = foreign(path, text=False)
    if what is not None:
        return CheckpointError(f"{path} {what}" + (f" {NOT_A_CHECKPOINT}" if what.endswith("text file.") else ""))
    return CheckpointError(f"{path} is not a readable safetensors file ({why}). {NOT_A_CHECKPOINT}")


def _check_header(path: Path) -> None:
    """A safetensors file begins with the length of its header in eight bytes and the header, a JSON object."""
    with open(path, "rb") as file:
        start = file.read(9)
    if len(start) < 9 or start[8:] != b"{" or int.from_bytes(start[:8], "little") > path.stat().st_size - 8:
        raise unreadable(path, "it has no header")
