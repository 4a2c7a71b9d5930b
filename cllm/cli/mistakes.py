"""What a wrong command line, and an error of the operating system, is told: one line each."""

from __future__ import annotations

import difflib
import errno
from typing import Any

from cllm.cli.options import WrongValue
from cllm.config.schema import SETTINGS, nearest_key
from cllm.runtime.errors import CLLMError, DataError, UserError, is_out_of_memory


def wrong_usage(error: Any) -> UserError:
    """A mistake that the parser of the command line found, as one line that ends with where to read on."""
    if isinstance(error, WrongValue):
        return UserError(error.message)
    context = error.ctx
    words = _unknown_option(error.option_name, context) if type(error).__name__ == "NoSuchOption" else error.format_message()
    words = " ".join(words.split())
    end = "" if words.endswith((".", "?")) else "."
    where = f" See {context.command_path} --help." if context is not None else ""
    return UserError(f"{words[:1].lower()}{words[1:]}{end}{where}")


def _unknown_option(name: str, context: Any) -> str:
    """The option that is meant. Where a command takes settings, also those that have no flag, and what other trainers call them."""
    known = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    words = f"there is no option {name}"
    if SETTINGS["optim.learning_rate"].option in known and len(name) > 2:
        key = nearest_key(name.removeprefix("--"))
        if key is not None:
            option = SETTINGS[key].option
            return f"{words}. Did you mean {option if option in known else f'--set {key}=VALUE'}?"
    near = difflib.get_close_matches(name, known, n=1)
    return f"{words}. Did you mean {near[0]}?" if near else words


def out_of_memory(error: BaseException) -> CLLMError | None:
    """What to do when the memory does not suffice; None for another error."""
    if not is_out_of_memory(error):
        return None
    return CLLMError("out of memory. Use a smaller model or a smaller batch, let other programs end, or take a machine with more memory.")


def system_error(error: OSError) -> CLLMError:
    """A file or disk that could not be used."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"the disk is full{where}. Free some space and run the same command again; nothing that was complete is lost.")
    return DataError(f"{(error.strerror or str(error)).lower()}{where}.")
