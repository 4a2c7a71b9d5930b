"""Whether this process is one of several, and which. Imports nothing of torch, so that a process that trains alone may ask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.distributed.world import World

_current: World | None = None


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same environment variables, started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def environment_number(name: str, default: int | None = None) -> int:
    """The whole number that an environment variable of the launcher holds, or `default` where it is not set. UserError for anything else."""
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} must be a whole number, got {text!r}. Start the processes with torchrun.") from None


def current() -> World | None:
    """The processes of this run while a `session` is open; None in a process that trains alone."""
    return _current


@contextmanager
def entered(world: World) -> Iterator[None]:
    """While entered, `current` returns `world`."""
    global _current
    _current = world
    try:
        yield
    finally:
        _current = None
