"""The real `cllm app` on a workspace of its own, and Debian's Chromium in front of it.

A test fails on an error in the console, an error of the page, or a request to another host. Without Chromium or Playwright the tests are skipped.
"""

from pathlib import Path

import pytest
from app_browser import QUIET, TINY, Watched, known, real_text, start_app
from command import cllm
from made_once import made_once

from cllm.data.sources.browser import installed_chromium


@pytest.fixture(scope="session")
def driver():
    """(Playwright's module, the path of Chromium)."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'cllm[browser]'")
    path = installed_chromium()
    if path is None:
        pytest.skip("Chromium is not installed: apt install chromium")
    return sync_api, path


_open = []  # Playwright and its Chromium, for all tests of this folder that follow one another


@pytest.fixture
def browser(driver):
    if not _open:
        sync_api, path = driver
        _open.append(sync_api.sync_playwright().start())
        _open.append(_open[0].chromium.launch(executable_path=path, args=list(QUIET)))
    return _open[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Closes Chromium behind the last test of this folder: while Playwright runs, nothing else in the thread can run an event loop of its own."""
    result = yield
    if _open and (nextitem is None or Path(__file__).parent not in nextitem.path.parents):
        playwright, chromium = _open
        _open.clear()
        chromium.close()
        playwright.stop()
    return result


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A workspace with real text and two finished runs, made once. Tests that change it take a copy."""

    def make(workspace):
        (workspace / "books").mkdir()
        (workspace / "books" / "notes.txt").write_text(real_text())
        for name, more in (("demo", ("--steps", 40, "--sample-every", 20)), ("other", ("--steps", 20, "--learning-rate", 0.02))):
            done = cllm("train", "books", "--out", f"runs/{name}", "--set", "log.layers_every=10", *more, *TINY, cwd=workspace)
            assert done.status == 0, done.err

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="session")
def machine(driver, tmp_path_factory):
    """The report of the machine, which an app makes in seconds: the first one hands it on to all others."""

    def make(workspace):
        running = start_app(workspace)
        running.request("GET", "/api/doctor")
        running.end()

    known.append((made_once(tmp_path_factory, "machine", make) / ".cllm" / "doctor.json").read_bytes())


@pytest.fixture(scope="session")
def shared_app(driver, machine, trained):
    """An app on the trained workspace, for tests that leave its runs as they are."""
    running = start_app(trained)
    yield running
    running.end()


@pytest.fixture
def launch(browser, machine):
    """launch(workspace) -> an app that runs there until the test and its pages have ended."""
    running = []
    yield lambda workspace: running.append(start_app(workspace)) or running[-1]
    for each in running:
        each.end()


@pytest.fixture
def app(launch, tmp_path):
    """An app on a workspace of its own with nothing but a folder of text."""
    workspace = tmp_path / "workspace"
    (workspace / "books").mkdir(parents=True)
    (workspace / "books" / "notes.txt").write_text(real_text())
    return launch(workspace)


@pytest.fixture
def visit(browser, launch):
    """visit(app, width=1280, height=900, scheme="light") -> a page that is signed in, on Home. What goes wrong on any of them fails the test."""
    opened = []

    def visit(app, width=1280, height=900, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True)
        watched = Watched(context.new_page(), app.origin)
        opened.append((context, watched))
        watched.page.goto(app.url)
        watched.page.get_by_role("heading", name="Home", exact=True).wait_for()
        watched.page.watched = watched
        return watched.page

    yield visit
    for context, watched in opened:
        context.close()
        watched.check()


@pytest.fixture
def page(app, visit):  # in this order: a page is closed before its app ends
    return visit(app)
