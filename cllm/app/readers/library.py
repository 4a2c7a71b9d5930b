"""Everything that is read of one workspace, with what is remembered of it: one object for all routes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cllm.app.live import changes
from cllm.app.readers.crawls import Crawls
from cllm.app.readers.datasets import Datasets
from cllm.app.readers.inventory import FOLLOWED, Inventory
from cllm.app.readers.models import Models
from cllm.app.readers.runs import Job, Runs
from cllm.app.readers.series import Shelf
from cllm.app.readers.trash import Trash
from cllm.app.state import App
from cllm.app.talk import Talk
from cllm.monitor.guards import trained_by
from cllm.runtime.errors import CLLMError
from cllm.serve.errors import Refused

_CRAWL_SECONDS = 2.0  # between two looks at a crawl's database


class Library:
    """Of an app. Its lists may be asked for from any thread."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.root = app.workspace.root
        self.inventory = Inventory(self.root)
        self.shelf = Shelf()
        self.trash = Trash(app.workspace.state / "trash", self.root)
        self._runs = Runs(self.root, self.inventory)
        self._models = Models(self.root, self.inventory)
        self._datasets = Datasets(self.root, self.inventory)
        self._crawls = Crawls(self.root, self.inventory)
        self._lock = threading.Lock()
        app.state_of_run = self.state_of_run
        app.live.watch("runs", self.shown_of_runs)
        app.live.register("crawl", self.crawl_source)

    def runs(self) -> list[dict[str, Any]]:
        with self._lock:
            return self._runs.list(self._jobs())

    def run(self, text: object) -> tuple[Path, dict[str, Any]]:
        """The folder and the entry of the run that a request names. Raises Refused (400, 404)."""
        place = self.app.workspace.resolve(text, "run", exists=True)
        path = self.app.workspace.relative(place)
        with self._lock:
            entry = self._runs.entry(path, place, self._jobs().get(path)) if place != self.root and place.is_dir() else None
        if entry is None:
            raise Refused(404, f"{path} holds no run. Choose one of the list.", param="run", code="not_found")
        return place, entry

    def models(self) -> list[dict[str, Any]]:
        with self._lock:
            found = self._models.list(self._runs.list(self._jobs()))
        return [self._as_tried(each) for each in found]

    def model(self, text: object) -> tuple[Path, dict[str, Any]]:
        """The place and the entry of the model that a request names. Raises Refused (400, 404), CheckpointError for what is none."""
        place = self.app.workspace.resolve(text, "path", exists=True)
        path = self.app.workspace.relative(place)
        with self._lock:
            run = self._runs.entry(path, place, None) if place.is_dir() and place != self.root else None
            return place, self._as_tried(self._models.entry(path, place, run if run is not None and run["kind"] != FOLLOWED else None))

    def _as_tried(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A model as its list shows it, or as damaged where that showed when somebody wanted to talk to it."""
        fault = self.app.part(Talk).fault(entry["path"]) if entry["loadable"] else None
        return entry if fault is None else entry | {"damaged": fault, "loadable": False}

    def datasets(self) -> list[dict[str, Any]]:
        with self._lock:
            return self._datasets.list()

    def crawls(self) -> list[dict[str, Any]]:
        with self._lock:
            return self._crawls.list(self._jobs("crawl"))

    def followers(self) -> dict[str, str]:
        """Of each place of text, below the workspace, the training in rounds that follows it."""
        with self._lock:
            return self._runs.followed()

    def job_of(self, path: str, command: str = "train") -> Job | None:
        return self._jobs(command).get(path)

    def busy(self, place: Path) -> str | None:
        """Why a file or folder may not be moved away now, as words that follow its name; None where it may. A model that nobody is talking to is
        let go of."""
        for folder in [place, *(each.place for each in self.inventory.look("run", FOLLOWED) if each.place.is_relative_to(place))]:
            holder = trained_by(folder)
            if holder is not None:
                return f"is being trained by {holder}. Stop that first"
        return None if self.app.part(Talk).let_go(place) else "is answering somebody. Wait for the answer, or stop it"

    def _jobs(self, command: str = "train") -> Mapping[str, Job]:
        """The newest job of each run or crawl, by its path."""
        mine = (each for each in reversed(self.app.jobs.listed()) if each["command"] == command)
        return {path: each for each in mine if (path := each["run" if command == "train" else "out"])}

    # -- for whoever listens ---------------------------------------------------------------------------------------------

    def state_of_run(self, run: str) -> str | None:
        try:
            return self.run(run)[1]["state"]
        except (CLLMError, OSError):
            return None

    def shown_of_runs(self) -> Any:
        """What a list of runs shows beside figures that change all the time."""
        shown = ("run", "state", "job", "steps", "parameters", "rounds", "damaged")
        return [tuple(each[name] for name in shown) for each in self.runs()]

    def crawl_source(self, path: str) -> Callable[[], Iterable[Any]]:
        """The figures of a crawl while it goes on; nothing before it has begun. Raises Refused for a place outside the workspace."""
        place = self.app.workspace.resolve(path, "topics")
        found = self.app.workspace.relative(place)
        before: tuple[float, int] | None = None

        def look() -> dict[str, Any]:
            nonlocal before
            if not place.is_dir():
                return {}
            with self._lock:
                figures = self._crawls.entry(found, place, self._jobs("crawl").get(found))
            pages, now = figures["pages"] or 0, time.monotonic()
            rate = None if before is None or now == before[0] else max(0, pages - before[1]) / (now - before[0])
            before = (now, pages)
            return figures | {"failed": figures["errors"], "pages_per_second": rate}

        return changes(look, _CRAWL_SECONDS, lambda now: {"kind": "crawl", **now})
