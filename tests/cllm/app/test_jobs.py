"""The life of a job, with processes that do little: what happens to the list is the same for all."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import wait_for

from cllm.app import jobs as jobs_module
from cllm.app import process
from cllm.app.commands import Asked
from cllm.app.job_store import JobStore
from cllm.app.jobs import Jobs
from cllm.app.log import Log
from cllm.app.process import Files
from cllm.app.workspace import Workspace
from cllm.runtime.errors import UserError
from cllm.serve.errors import Refused

# A stand-in for the commands, with the real files: it loads nothing, so that a test of the list costs no imports.
SCRIPT = """
import json, os, signal, sys, time
from cllm.runtime import progress_file
progress_file.begin()
name, how = sys.argv[1:3]
def asked(number, frame):
    if how == "deaf": return
    print("asked to end", file=sys.stderr, flush=True)
    print(json.dumps({"error": "paused", "exit_status": 130}), flush=True)
    progress_file.ended(130)
    os._exit(130)
signal.signal(signal.SIGINT, asked)
print(name, "begins", file=sys.stderr, flush=True)
print(json.dumps({"event": "begun"}), flush=True)
progress_file.tell(lambda: {"label": name, "text": "at it", "done": 1, "total": 4, "unit": "steps", "eta_seconds": 3.0})
until = time.time() + 1500
while time.time() < until and not os.path.exists("go-" + name): time.sleep(0.01)
if how == "silent": os._exit(7)
status = 3 if how == "fails" else 0
print("error: it broke" if status else "all well", file=sys.stderr, flush=True)
print(json.dumps({"error": "it broke", "exit_status": 3} if status else {"steps": 4}), flush=True)
progress_file.ended(status)
sys.exit(status)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    start = subprocess.Popen

    def popen(command, **more):
        return start([sys.executable, "-c", SCRIPT, *command[4:]], **more)

    monkeypatch.setattr(process.subprocess, "Popen", popen)
    monkeypatch.setattr(jobs_module, "_LOOK", 0.01)


class Place:
    def __init__(self, root):
        self.workspace, self.jobs, self.gpus = Workspace(root), None, []

    def begin(self):
        self.jobs = Jobs(self.workspace.root, self.workspace.state, Log(self.workspace.state / "logs" / "app.log"), lambda: self.gpus)
        return self.jobs

    def crash(self):
        """The app is gone, as by kill -9: nothing is written any more, and the system lets go of its lock."""
        self.jobs._is_over = True
        self.jobs._thread.join()
        os.close(self.jobs._lock_file)
        kept, self.jobs._processes = self.jobs._processes, {}
        self.jobs._store.close()
        return kept

    def submit(self, name="one", how="works", command="train", device="cpu"):
        run = f"runs/{name}" if command == "train" else None
        asked = Asked(command, {}, [name, how], f"cllm {name}", name, run, run, device if command == "train" else None)
        return self.jobs.submit(asked)["id"]

    def go(self, name="one"):
        (self.workspace.root / f"go-{name}").touch()

    def state(self, identity):
        return self.jobs.get(identity)["state"]

    def reaches(self, identity, *states):
        wait_for(lambda: self.state(identity) in states)
        return self.jobs.get(identity)

    def begun(self, identity):
        wait_for(lambda: (self.jobs.get(identity)["progress"] or {}).get("done") == 1)


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path)
    found.begin()
    yield found
    for each in found.jobs._jobs.values():
        if each.pid and each.identity:
            process.send(each.pid, each.identity, signal.SIGKILL, everyone=True)
    found.jobs.close()


def test_a_job_from_beginning_to_end(place):
    identity = place.submit()
    place.begun(identity)
    job = place.jobs.get(identity)
    assert (identity, job["state"], job["run"]) == ("j1", "running", "runs/one")
    assert job["progress"] == {"text": "one  at it", "done": 1, "total": 4, "unit": "steps", "eta_seconds": 3.0}
    version = place.jobs.version
    place.go()
    job = place.reaches(identity, "done")
    assert (job["exit_status"], job["result"], job["error"], job["progress"]) == (0, {"steps": 4}, None, None)
    assert job["created"] <= job["started"] <= job["ended"] and place.jobs.version > version
    assert place.jobs.log_of(identity).read_text() == "one begins\nall well\n"
    assert place.jobs.of_run("runs/one")["id"] == identity and place.jobs.of_run("runs/two") is None


def test_a_failure_is_told_with_the_last_lines_of_the_log(place):
    failed, silent = place.submit("one", "fails", device="a"), place.submit("two", "silent", device="b")
    place.go("one"), place.go("two")
    job = place.reaches(failed, "failed")
    assert job["error"] == "one begins\nerror: it broke" and job["exit_status"] == 3 and job["result"]["error"] == "it broke"
    assert place.reaches(silent, "failed")["error"] == "two begins"


def test_one_that_was_killed_is_said_to_be_killed(place):
    identity = place.submit()
    place.begun(identity)
    os.kill(place.jobs.get(identity)["pid"], signal.SIGKILL)
    job = place.reaches(identity, "failed")
    assert "SIGKILL" in job["error"] and job["error"].endswith("one begins")


def test_pause_go_on_and_stop(place):
    identity = place.submit()
    place.begun(identity)
    assert place.jobs.pause(identity)["state"] == "pausing"
    job = place.reaches(identity, "paused")
    assert (job["exit_status"], job["error"], job["progress"]["done"]) == (130, None, 1)
    first = job["pid"]
    place.jobs.resume(identity)
    place.begun(identity)
    assert place.jobs.get(identity)["pid"] != first and place.jobs.get(identity)["result"] is None
    assert place.jobs.stop(identity)["state"] == "stopping"
    place.reaches(identity, "stopped")
    assert place.jobs.log_of(identity).read_text().count("asked to end") == 2
    place.jobs.resume(identity)  # one that was stopped too
    place.go()
    assert place.reaches(identity, "done")["result"] == {"steps": 4}


def test_a_stop_while_it_pauses_does_not_hurry_it(place):
    identity = place.submit("one", "deaf")
    place.begun(identity)
    place.jobs.pause(identity)
    signals = [line for line in place.jobs._log.lines() if "signal" in line]
    assert place.jobs.stop(identity)["state"] == "stopping"
    assert [line for line in place.jobs._log.lines() if "signal" in line] == signals
    place.go()
    place.reaches(identity, "done")


def test_what_does_not_answer_is_ended_by_a_later_stop(place, monkeypatch):
    monkeypatch.setattr(jobs_module, "_PATIENCE", 0.05)
    identity = place.submit("one", "deaf")
    place.begun(identity)
    place.jobs.stop(identity)
    time.sleep(0.1)
    assert place.state(identity) == "stopping"
    place.jobs.stop(identity)
    assert place.reaches(identity, "stopped")["exit_status"] == -signal.SIGKILL


def test_trainings_of_one_device_run_one_after_another_and_others_beside(place):
    one, two, three = place.submit("one"), place.submit("two"), place.submit("three")
    other, beside = place.submit("other", device="cuda"), place.submit("beside", command="prepare")
    for each in (one, other, beside):
        place.begun(each)
    assert [place.state(each) for each in (one, two, three, other, beside)] == ["running", "queued", "queued", "running", "running"]
    place.jobs.pause(three)  # one that waits is paused at once, and goes on waiting
    assert place.state(three) == "paused"
    place.jobs.resume(three)
    assert place.state(three) == "queued"
    place.go("one")
    place.begun(two)
    assert (place.state(one), place.state(three)) == ("done", "queued")
    place.jobs.stop(three)
    assert place.state(three) == "stopped"
    place.go("two")
    place.reaches(two, "done")
    assert [job["id"] for job in place.jobs.listed()] == [beside, other, three, two, one]


def test_each_of_several_gpus_trains_one_job(place):
    def gpu_of(identity):
        variables = Path(f"/proc/{place.jobs.get(identity)['pid']}/environ").read_text().split("\0")
        return next(each.partition("=")[2] for each in variables if each.startswith("CUDA_VISIBLE_DEVICES="))

    place.gpus = ["0", "GPU-b"]
    first, second, third = (place.submit(name, device="cuda") for name in ("one", "two", "three"))
    other = place.submit("four", device="cpu")
    for identity in (first, second, other):
        place.begun(identity)
    assert place.state(third) == "queued" and (gpu_of(first), gpu_of(second)) == ("0", "GPU-b")
    assert [place.jobs.get(each)["device"] for each in (first, second, third, other)] == ["cuda:0", "cuda:GPU-b", "cuda", "cpu"]
    place.jobs.pause(first)
    place.reaches(first, "paused")
    place.begun(third)
    assert gpu_of(third) == "0"
    place.go("two")
    place.reaches(second, "done")
    place.jobs.resume(first)
    place.begun(first)
    assert gpu_of(first) == "GPU-b"
    place.gpus = ["GPU-b"]  # a job that goes on where there is one is told nothing of it
    place.go("one"), place.go("three"), place.go("four")
    place.reaches(first, "done"), place.reaches(third, "done")
    fifth = place.submit("five", device="cuda")
    place.begun(fifth)
    assert place.jobs.get(fifth)["device"] == "cuda"


def test_what_a_state_does_not_allow_is_refused(place):
    identity = place.submit()
    prepared = place.submit("p", command="prepare")
    for action, job in [("resume", identity), ("forget", identity), ("pause", prepared), ("resume", prepared)]:
        with pytest.raises(Refused) as caught:
            getattr(place.jobs, action)(job)
        assert caught.value.status == 409
    for action in ("stop", "pause", "resume", "forget", "get", "log_of"):
        for unknown in ("j99", "", "1", "../x", "j1 ", "J1"):
            with pytest.raises(Refused) as caught:
                getattr(place.jobs, action)(unknown)
            assert caught.value.status == 404
    place.go(), place.go("p")
    place.reaches(identity, "done"), place.reaches(prepared, "done")
    for action in ("stop", "pause", "resume"):
        with pytest.raises(Refused):
            getattr(place.jobs, action)(identity)
    log = place.jobs.log_of(identity)
    place.jobs.forget(identity)
    assert [job["id"] for job in place.jobs.listed()] == [prepared] and not log.exists()
    assert place.submit("new") == "j3"  # no number is given twice


def test_a_later_app_adopts_what_runs_and_sees_it_end(place):
    identity, waits = place.submit(), place.submit("two")
    place.begun(identity)
    pid = place.jobs.get(identity)["pid"]
    children = place.crash()
    place.begin()
    job = place.jobs.get(identity)
    assert (job["state"], job["pid"], job["progress"]["done"], place.state(waits)) == ("running", pid, 1, "queued")
    place.go()
    wait_for(lambda: children[identity].poll() is not None)
    job = place.reaches(identity, "done")
    assert (job["exit_status"], job["result"]) == (0, {"steps": 4})
    place.begun(waits)
    place.jobs.pause(waits)
    place.reaches(waits, "paused")


def test_what_ended_while_no_app_was_there_is_said_to_have(place):
    done, failed, killed = place.submit("a", device="a"), place.submit("b", "fails", device="b"), place.submit("c", device="c")
    for each in (done, failed, killed):
        place.begun(each)
    children = place.crash()
    place.go("a"), place.go("b")
    children[killed].kill()
    for each in children.values():
        each.wait()
    place.begin()
    assert place.jobs.get(done)["state"] == "done" and place.jobs.get(done)["result"] == {"steps": 4}
    assert place.jobs.get(failed)["state"] == "failed" and place.jobs.get(failed)["error"].endswith("error: it broke")
    lost = place.jobs.get(killed)
    assert lost["state"] == "lost" and lost["exit_status"] is None and lost["error"].endswith("c begins") and "no app was there" in lost["error"]


def test_a_process_that_was_started_but_never_written_down_is_found(place):
    identity = place.submit()
    place.begun(identity)
    pid = place.jobs.get(identity)["pid"]
    place.crash()
    connection = sqlite3.connect(place.workspace.state / "jobs.sqlite")
    connection.execute("UPDATE jobs SET pid=NULL, identity=NULL")
    connection.commit()
    connection.close()
    place.begin()
    assert (place.state(identity), place.jobs.get(identity)["pid"]) == ("running", pid)


def test_another_process_under_the_same_number_is_not_taken_for_the_job(place):
    identity = place.submit()
    place.begun(identity)
    children = place.crash()
    children[identity].kill(), children[identity].wait()
    connection = sqlite3.connect(place.workspace.state / "jobs.sqlite")
    connection.execute("UPDATE jobs SET pid=?", [os.getpid()])  # this process: it has another start time
    connection.commit()
    connection.close()
    place.begin()
    assert place.state(identity) == "lost"
    assert not process.send(os.getpid(), "another identity", signal.SIGKILL)


def test_two_apps_do_not_share_a_workspace(place):
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        place.begin()


def test_a_damaged_list_is_kept_beside_a_new_one(tmp_path):
    path, told = tmp_path / "jobs.sqlite", []
    path.write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    store = JobStore(path, told.append)
    assert store.read() == [] and len(told) == 1 and len(list(tmp_path.glob("jobs.sqlite.damaged-*"))) == 1
    store.close()


def test_what_lies_in_the_workspace_takes_the_place_of_no_module(place, monkeypatch):
    """A folder of the user may hold cllm.py, json.py or anything else."""
    monkeypatch.undo()
    for name in ("cllm.py", "json.py", "typer.py", "sitecustomize.py"):
        (place.workspace.root / name).write_text("raise SystemExit('the wrong module')")
    files = Files.of(place.workspace.state, "j7")
    child = process.start(["report", "--json", "--", "nothing-here"], place.workspace.root, files)
    assert child.wait() == 2 and "wrong module" not in files.log.read_text()
    assert process.read_result(files, 0)["exit_status"] == 2 == process.read_progress(files)["exit_status"]
    assert files.log.stat().st_mode & 0o777 == 0o600


def test_a_job_is_told_no_secret(place, monkeypatch):
    monkeypatch.setenv("CLLM_API_KEY", "the-key")
    seen = {}
    monkeypatch.setattr(process.subprocess, "Popen", lambda command, **more: seen.update(more))
    process.start(["doctor"], place.workspace.root, Files.of(place.workspace.state, "j8"))
    assert "the-key" not in str(seen["env"]) and seen["start_new_session"] and seen["stdin"] == subprocess.DEVNULL
