"""`cllm app` as a person starts it: the life of a real training through its API, also past the death of the app, and hostile bytes on its socket."""

import json
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from command import TINY, Started, cllm, wait_for

STEPS = 150
OPTIONS = {str(flag)[2:]: value for flag, value in zip(TINY[::2], TINY[1::2])} | {"threads": 1, "data": "books", "steps": STEPS}


class StartedApp:
    """The app in a process of its own, in a folder; asked with the cookie that its address gives."""

    def __init__(self, folder, *arguments, **variables):
        self.process = Started("app", "--port", 0, "--no-browser", *arguments, cwd=folder, **variables)
        self.process.read_until("\n", "out")
        self.printed = self.process.out.strip()
        assert self.printed.startswith("http://"), self.printed
        self.origin = "{0.scheme}://{0.netloc}".format(urlsplit(self.printed))
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert self.opener.open(self.printed).url == f"{self.origin}/"  # the token has left the address

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        try:
            with self.opener.open(urllib.request.Request(self.origin + path, data, {"Content-Type": "application/json"})) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def job(self, identity):
        return self.ask(f"/api/jobs/{identity}")[1]

    def reaches(self, identity, *states):
        wait_for(lambda: self.job(identity)["state"] in states)
        return self.job(identity)

    def has_trained(self, identity, steps=1):
        def is_there():
            job = self.job(identity)
            assert job["state"] == "running", job
            return job["progress"] and job["progress"]["unit"] == "steps" and job["progress"]["done"] >= steps

        wait_for(is_there)

    def end(self, number=signal.SIGINT):
        self.process.send_signal(number)
        out, err = self.process.communicate()
        assert "Traceback" not in err, err
        return self.process.wait(), out.removeprefix(f"{self.printed}\n"), err


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "books").mkdir()
    lines = [
        f"The {a} {b} saw the {c}." for a in ("old", "red", "tall") for b in ("cat", "dog", "bird", "king") for c in ("sea", "hill", "moon", "road")
    ]
    (folder / "books" / "a.txt").write_text("\n".join(lines * 30))
    return folder


def test_a_training_lives_through_pause_and_the_death_of_the_app(workspace, start):
    app = start(workspace)
    status, job = app.ask("/api/jobs", {"command": "train", "options": OPTIONS | {"out": "runs/one"}})
    assert status == 202 and (job["id"], job["run"], job["title"]) == ("j1", "runs/one", "train books")
    app.has_trained("j1")
    words = Path(f"/proc/{app.job('j1')['pid']}/cmdline").read_bytes().split(b"\0")
    assert b"train" in words and b"--out=runs/one" in words
    assert app.ask("/api/jobs/j1/pause", {})[1]["state"] == "pausing"
    assert app.reaches("j1", "paused")["exit_status"] == 130
    assert app.ask("/api/jobs/j1/resume", {})[0] == 200
    app.has_trained("j1")
    pid = app.job("j1")["pid"]
    app.process.kill()
    app.process.wait()

    again = start(workspace)
    assert again.origin != app.origin or again.printed != app.printed
    job = again.job("j1")
    assert job["pid"] == pid and job["state"] in ("running", "done")
    job = again.reaches("j1", "done")
    assert (job["exit_status"], job["result"]["step"], job["error"]) == (0, STEPS, None)
    assert job["result"]["resumed_from"] > 0
    log = again.ask("/api/jobs/j1/log")[1]
    assert "done: " in log["text"] and log["to"] == log["size"]
    assert again.ask("/api/jobs/j1/log?from=5")[1]["text"] == log["text"][5:]
    status, out, err = again.end()
    assert status == 0 and "jobs go on without it" in err and out == ""

    # The same by the command line, without the app and without a pause: the same files, and the same bits.
    flags = [word for name, value in OPTIONS.items() if name != "data" for word in (f"--{name}", value)]
    assert cllm("train", "books", "--out", "runs/plain", *flags, cwd=workspace).status == 0
    one, plain = workspace / "runs" / "one", workspace / "runs" / "plain"
    assert {each.name for each in one.iterdir()} == {each.name for each in plain.iterdir()}
    assert (one / "config.toml").read_text() == (plain / "config.toml").read_text()
    last = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (one / last).read_bytes() == (plain / last).read_bytes()
    losses = [[row["loss"] for row in rows(run) if "learning_rate" in row] for run in (one, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


@pytest.fixture
def start():
    """Starts apps; none is left behind."""
    apps = []

    def started(*arguments, **variables):
        apps.append(StartedApp(*arguments, **variables))
        return apps[-1]

    yield started
    for app in apps:
        app.process.kill()
        app.process.wait()


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_stream_tells_of_a_job_and_its_log(workspace, start):
    app = start(workspace)
    stream = app.opener.open(f"{app.origin}/api/events?topics=jobs")
    assert stream.headers["content-type"].startswith("text/event-stream") and stream.readline() == b"retry: 1000\n"
    app.ask("/api/jobs", {"command": "report", "options": {"runs": ["no-such-run"]}})
    states = []
    while not states or states[-1] != "failed":
        line = stream.readline()
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            assert event["topic"] == event["kind"] == "jobs"
            states.append(event["jobs"][0]["state"])
    identity = event["jobs"][0]["id"]
    assert "no-such-run" in app.job(identity)["error"] and "no-such-run" in app.ask(f"/api/jobs/{identity}/log")[1]["text"]
    stream.close()
    plan = app.ask("/api/plan", {"options": OPTIONS | {"out": "runs/planned"}})
    assert plan[0] == 200 and plan[1]["plan"]["parameters"] > 0 and plan[1]["text"], plan
    assert not (workspace / "runs" / "planned").exists()
    status, answer = app.ask("/api/plan", {"options": OPTIONS | {"data": "no-such-data"}})
    assert status == 400 and "no-such-data" in answer["error"]["message"]
    assert app.end(signal.SIGTERM)[0] == 0


def test_hostile_bytes_are_answered_and_leave_it_alive(workspace, start):
    app = start(workspace, CLLM_API_KEY="the-key")
    host = urlsplit(app.origin).netloc

    def send(*parts):
        with socket.create_connection(tuple(host.split(":"))) as connection:
            connection.settimeout(60)
            answer = b""
            try:
                for part in parts:
                    connection.sendall(part)
                while more := connection.recv(65536):
                    answer += more
            except OSError:
                pass
        return answer.split(b"\r\n")[0]

    head = f"GET /api/jobs HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer the-key\r\nConnection: close\r\n".encode()
    assert send(head, b"\r\n") == b"HTTP/1.1 200 OK"
    assert b" 400 " in send(head, b"X: " + b"x" * (1 << 20), b"\r\n\r\n")
    assert b" 400 " in send(head, b"".join(b"X%d: 1\r\n" % n for n in range(100_000)), b"\r\n")
    assert b" 400 " in send(b"\x16\x03\x01\x02\x00\x01")
    assert b" 400 " in send(f"GET /api/jobs HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n\r\n".encode())
    ranges = b"Range: bytes=" + b",".join(b"%d-" % n for n in range(5_000)) + b"\r\n\r\n"
    assert send(head.replace(b"/api/jobs", b"/app.css"), ranges) == b"HTTP/1.1 200 OK"
    post = head.replace(b"GET", b"POST") + b"Content-Type: application/json\r\n"
    for content in (b"", b"[]", b'{"command": NaN}', b'{"command": "train", "command": "doctor"}', b"[" * 100_000, b"\xff\xfe", b'{"options": {}}'):
        assert b" 400 " in send(post, b"Content-Length: %d\r\n\r\n" % len(content), content)
    assert b" 413 " in send(post, b"Content-Length: 99999999999\r\n\r\n", b"{}")
    assert app.ask("/api/jobs")[0] == 200
    status, out, err = app.end()
    assert status == 0 and "the-key" not in out + err + (workspace / ".cllm" / "logs" / "app.log").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [(("--host", "0.0.0.0"), "--api-key"), (("--api-key", "with space"), "--api-key"), (("--port", "70000"), "<= 65535")],
)
def test_mistakes_are_answered_in_a_line(tmp_path, arguments, words):
    ran = cllm("app", "--no-browser", *arguments, cwd=tmp_path)
    assert ran.status == 2 and words in ran.err and ran.err.count("\n") == 1 and not (tmp_path / ".cllm").exists()
