"""What kind of thing holds a model at a path. This reads nine bytes at most and imports no library, so a wrong name is answered at once."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from cllm.files import foreign, reason
from cllm.runtime.errors import CheckpointError
from cllm.shell import command

MANIFEST = "manifest.json"  # of a checkpoint folder
CHECKPOINTS = "checkpoints"  # the folder of them in a run
HUGGING_FACE = "config.json"
_STEP = re.compile("step-[0-9]{1,15}")
SAMPLE = "sample"  # the name of the small model that comes with CLLM
SAMPLE_FILE = Path(__file__).with_name("sample.cllm")
NOT_A_CHECKPOINT = "Expected a run folder, a checkpoint folder, a .cllm file or a Hugging Face folder."


def place_of(name: str | Path) -> Path:
    """Where the model of a name lies: at that path, or of "sample" within the package, unless something here, or a run, has that name."""
    path = Path(name)
    own = path != Path(SAMPLE) or os.path.lexists(path) or os.path.lexists(Path("runs") / path)
    return path if own else SAMPLE_FILE


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
        begun = (path / "config.toml").is_file()
        what = "has no checkpoint yet" if begun else "is not a checkpoint" if path.exists() else "does not exist"
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}.") from error
    again = f"It is a run that has begun; go on with it: {command('train', '--resume', '--out', path)}"
    raise CheckpointError(f"{path} {what}. {again if begun else NOT_A_CHECKPOINT}")


def steps_in(folder: Path) -> list[int]:
    """The steps that have a checkpoint folder below `folder`, in rising order. Whether a checkpoint is good shows only when it is read."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name[5:]) for name in names if _STEP.fullmatch(name))


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step, whether it exists or not."""
    return folder / f"step-{step:08d}"


def named_step(folder: Path, name: str) -> int | None:
    """The step that `latest` or `best` below `folder` names; None where there is no such file or it names none."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / name).read_text().strip().removeprefix("step-"))
    return None


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
