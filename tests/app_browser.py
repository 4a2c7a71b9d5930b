"""The app as a user starts it, and a page of it in Chromium, for the tests of tests/cllm/app/browser."""

import json
import pydoc_data.topics
import re
import signal
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from command import Started, wait_until

TABS = ("Home", "Data", "Training", "LLM", "Models", "Crawler", "System")
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-gpu")
TINY = ("--embed-dim", 32, "--num-layers", 2, "--num-heads", 2, "--seq-len", 64, "--batch-size", 4, "--vocab-size", 300, "--threads", 2)
KEY = "a-key-for-the-tests-of-the-app"
PATIENCE = 600_000  # milliseconds after which something counts as hanging; a slow machine is no fault


_PROGRAM = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import app_program; del sys.path[0]; app_program.main()"


def real_text():
    """Prose that every Python brings: its reference of the language."""
    return "\n\n".join(pydoc_data.topics.topics.values())[:400_000]


@dataclass
class Running:
    """An app that runs: where its files lie, and where it answers."""

    workspace: Path
    url: str
    """Its address with the token."""
    process: Started

    @property
    def origin(self):
        return "{0.scheme}://{0.netloc}".format(urlsplit(self.url))

    @property
    def port(self):
        return urlsplit(self.url).port

    def request(self, method, path, body=None):
        """The API, as a program uses it."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.origin + path, data, headers, method=method)) as answer:
            return json.load(answer)

    def end(self, how=signal.SIGTERM):
        """Ends the app, and with it the jobs that it has started."""
        if how == signal.SIGTERM and self.process.poll() is None:
            for job in self.request("GET", "/api/jobs"):
                if job["state"] in ("running", "queued", "paused", "pausing"):
                    self.request("POST", f"/api/jobs/{job['id']}/stop", {})
        self.process.send_signal(how)
        self.process.wait()


known = []  # the report of the machine, where there is one already


def start_app(workspace, port=0):
    """Starts the app in a folder and waits for its address."""
    report = workspace / ".cllm" / "doctor.json"
    if known and not report.exists():
        report.parent.mkdir(exist_ok=True)
        report.write_bytes(known[0])
    process = Started("app", "--no-browser", "--port", port, program=_PROGRAM, is_command=True, cwd=workspace, CLLM_API_KEY=KEY)
    found = []
    wait_until(lambda: found.extend(re.findall(r"http://\S+token=\S+\n", process.out)) or found, process)
    return Running(workspace, found[0].strip(), process)


class Watched:
    """A page and what went wrong on it. `expected`: texts that may stand in the console, as where the app is killed on purpose."""

    def __init__(self, page, origin):
        self.page, self.origin, self.faults, self.expected = page, origin, [], []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type == "error" and self.faults.append(f"console: {message.text} {message.location}"))
        page.on("pageerror", lambda error: self.faults.append(f"page: {error}"))
        page.on("request", self._request)

    def _request(self, request):
        if not request.url.startswith((self.origin, "data:", "blob:")):
            self.faults.append(f"a request to another host: {request.url}")

    def check(self):
        faults = [each for each in self.faults if not any(text in each for text in self.expected)]
        assert not faults, "\n".join(faults)


def go(page, address):
    """Goes to an address of the page, as a bookmark or a link does."""
    page.evaluate("address => { location.hash = address; }", address)


SETTLED = """() => !document.querySelector("main .spinner") &&
  document.getAnimations().every((each) => each.playState !== "running" || each.effect.getComputedTiming().endTime === Infinity)"""


def settle(page):
    """Returns once nothing on the page says that it is being loaded, and no colour or place of anything is still changing."""
    page.wait_for_function(SETTLED)


def open_tab(page, name):
    """Goes to a tab as a person does, behind the menu button on a phone."""
    menu = page.get_by_role("button", name="Menu")
    if menu.is_visible():
        menu.click()
    page.get_by_role("tab", name=name, exact=True).click()
    page.get_by_role("tabpanel", name=name).wait_for()
