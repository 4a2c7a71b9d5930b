"""Where the parts of a run lie, and the places that its settings name. Nothing is read here and no library imported, so mistakes are told at once."""

import os
from pathlib import Path

from cllm.checkpoint.place import CHECKPOINTS
from cllm.config.train import TrainConfig
from cllm.runtime.errors import UserError
from cllm.runtime.printable import printable

CONFIG, DATA = "config.toml", "data"
PLACES = ("data.path", "finetune.start_from", "data.tokenizer")  # settings that are, or may be, places on the disk


def holds_run(out: Path) -> bool:
    """Whether a run lives in this folder, trained or only begun."""
    return (out / CONFIG).is_file() or (out / CHECKPOINTS).is_dir()


def absolute_places(config: TrainConfig) -> TrainConfig:
    """The settings with their places as absolute paths, so that the run can be continued from any folder.

    A relative place that does not exist is left alone where it comes from a file: a run of an older version may have begun in another folder.
    """
    from cllm.data.tokens.tokenizer import KINDS

    for key in PLACES:
        value, named = config[key], key == "data.path" and config.sources[key] == "DATA"
        if value and value not in KINDS and (named or os.path.exists(value)):
            if any(0xD800 <= ord(each) < 0xE000 for each in os.path.abspath(value)):
                raise UserError(f"{printable(value)}: the name is not UTF-8, so no configuration file can hold it. Rename it, or give a link to it.")
            config = config.replace(config.sources[key], **{key: os.path.abspath(value)})
    return config
