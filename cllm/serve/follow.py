"""Serving beside a training: when the run names a better checkpoint, new requests are answered by it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.checkpoint.place import CHECKPOINTS
from cllm.checkpoint.store import CheckpointStore
from cllm.runtime.errors import CLLMError, UserError

if TYPE_CHECKING:
    from cllm.serve.served import Served
    from cllm.serve.service import Service

SECONDS = 2.0  # between two looks at the run


def newest(run: str | Path) -> Path | None:
    """The checkpoint that a run calls its best, before its first evaluation the latest; None where it has none. UserError for what is no run."""
    folder = Path(run) / CHECKPOINTS
    if not folder.is_dir():
        raise UserError(
            f"--follow {run} is no run: it has no folder {CHECKPOINTS}. Give the folder that cllm train writes, once it has a checkpoint."
        )
    store = CheckpointStore(folder)
    best = store.best()
    step = store.latest() if best is None else best
    return None if step is None else store.path(step)


class Follower:
    """Looks at a run in a thread of its own, and gives the service what is better than what it has.

    begun: the checkpoint that is served so far; load(id, path) makes a model ready; tell: takes a line for whoever watches.
    """

    def __init__(
        self, run: Path, identity: str, begun: Path | None, load: Callable[[str, str], Served], service: Service, tell: Callable[[str], None]
    ) -> None:
        self._run, self._identity, self._has, self._load, self._service, self._tell = run, identity, begun, load, service, tell
        self._ends = threading.Event()
        self._complaint = ""
        self._thread = threading.Thread(target=self._watch, name="cllm-follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ends.set()

    def _watch(self) -> None:
        while not self._ends.wait(SECONDS):
            try:
                self.look()
            except (CLLMError, OSError, RuntimeError, MemoryError) as error:  # what is served stays; the run may have dropped what was to be read
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    self._tell(f"{self._identity} is served as it was: {error}")

    def look(self) -> bool:
        """Takes the better checkpoint where there is one; whether there was."""
        found = newest(self._run)
        if found is None or found == self._has:
            return False
        new = self._load(self._identity, str(found))
        self._service.replace(new)
        self._has = found
        self._tell(f"{self._identity}: new requests are answered by {found.name}.")
        return True
