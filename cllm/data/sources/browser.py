"""Pages as a browser shows them: a Chromium that runs their scripts and has no network.

    with Browser() as browser:
        rendered = await browser.render(Answer(200, {"content-type": "text/html"}, body), "https://example.org/", load, Bounds(30.0, 10_000_000))

Playwright and all that it starts belong to one thread from which the network is taken away (`leave_network`). What the scripts of a page ask for is
handed to `load` in the event loop of the caller, and answered with what that returns. What is not handed over, such as a WebSocket of a worker or a
prefetch, meets a browser that gets no sockets, and is set to a proxy that does not exist besides.

One page is open at a time, in a context of its own: no cookie and nothing else that a page stores is there for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.data.sources.no_network import leave_network
from cllm.runtime.errors import DataError
from cllm.runtime.printable import printable

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SWITCHES = (
    "proxy-server=http://nowhere.invalid:9",
    "proxy-bypass-list=<-loopback>",
    "host-resolver-rules=MAP * ~NOTFOUND",
    "force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "disable-quic",
    "dns-prefetch-disable",
    "disable-gpu",
    "block-new-web-contents",  # each window is a process
    "js-flags=-max-old-space-size=512",  # megabytes of one page's objects
)
_WINDOW = {"width": 1280, "height": 6000}  # so high that what is loaded when it comes into sight is loaded
_LOADED = frozenset({"script", "xhr", "fetch"})  # what a text can depend on
_RESTS = 5  # in a row, 100 milliseconds of the page's own clock and then nothing to do, without a request: the page is complete
_LEADS = 100  # addresses that are remembered of a page that tries to go to one after the other
_LEFT = "its scripts go away from it"  # to what is no page of the web, so that no request tells it
_NOBODY = {"access-control-allow-origin": "http://nowhere.invalid"}  # otherwise Playwright lets each page read the answers of all sites
_NOT_SWITCHED = "disable-popup-blocking"  # which Playwright would: what a page opens is a process
_POLICY = "content-security-policy"
_FRAMELESS = "frame-src 'none'; object-src 'none'"  # each frame of another site would be a process
_GRACE = 5.0  # seconds for what should take none: opening, reading and closing a page
_STARTING = 60.0  # seconds
_MEMORY = 2 << 30  # bytes of each process of Chromium
_PAGES = 1000  # after which Chromium is started again, since it keeps a little of each page

# What is wrong with the page, if anything is, and its text. The page is not needed any more. Shadow trees take the place of what their elements hold,
# which goes where their slots are. Scripts, which have run, and styles are left out; metadata for search engines is a script by name only.
_READ = """(() => {
  if (!location.protocol.startsWith("http")) return ["%s", ""];
  if (document.querySelector("html > parsererror, body > parsererror")) return ["it is not well-formed XML", ""];
  const inside = document.createRange();
  const flatten = (tree) => {
    for (const host of tree.querySelectorAll("*:not(form)")) {  // whose fields can have the names of its properties
      if (!host.shadowRoot) continue;
      flatten(host.shadowRoot);
      for (const slot of host.shadowRoot.querySelectorAll("slot")) {
        const filled = slot.assignedNodes();
        slot.replaceWith(...(filled.length ? filled : slot.childNodes));
      }
      inside.selectNodeContents(host.shadowRoot);
      host.replaceChildren(inside.extractContents());
    }
  };
  flatten(document);
  for (const each of document.querySelectorAll("script:not([type='application/ld+json']), noscript, style")) each.remove();
  const page = "<!DOCTYPE html>\\n" + (document.documentElement?.outerHTML ?? "");
  return ["", page.slice(0, %d + 1)];
})()"""
_REST = "new Promise((done) => setTimeout(() => requestIdleCallback(done, { timeout: 1000 }), 100))"


@dataclass(frozen=True)
class Answer:
    """An answer of HTTP, its body without content codings; the names of headers in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Bounds:
    """Of one page: seconds after which it is taken as it is, and bytes of its text in UTF-8 that it may come to."""

    seconds: float
    max_bytes: int


@dataclass(frozen=True)
class Rendered:
    """A page after its scripts have run."""

    body: bytes = b""
    """HTML in UTF-8; empty where there is a problem."""
    problem: str = ""
    """Why there is none, as words that complete "not rendered: ..."."""
    leads_to: tuple[str, ...] = ()
    """Addresses, as they were written, to which its scripts tried to go."""


Load = Callable[[str, str], Coroutine[Any, Any, Answer | None]]
"""Answers a GET for an address with this Accept header; None where it is not loaded."""


def installed_chromium() -> str | None:
    """The path of a Chromium or Chrome that the system has."""
    return next((found for name in _PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """A Chromium that runs as long as the block. A context manager that raises DataError where something is missing or does not start."""

    is_sandboxed = False
    """Whether Chromium keeps pages away from the rest of the user's files; it cannot as root, nor without namespaces for users."""

    def __init__(self) -> None:
        self._program = installed_chromium()
        self._playwright: Any = None
        self._chromium: Any = None
        self._num_pages = 0

    def __enter__(self) -> Browser:
        try:
            import playwright.async_api  # noqa: F401
        except ImportError as error:
            raise DataError("--browser needs playwright, which is not installed. Install it with: pip install 'cllm[browser]'") from error
        self._is_up: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="browser", daemon=True)
        self._thread.start()
        self._is_up.result()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def render(self, page: Answer, url: str, load: Load, bounds: Bounds) -> Rendered:
        """Runs the scripts of a page that came from `url`, once the pages before it are done. What a page does is an answer and never an exception.

        load: called in the loop that this is called in. Raises DataError where Chromium does not start again after a crash.
        """
        here = asyncio.get_running_loop()
        loads: list[Future[Answer | None]] = []

        async def there(asked: str, accept: str) -> Answer | None:
            loads.append(asyncio.run_coroutine_threadsafe(load(asked, accept), here))
            return await asyncio.wrap_future(loads[-1])

        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._render(_Visit(page, url, there, bounds)), self._loop))
        finally:
            for each in loads:
                each.cancel()  # what the page no longer waits for, as at the end of its time

    # -- what follows runs in the thread of the browser -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            leave_network()
            asyncio.run(self._serve())
        except BaseException as error:
            if self._is_up.done():
                raise
            self._is_up.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._end, self._turn = asyncio.get_running_loop(), asyncio.Event(), asyncio.Lock()
        self._loop.set_exception_handler(lambda loop, context: None)  # Playwright leaves tasks behind when its program or Chromium is gone
        try:
            await self._start()
            self._is_up.set_result(None)
            await self._end.wait()
        finally:
            await self._stop()

    async def _start(self) -> None:
        from playwright.async_api import Error, async_playwright

        self._playwright = await async_playwright().start()
        self._num_pages = 0
        for sandbox in (True, False) if os.geteuid() else (False,):
            try:
                self._chromium = await self._playwright.chromium.launch(
                    executable_path=self._program,
                    args=[f"--{each}" for each in _SWITCHES],
                    ignore_default_args=[f"--{_NOT_SWITCHED}"],
                    chromium_sandbox=sandbox,
                    handle_sigint=False,
                    handle_sigterm=False,
                    handle_sighup=False,
                    timeout=1000 * _STARTING,
                )
                self.is_sandboxed = sandbox
                _limit_memory()
                return
            except Error as error:
                failure = error
        if self._program is None:
            raise DataError(
                "--browser needs Chromium, which is not installed. Install it with: apt install chromium, or: playwright install chromium"
            ) from failure
        raise DataError(f"{self._program} does not start: {_words(failure)}. Put it right, or switch --browser off.") from failure

    async def _stop(self) -> None:
        """However that ends: Playwright's program ends Chromium, and Chromium itself, once the pipe to it is closed."""
        for part in (self._chromium and self._chromium.close, self._playwright and self._playwright.stop):
            if part:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(part(), _GRACE)
        self._chromium = self._playwright = None

    async def _render(self, visit: _Visit) -> Rendered:
        from playwright.async_api import Error

        async with self._turn:
            if self._chromium is None or not self._chromium.is_connected() or self._num_pages >= _PAGES:
                await self._stop()
                await self._start()
            self._num_pages += 1
            try:
                async with asyncio.timeout(visit.bounds.seconds + 2 * _GRACE):
                    return await visit.rendered(self._chromium)
            except TimeoutError:
                problem = "its scripts do not come to an end"
            except Error as error:
                problem = _problem(error, visit.has_crashed)
                if problem == _LEFT:
                    return Rendered(problem=problem)
            await self._stop()  # whatever is left of the page ends with its browser
            return Rendered(problem=problem)


class _Visit:
    """One page, from its first byte to what is left of it when nothing more happens."""

    def __init__(self, page: Answer, url: str, load: Load, bounds: Bounds) -> None:
        self._page, self._url, self._load, self.bounds = page, url, load, bounds
        self._leads: dict[str, None] = {}
        self._is_served = False
        self._pending = self._num_asked = 0
        self._closing: list[asyncio.Future[Any]] = []
        self.has_crashed = False

    async def rendered(self, chromium: Any) -> Rendered:
        """Raises playwright's Error where the browser, or the page, comes to an end before."""
        self._until = time.monotonic() + self.bounds.seconds
        self._context = await chromium.new_context(service_workers="block", accept_downloads=False, viewport=_WINDOW)
        try:
            await self._context.route("**/*", self._asked)
            self._tab = await self._context.new_page()
            self._tab.on("crash", self._crashed)
            self._context.on("page", lambda each: self._closing.append(asyncio.ensure_future(each.close())))
            await self._tab.goto(self._url, wait_until="commit", timeout=1000 * self.bounds.seconds)
            world = await self._world()
            await self._settled(world)
            return self._checked(await world(_READ % (_LEFT, self.bounds.max_bytes)))
        finally:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._context.close(), _GRACE)

    def _crashed(self, tab: Any) -> None:
        """The renderer is gone, for want of memory for the most part: what waits for it is given up."""
        self.has_crashed = True
        self._closing.append(asyncio.ensure_future(self._context.close()))

    async def _world(self) -> Callable[[str], Awaitable[Any]]:
        """Evaluates expressions beside the page's own scripts, which can change what these find under the names of the language."""
        session = await self._context.new_cdp_session(self._tab)
        frame = (await session.send("Page.getFrameTree"))["frameTree"]["frame"]["id"]

        async def evaluate(expression: str) -> Any:
            made = await session.send("Page.createIsolatedWorld", {"frameId": frame})
            asked = {"expression": expression, "contextId": made["executionContextId"], "returnByValue": True, "awaitPromise": True}
            return (await session.send("Runtime.evaluate", asked))["result"].get("value")

        return evaluate

    async def _settled(self, world: Callable[[str], Awaitable[Any]]) -> None:
        """Returns once the page has nothing to do and has asked for nothing for a while, or its time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                asked = rests = 0
                while rests < _RESTS:
                    await world(_REST)
                    rests = 0 if self._pending or asked != self._num_asked else rests + 1
                    asked = self._num_asked

    def _checked(self, found: list[str]) -> Rendered:
        problem, text = found
        body = text.encode("utf-8", "replace")
        if problem:
            return Rendered(problem=problem, leads_to=tuple(self._leads))
        if len(body) > self.bounds.max_bytes:
            return Rendered(problem=f"it is larger than {self.bounds.max_bytes:,} bytes once its scripts have run")
        return Rendered(body, leads_to=tuple(self._leads))

    async def _asked(self, route: Any) -> None:
        """A request of the page. Whatever goes wrong concerns it alone: the page may be closed by now."""
        self._pending += 1
        self._num_asked += 1
        try:
            with contextlib.suppress(Exception):
                await self._answer(route, route.request)
        finally:
            self._pending -= 1

    async def _answer(self, route: Any, request: Any) -> None:
        if request.is_navigation_request():
            if not self._is_served:
                self._is_served = True
                policy = ", ".join(filter(None, (self._page.headers.get(_POLICY), _FRAMELESS)))
                await route.fulfill(status=self._page.status, headers={**self._page.headers, _POLICY: policy}, body=self._page.body)
                return
            if len(self._leads) < _LEADS and request.frame == self._tab.main_frame:
                self._leads.setdefault(request.url)
            await route.fulfill(status=204)  # which leaves the frame as it is
        elif request.resource_type == "stylesheet":
            await route.fulfill(status=200, content_type="text/css", body="")  # some scripts wait for it
        elif request.resource_type in _LOADED and request.method == "GET":
            answer = await self._load(request.url, request.headers.get("accept", "*/*"))
            if answer is None:
                await route.abort()
            else:
                await route.fulfill(status=answer.status, headers=_NOBODY | dict(answer.headers), body=answer.body)
        else:
            await route.abort()


def _limit_memory() -> None:
    """Of what the programs that this thread has started have started: of Chromium, whose pages are processes that inherit it."""
    for program in _children(f"/proc/self/task/{threading.get_native_id()}"):
        started = _children(f"/proc/{program}/task/{program}")
        while started:
            each = started.pop()
            with contextlib.suppress(OSError):  # it has ended by itself
                resource.prlimit(each, resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
            started += [child for task in Path(f"/proc/{each}/task").glob("*") for child in _children(str(task))]


def _children(task: str) -> list[int]:
    try:
        return [int(each) for each in Path(task, "children").read_text().split()]
    except OSError:
        return []


def _problem(error: Exception, has_crashed: bool) -> str:
    """In words for `Rendered.problem`."""
    text = str(error)
    if not has_crashed and ("target navigated" in text or "Cannot find context" in text):
        return _LEFT
    return "Chromium crashed" if has_crashed or "closed" in text else _words(error)


def _words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return printable(lines[0].partition(" at http")[0] if lines else "no details")[:200]
