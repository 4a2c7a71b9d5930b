"""Which tasks are done. A task is a pure function of small arguments and of finished files, and it is done when its marker says so.

    .ledger/STAGE/000012.json       {"key", "files", "result"}: written after the files of the task are complete
    .ledger/STAGE/000012.*          those files

The key is a digest of everything that the result depends on: the version of the stage's code, the settings that it reads, and the digests of the
files that it reads. A marker of another key, or whose files are missing or of another size, counts for nothing, and the task is run again. Whatever
moment the program is killed at, what has a marker is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cllm.data.preparation.rows import digest_of
from cllm.files import DATA, reported, write_file
from cllm.runtime.errors import DataError
from cllm.runtime.progress import Progress
from cllm.runtime.quantities import size

FOLDER = ".ledger"


Heard = Callable[[int, float], None]


def unheard(number: int, done: float) -> None:
    """For those who do not ask how far a task is."""


class Runner(Protocol):
    """Runs tasks somewhere. The results come in any order, with the number of the arguments; a task whose worker died is run again.

    heard: is told by runners that know it how much of the weight of a task is done while it runs.
    """

    def run(self, function: str, arguments: Sequence[dict[str, Any]], heard: Heard = unheard) -> Iterator[tuple[int, dict[str, Any]]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Task:
    number: int
    arguments: dict[str, Any]
    """What the function gets beside `place`: small values that JSON can hold."""
    depends_on: Any
    """Settings and digests: everything but the stage's code that the result depends on."""
    weight: float = 1.0
    """Its share of the work, for the time left."""


@dataclass(frozen=True)
class Done:
    """A finished task: what it told, and where its files are."""

    place: str
    """The path of its files without their endings."""
    files: dict[str, list[Any]]
    """Ending -> [bytes, digest]."""
    result: dict[str, Any]
    was_known: bool = False
    """Whether an earlier run had done it."""

    @property
    def digest(self) -> str:
        """Of its files."""
        return digest_of(self.files)

    def path(self, ending: str) -> str:
        return self.place + ending


class Ledger:
    """The finished tasks of one folder of results. Only one program at a time may hold it (`held`)."""

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER

    @contextmanager
    def held(self) -> Iterator[None]:
        """DataError where another process prepares the same folder. The lock ends with the process, however it ends."""
        with reported(self.folder, DATA):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise DataError(f"another process prepares {self.folder.parent} right now. Wait for it, or choose another folder with --out.") from None
        try:
            yield
        finally:
            os.close(handle)

    def stage(
        self,
        name: str,
        label: str,
        function: str,
        version: int,
        tasks: Sequence[Task],
        runner: Runner,
        unit: str = "",
        intact: Callable[[Task, Done], bool] = lambda task, done: True,
    ) -> list[Done]:
        """The results of all tasks, in their order. Those that an earlier run has finished are not run again.

        function: "module:name" of a function that takes `place` and the task's arguments and returns {"files": {ending: facts}, ...}.
        unit: what the weights of tasks are, for the progress line: "bytes" or a noun. intact: whether what a known task has written outside of the
        ledger is still there.
        """
        keys = [digest_of([name, version, task.depends_on]) for task in tasks]
        done = [known if known and intact(task, known) else None for task, key in zip(tasks, keys) for known in [self._known(name, task.number, key)]]
        todo = [n for n, known in enumerate(done) if known is None]
        if todo:
            total, so_far = sum(task.weight for task in tasks), sum(task.weight for task, known in zip(tasks, done) if known)
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            with Progress(total, label, initial=so_far, unit=unit) as bar:
                arguments = [{"place": self._place(name, tasks[n].number), **tasks[n].arguments} for n in todo]
                begun: dict[int, float] = {}  # how much is done of tasks that run

                def show() -> None:
                    far = so_far + sum(begun.values())
                    bar.update(far, _figures(far, total, unit))

                def heard(place: int, weight: float) -> None:
                    begun[place] = min(weight, tasks[todo[place]].weight)
                    show()

                for place, result in runner.run(function, arguments, heard):
                    number = todo[place]
                    done[number] = self._finish(name, tasks[number].number, keys[number], result)
                    so_far += tasks[number].weight
                    begun.pop(place, None)
                    show()
        return [each_done for each_done in done if each_done is not None]

    def tidy(self, name: str, numbers: set[int], mine: Callable[[int], bool] = lambda number: True) -> None:
        """Removes the files of tasks that are part of this stage no longer. mine: which of those that this run does not have may go."""
        folder = self.folder / name
        for entry in sorted(os.listdir(folder)) if folder.is_dir() else ():
            number = entry.partition(".")[0]
            if number.isdigit() and int(number) not in numbers and mine(int(number)):
                (folder / entry).unlink(missing_ok=True)

    def _place(self, name: str, number: int) -> str:
        return str(self.folder / name / f"{number:06d}")

    def _known(self, name: str, number: int, key: str) -> Done | None:
        place = self._place(name, number)
        try:
            marker = json.loads(Path(place + ".json").read_text("utf-8"))
            if marker["key"] != key or any(os.path.getsize(place + ending) != facts[0] for ending, facts in marker["files"].items()):
                return None
            return Done(place, marker["files"], marker["result"], was_known=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # never done, or damaged

    def _finish(self, name: str, number: int, key: str, result: dict[str, Any]) -> Done:
        place, files = self._place(name, number), result.pop("files")
        write_file(place + ".json", json.dumps({"key": key, "files": files, "result": result}).encode("utf-8"), DATA)
        return Done(place, files, result)


def _figures(done: float, total: float, unit: str) -> str:
    return f"{size(round(done))} of {size(round(total))}" if unit == "bytes" else f"{done:,.0f} of {total:,.0f} {unit}".rstrip()


def tree(stage: Callable[[int, list[tuple[int, list[Done]]]], list[Done]], done: list[Done], fan_in: int = 8) -> Done | None:
    """Merges files in groups, and the merged ones again, until one is left: `stage(level, [(number, inputs), ...])` merges those of a level."""
    level = 0
    while len(done) > 1 or (done and level == 0):
        level += 1
        groups = [done[start : start + fan_in] for start in range(0, len(done), fan_in)]
        done = stage(level, list(enumerate(groups)))
    return done[0] if done else None
