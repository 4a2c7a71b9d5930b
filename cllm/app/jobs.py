"""The jobs: what was asked for, what runs, what has ended. The app may end at any moment: a later one finds them as they are.

One thread looks after the processes. Trainings of one device run one after another, everything else at once; each GPU is a device.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cllm.app import process
from cllm.app.commands import PAUSABLE, Asked
from cllm.app.job_store import ACTIVE, ENDED, Job, JobStore
from cllm.app.log import Log
from cllm.app.process import Files
from cllm.runtime.errors import CLLMError, UserError
from cllm.runtime.nvml import visible_gpus
from cllm.serve.errors import Refused

_LOOK = 0.2  # seconds between two looks at the processes
_PATIENCE = 10.0  # seconds after which a second "stop" ends a process that does not answer
_INTERRUPTED = 130  # what a command ends with that was asked to stop and has
_MOST_WAITING, _MOST_RUNNING, _MOST_KEPT = 100, 32, 300


class Jobs:
    """root: where processes run. state: the app's own folder. gpus: the names of those that there are. version: another number whenever the list is
    another one."""

    def __init__(self, root: Path, state: Path, log: Log, gpus: Callable[[], list[str]] = visible_gpus) -> None:
        """Takes over the jobs of an earlier app. Raises UserError where another app looks after them."""
        self.version = 0
        self._root, self._state, self._log, self._gpus = root, state, log, gpus
        self._lock_file = _lock(state / "lock")
        self._store = JobStore(state / "jobs.sqlite", lambda words: log("jobs", "warning", message=words))
        self._jobs = {each.id: each for each in self._store.read()}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._asked_at: dict[str, float] = {}
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._is_over = False
        for job in self._jobs.values():
            self._adopt(job)
        self._thread = threading.Thread(target=self._run, name="cllm-jobs", daemon=True)
        self._thread.start()

    # -- for the routes ------------------------------------------------------------------------------------------------

    def listed(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        with self._lock:
            return [each.to_dict() for each in reversed(self._jobs.values())]

    def get(self, identity: str) -> dict[str, Any]:
        """Raises Refused (404)."""
        with self._lock:
            return self._find(identity).to_dict()

    def of_run(self, run: str) -> dict[str, Any] | None:
        """The newest job that trains a run."""
        with self._lock:
            return next((each.to_dict() for each in reversed(self._jobs.values()) if each.run == run), None)

    def log_of(self, identity: str) -> Path:
        """Raises Refused (404)."""
        with self._lock:
            return self._files(self._find(identity)).log

    def submit(self, asked: Asked) -> dict[str, Any]:
        """A new job, which is started as soon as it may be. Raises Refused (429)."""
        with self._lock:
            if sum(each.state == "queued" for each in self._jobs.values()) >= _MOST_WAITING:
                raise Refused(429, f"{_MOST_WAITING} jobs are waiting already. Wait for one, or stop some.", code="too_many_jobs")
            new = Job(
                0, asked.command, asked.options, asked.words, asked.line, asked.title, asked.run, asked.out, asked.device, created=time.time()
            )  # fmt: skip
            job = self._store.add(new)
            self._jobs[job.id] = job
            self._log("job", id=job.id, command=job.command, state=job.state)
            self._start_what_may()
            self._forget_the_oldest()
            found = job.to_dict()
        self._wake.set()
        self.version += 1
        return found

    def stop(self, identity: str) -> dict[str, Any]:
        """Ends a job; a training or crawl after what it has to finish. Raises Refused (404, 409)."""
        return self._end(identity, "stop")

    def pause(self, identity: str) -> dict[str, Any]:
        """Ends a training or crawl so that it can go on later. Raises Refused (404, 409)."""
        return self._end(identity, "pause")

    def resume(self, identity: str) -> dict[str, Any]:
        """Goes on with a training or crawl that was paused, was stopped, or broke off: the same command again. Raises Refused (404, 409)."""
        with self._lock:
            job = self._find(identity)
            if job.command not in PAUSABLE or job.state not in ENDED or job.state == "done":
                raise _not_now(job, "go on")
            job.state, job.asked, job.error, job.exit_status, job.ended, job.result = "queued", "", None, None, None, None
            self._save(job)
            self._start_what_may()
            found = job.to_dict()
        self.version += 1
        return found

    def forget(self, identity: str) -> dict[str, Any]:
        """Takes a job that has ended off the list, with its log. What it made stays. Returns what it was. Raises Refused (404, 409)."""
        with self._lock:
            job = self._find(identity)
            if job.state not in ENDED:
                raise _not_now(job, "be forgotten")
            self._remove(job)
            found = job.to_dict()
        self.version += 1
        return found

    def close(self) -> None:
        """Lets go of the processes, which go on."""
        self._is_over = True
        self._wake.set()
        self._thread.join(10)
        for each in self._processes.values():
            each.returncode = 0  # nobody is to wait for it any more, and Python not to warn of that
        self._store.close()
        os.close(self._lock_file)

    # -- what was asked of a job ----------------------------------------------------------------------------------------

    def _end(self, identity: str, asked: str) -> dict[str, Any]:
        with self._lock:
            job = self._find(identity)
            can_pause = job.command in PAUSABLE and (job.command != "train" or job.run is not None)
            if (asked == "pause" and not can_pause) or job.state not in ("queued", "paused", *ACTIVE):
                raise _not_now(job, "be paused" if asked == "pause" else "be stopped")
            if asked == "pause" and job.state in ("paused", "pausing", "stopping"):
                raise _not_now(job, "be paused")
            job.asked = asked
            if job.state in ("queued", "paused"):
                job.state, job.ended = ("paused" if asked == "pause" else "stopped"), job.ended or time.time()
            else:
                if job.state != "pausing":  # which has been asked already, and a second time would mean at once
                    self._signal(job, again=job.state == "stopping")
                job.state = "pausing" if asked == "pause" else "stopping"
            self._save(job)
            found = job.to_dict()
        self._wake.set()
        self.version += 1
        return found

    def _signal(self, job: Job, again: bool) -> None:
        """The first time the process is asked to end after what it has to finish; again: at once; if it still runs some time later, it is ended."""
        if job.pid is None or job.identity is None:
            return
        since = time.monotonic() - self._asked_at.get(job.id, time.monotonic())
        self._asked_at.setdefault(job.id, time.monotonic())
        kill = again and since > _PATIENCE
        process.send(job.pid, job.identity, signal.SIGKILL if kill else signal.SIGINT, everyone=kill)
        self._log("job", id=job.id, signal="SIGKILL" if kill else "SIGINT")

    def _find(self, identity: str) -> Job:
        found = self._jobs.get(identity)
        if found is None:
            raise Refused(404, f"there is no job {identity[:40]!r}. GET /api/jobs lists them.", param="id", code="job_not_found")
        return found

    # -- the processes -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over:
            self._wake.wait(_LOOK)
            self._wake.clear()
            try:
                with self._lock:
                    looks = [self._look_at(job) for job in list(self._jobs.values()) if job.state in ACTIVE]
                    is_changed = self._start_what_may() or any(looks)
                    self.version += is_changed
            except Exception as error:  # a full disk, for example: the jobs go on, and this look is done again
                self._log("jobs", "error", message=f"{type(error).__name__}: {error}")
                time.sleep(1.0)

    def _adopt(self, job: Job) -> None:
        """A job that an earlier app has started: it runs still, or it has ended meanwhile."""
        if job.state not in ACTIVE:
            return
        if job.pid is None:  # that app ended between the start and writing it down
            job.pid = process.find(self._files(job))
            job.identity = process.identity_of(job.pid) if job.pid is not None else None
        self._log("job", id=job.id, adopted=self._is_alive(job))
        self._look_at(job)
        self._save(job)

    def _start_what_may(self) -> bool:
        """Starts the jobs whose turn it is. Whether there was any."""
        running = [each for each in self._jobs.values() if each.state in ACTIVE]
        busy = {each.device for each in running if each.device is not None}
        count, is_changed = len(running), False
        for job in self._jobs.values():
            if job.state != "queued" or count >= _MOST_RUNNING or self._is_over:
                continue
            if job.device is not None:
                free = next((each for each in self._devices(job.device) if each not in busy), None)
                if free is None:
                    continue
                job.device = free
                busy.add(free)
            count, is_changed = count + 1, True
            self._start(job)
        return is_changed

    def _devices(self, asked: str) -> list[str]:
        """Where a job can train that asked for "cpu" or "cuda", or was on one of several GPUs before it was paused."""
        kind = asked.partition(":")[0]
        gpus = self._gpus() if kind == "cuda" else []
        return [f"cuda:{name}" for name in gpus] if len(gpus) > 1 else [kind]

    def _start(self, job: Job) -> None:
        files = self._files(job)
        job.state, job.asked, job.started, job.ended = "running", "", time.time(), None
        job.pid = job.identity = job.progress = None
        job.since = process.size_of(files.out)
        self._asked_at.pop(job.id, None)
        self._save(job)  # before it is started: a process that nobody knows of would train on unseen
        try:
            gpu = (job.device or "").partition(":")[2] or None
            child = process.start(job.words, self._root, files, gpu)
        except OSError as error:
            job.state, job.error, job.ended = "failed", f"its process cannot be started: {error.strerror or error}", time.time()
        else:
            self._processes[job.id] = child
            job.pid, job.identity = child.pid, process.identity_of(child.pid)
        self._log("job", id=job.id, state=job.state, pid=job.pid)
        self._save(job)

    def _is_alive(self, job: Job) -> bool:
        child = self._processes.get(job.id)
        if child is not None:
            return child.poll() is None
        return job.pid is not None and job.identity is not None and process.identity_of(job.pid) == job.identity

    def _look_at(self, job: Job) -> bool:
        """Whether the job is another one than at the last look."""
        is_alive = self._is_alive(job)  # before its files are read, so that what it wrote last is not missed
        told = process.read_progress(self._files(job))
        before, job.progress = job.progress, process.figures_of(told) or job.progress
        if is_alive:
            return job.progress != before
        self._ended(job, told.get("exit_status"))
        return True

    def _ended(self, job: Job, told_status: Any) -> None:
        """What became of a job whose process is gone."""
        files, child = self._files(job), self._processes.pop(job.id, None)
        status = child.returncode if child is not None else told_status if isinstance(told_status, int) else None
        job.exit_status, job.ended = status, time.time()
        job.result = process.read_result(files, job.since)
        asked, may_go_on = job.asked, job.command in PAUSABLE
        if status == 0:
            job.state, job.progress = "done", None
        elif asked == "stop":
            job.state = "stopped"
        elif status in (_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            job.state = "paused" if may_go_on else "stopped"
        elif status is None or status < 0:
            job.state = "lost" if status is None else "failed"
        else:
            job.state = "failed"
        if job.state in ("failed", "lost"):
            why = "" if status is not None and status >= 0 else f"the process ended without a word{_of_signal(status)}.\n"
            job.error = (why + process.last_lines(files.log)).strip() or f"it ended with status {status}"
        self._log("job", id=job.id, state=job.state, exit_status=status)
        self._save(job)

    # -- the list ------------------------------------------------------------------------------------------------------

    def _files(self, job: Job) -> Files:
        return Files.of(self._state, job.id)

    def _save(self, job: Job) -> None:
        """What cannot be written stays in memory: a full disk does not keep anybody from stopping a job."""
        try:
            self._store.save(job)
        except CLLMError as error:
            self._log("jobs", "error", message=str(error))

    def _forget_the_oldest(self) -> None:
        ended = [each for each in self._jobs.values() if each.state in ENDED and each.state != "paused"]
        for job in ended[: max(0, len(ended) - _MOST_KEPT)]:
            self._remove(job)

    def _remove(self, job: Job) -> None:
        self._store.remove(job)
        del self._jobs[job.id]
        self._files(job).remove()


def _not_now(job: Job, what: str) -> Refused:
    return Refused(409, f"{job.id} ({job.command}) is {job.state} and cannot {what}.", param="id", code="wrong_state")


def _of_signal(status: int | None) -> str:
    """ ", by signal 9 (SIGKILL): ..." for a process that a signal ended."""
    if status is None:
        return " while no app was there to see it: it was killed, or the machine was restarted"
    with contextlib.suppress(ValueError):
        return f", by {signal.Signals(-status).name}: somebody ended it, or the memory did not suffice"
    return f", by signal {-status}"


def _lock(path: Path) -> int:
    """Keeps a second app from the jobs of this workspace. The system lets go of it when this process ends, however it does."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(file, 100).decode("utf-8", "replace").strip()
        os.close(file)
        raise UserError(
            f"the app runs for this folder already{f' (process {holder})' if holder else ''}. Use that one, end it, or start in another folder."
        ) from None
    os.ftruncate(file, 0)
    os.pwrite(file, str(os.getpid()).encode(), 0)
    return file
