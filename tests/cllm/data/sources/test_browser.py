"""Pages whose scripts are run, in a real Chromium: what comes of them, what they reach, and what a page costs that means harm."""

import asyncio
import gzip
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command import PATIENCE, Started, cllm, wait_for, wait_until
from web_servers import Web

pytest.importorskip("aiohttp", reason="the crawler's library, of the extra [data]")
pytest.importorskip("protego", reason="reads robots.txt, of the extra [data]")
pytest.importorskip("playwright.async_api", reason="drives Chromium, of the extra [browser]")

from cllm.app.readers.pages import newest_pages
from cllm.data.extract import warcs
from cllm.data.extract.compressed import Budget
from cllm.data.extract.options import Options
from cllm.data.sources import browser as browser_module
from cllm.data.sources.addresses import Guard
from cllm.data.sources.browser import Answer, Bounds, Browser, installed_chromium
from cllm.data.sources.crawl import Crawl
from cllm.data.sources.no_network import leave_network
from cllm.data.sources.settings import Settings, write_settings
from cllm.data.sources.summary import read_summary

pytestmark = pytest.mark.skipif(installed_chromium() is None, reason="Chromium is not installed: apt install chromium")
SHELL = "<html><head><title>Shell</title></head><body><noscript>Please switch on JavaScript</noscript><script src=/app.js></script></body></html>"
APP = """
document.write("<link rel=stylesheet href=/style.css><img src=/picture.png><iframe src=/frame></iframe>");
const refused = [];
const get = (path, how) => fetch(path, how).then((answer) => answer.text()).catch(() => { refused.push(path); return ""; });
const part = (name, inside) => customElements.define(name, class extends HTMLElement {
  constructor() { super().attachShadow({ mode: "open" }).innerHTML = inside; }
});
part("inner-part", "<style>b { color: red }</style><b><slot>empty</slot></b><i><slot name=more>nothing more</slot></i>");
part("outer-part", "<inner-part>in <u>two</u> trees</inner-part>");
addEventListener("load", async () => {
  document.cookie = "seen=" + location.pathname;
  const text = await get("/api" + location.pathname);
  await get("/private/secret");
  await get("/send", { method: "POST", body: "x" });
  document.title = text.split(" ")[0];
  document.body.innerHTML = "<main><p></p></main>";
  document.querySelector("p").textContent = [text, refused, document.cookie].join(" | ");
  const paths = text.split(" ").filter((word) => word[0] === "/");
  document.body.append(...paths.map((path) => Object.assign(document.createElement("a"), { href: path })));
  document.body.append(document.createElement("outer-part"));
  if (text.includes("noindex")) document.head.innerHTML += "<meta name=robots content=noindex>";
  if (text.includes("leaves")) location.href = "/reached";
});
"""
TEXTS = {
    "/": "Begin /first /hidden",
    "/first": "First page, which leaves",
    "/hidden": "Hidden, noindex",
    "/reached": "Reached by a script",
}


@pytest.fixture(scope="module")
def chromium():
    with Browser() as found:
        yield found


@pytest.fixture
def web():
    with Web() as found:
        yield found


async def app(exchange):
    """A site of one shell, whose script asks for the text of each page."""
    path = exchange.path
    if path == "/robots.txt":
        await exchange.send("User-agent: *\nDisallow: /private/\n", Content_Type="text/plain")
    elif path in TEXTS:
        await exchange.send(SHELL)
    elif path == "/app.js":
        await exchange.send(APP, Content_Type="text/javascript")
    elif path.startswith("/api/"):
        await exchange.send(TEXTS[path.removeprefix("/api")], Content_Type="text/plain")
    else:
        await exchange.send("", 404)


def crawl(folder, chromium, web, site, **more):
    folder.mkdir(exist_ok=True)
    settings = Settings(**{"seeds": (site.url(),), "delay": 0.0, "sitemaps": False, "browser": True} | more)
    write_settings(folder, settings)
    assert Crawl(folder, settings, Guard(web.allowed), browser=chromium).run()
    return read_summary(folder)[1]


def pages(folder):
    """Path -> what prepare reads of a page, each once."""
    found = list(warcs.pages(io.BytesIO(records(folder)), Options(), Budget(1 << 20, Options())))
    read = {"/" + page.url.split("/", 3)[3]: page.body.decode() for page in found}
    assert len(read) == len(found)
    return read


def records(folder):
    return b"".join(gzip.decompress(path.read_bytes()) for path in sorted((folder / "pages").iterdir()))


def test_what_scripts_write_is_what_is_read_and_links_of_it_are_followed(tmp_path, chromium, web):
    site = web.site(app)
    summary = crawl(tmp_path / "c", chromium, web, site)
    read = pages(tmp_path / "c")
    assert set(read) == {"/", "/first", "/reached"} and (summary.pages, summary.rendered, summary.not_rendered) == (3, 3, {})
    for path, body in read.items():
        # what was refused: the path that robots.txt forbids, and the POST; a page sees only the cookie that it has set itself
        assert f"<p>{TEXTS[path]} | /private/secret,/send | seen={path}</p>" in body and "<script" not in body
        shadows = "<inner-part><b>in <u>two</u> trees</b><i>nothing more</i></inner-part>"
        assert f"<outer-part>{shadows}</outer-part>" in body
    assert site.counts == dict.fromkeys(["/app.js", *TEXTS, *(f"/api{path}" for path in TEXTS)], 1)
    assert any("noindex" in reason for reason in summary.left_out) and site.most_at_once == 1
    assert {each.title for each in newest_pages(tmp_path / "c/pages", tmp_path, 9)} == {"Begin", "First", "Reached"}
    raw = records(tmp_path / "c")
    assert raw.count(b"WARC-Type: response\r\n") == raw.count(b"WARC-Type: conversion\r\n") == raw.count(SHELL.encode()) == 3


ESCAPES = """<html><head><title>x</title><link rel=prefetch href=BAIT/1><link rel=preload as=script href=BAIT/2><link rel=preconnect href=BAIT>
<link rel=dns-prefetch href=BAIT><link rel=modulepreload href=BAIT/3><link rel=manifest href=BAIT/4><link rel=icon href=BAIT/5>
<script type=speculationrules>{"prefetch": [{"source": "list", "urls": ["BAIT/6"]}]}</script></head><body>
<iframe src=BAIT/7></iframe><iframe src=file:///etc/passwd></iframe><img src=BAIT/8><video src=BAIT/9></video><object data=BAIT/10></object>
<script src=BAIT/11></script><script src=/hop></script><a id=a href=BAIT/12 download ping=BAIT/13>x</a><form id=f method=post action=BAIT/14></form>
<p>none</p><script>
const tried = [];
const attempt = (name, act) => { try { act(); tried.push(name); } catch (error) { tried.push(name + " throws"); } };
const work = `for (const make of [() => new WebSocket("ws://HOST/15"), () => fetch("BAIT/16"), () => new EventSource("BAIT/17"),
  () => importScripts("BAIT/18")]) try { make(); } catch {} postMessage(1);`;
const opened = [];
attempt("websocket", () => { new WebSocket("ws://HOST/19").onopen = () => opened.push("websocket"); });
attempt("beacon", () => navigator.sendBeacon("BAIT/20", "x"));
attempt("fetch", () => fetch("BAIT/21", { mode: "no-cors" }).then(() => opened.push("fetch"), () => {}));
attempt("hop", () => fetch("/hop").then(() => opened.push("hop"), () => {}));
attempt("post", () => fetch("BAIT/22", { method: "POST", mode: "no-cors", keepalive: true }).catch(() => {}));
attempt("file", () => fetch("file:///etc/passwd").then(() => opened.push("file"), () => {}));
attempt("events", () => new EventSource("BAIT/23"));
attempt("transport", () => new WebTransport("https://HOST/24").ready.catch(() => {}));
attempt("service worker", () => navigator.serviceWorker?.register("/sw.js").catch(() => {}));
attempt("webrtc", () => { const peer = new RTCPeerConnection({ iceServers: [{ urls: "stun:UDP" }] }); peer.createDataChannel("x");
  peer.createOffer().then((offer) => peer.setLocalDescription(offer)); });
attempt("window", () => open("BAIT/25"));
attempt("click", () => a.click());
attempt("form", () => f.submit());
attempt("location", () => { location.href = "BAIT/26"; });
new Worker(URL.createObjectURL(new Blob([work]))).onmessage = () => {
  document.querySelector("p").textContent = "tried " + tried.length + " opened " + opened.join();
};
</script></body></html>"""


def test_nothing_but_what_the_crawler_itself_fetches_is_ever_reached(tmp_path, chromium, web):
    bait = web.site(lambda exchange: exchange.send("text"))
    heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    heard.bind((bait.address, 0))
    heard.setblocking(False)
    page = (
        ESCAPES.replace("BAIT", bait.url(""))
        .replace("HOST", f"{bait.address}:{bait.port}")
        .replace("UDP", f"{bait.address}:{heard.getsockname()[1]}")
    )

    async def hostile(exchange):
        if exchange.path == "/hop":
            await exchange.redirect(bait.url("/27"))
        else:
            await exchange.send(page if exchange.path == "/" else "")

    site = web.site(hostile)
    web.sites.remove(bait)  # a server of this machine that was not allowed
    summary = crawl(tmp_path / "c", chromium, web, site, depth=0)
    assert summary.rendered == 1 and "<p>tried 14 opened </p>" in pages(tmp_path / "c")["/"]
    assert bait.connections == 0 and site.counts["/hop"] >= 1
    with heard, pytest.raises(BlockingIOError):
        heard.recv(1)


def test_the_kernel_gives_no_sockets_to_a_thread_that_left_the_network_nor_to_its_children():
    found = []

    def leave():
        leave_network()
        for kind in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
            with pytest.raises(PermissionError):
                socket.socket(kind, socket.SOCK_RAW if kind == socket.AF_NETLINK else socket.SOCK_DGRAM)
        one, other = socket.socketpair()
        with one, other:
            one.send(b"x")
            found.append(other.recv(1))
        child = subprocess.run([sys.executable, "-I", "-S", "-c", "import socket; socket.socket()"], capture_output=True, text=True, check=False)
        found.append("Permission denied" in child.stderr)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert found == [b"x", True]
    socket.socket().close()  # this thread has all that it had


HARM = {
    b"<script>while (true) {}</script>": "its scripts do not come to an end",
    b"<script>document.write('x'.repeat(2e6))</script>": "it is larger than 1,000,000 bytes once its scripts have run",
    b"<script src=/kill></script>": "Chromium crashed",
    b"<p>good</p><script>setInterval(() => fetch('/x').catch(() => 0), 20); fetch('/never')</script>": "",
}


ODD = {
    "text/html": {
        """<p></p><form><input name=shadowRoot>field</form><div></div><script>
        const barred = [];
        const both = new Promise((done) => addEventListener("securitypolicyviolation", (event) => {
          if (barred.push(event.effectiveDirective) === 2) done();
        }));
        document.write("<iframe src=http://other.org/frame></iframe><img src=http://other.org/picture>");
        const tree = document.querySelector("div").attachShadow({ mode: "open" });
        for (let i = 0; i < 150000; i++) tree.append("");
        tree.append("in a tree");
        const opened = open("about:blank"), ours = Object.getOwnPropertyNames(window).filter((name) => name.startsWith("__p"));
        const can = (url) => fetch(url).then(() => 1, () => 0);
        Promise.all([can("/own"), can("http://other.org/own"), can("http://other.org/shared"), both]).then((read) => {
          document.querySelector("p").textContent = JSON.stringify([opened, ours, ...read, ...barred.sort()]);
        });
        </script>""": """<p>[null,[],1,0,1,null,"frame-src","img-src"]</p><form><input name="shadowRoot">field</form><div>in a tree</div>""",
        "<p>good</p><script>history.back()</script>": "its scripts go away from it",
        "<p>good</p><script>setTimeout(() => { location = 'about:blank'; }, 50)</script>": "its scripts go away from it",
    },
    "application/xhtml+xml": {
        "<html xmlns='http://www.w3.org/1999/xhtml'><body><p>good<br></p><script>1</script></body></html>": "it is not well-formed XML",
    },
}


def test_a_page_is_what_its_scripts_make_of_it_alone_however_odd_they_are(chromium):
    async def load(url, accept):
        return Answer(200, {"access-control-allow-origin": "*"} if "shared" in url else {}, b"")

    for kind, expected in ODD.items():
        for body, outcome in expected.items():
            page = Answer(200, {"content-type": kind, "content-security-policy": "img-src 'none'"}, body.encode())
            found = asyncio.run(chromium.render(page, "http://x.org/", load, Bounds(PATIENCE, 1_000_000)))
            assert found.problem == outcome or (not found.problem and outcome in found.body.decode()), body


def test_a_page_that_means_harm_costs_itself_and_the_next_one_is_rendered(chromium, monkeypatch):
    async def load(url, accept):
        if url.endswith("/kill"):
            for each in descendants(os.getpid(), "chromium"):
                os.kill(each, signal.SIGKILL)
        if url.endswith("/never"):
            try:
                await asyncio.sleep(PATIENCE)
            finally:
                given_up.append(url)

    given_up = []
    processes = descendants(os.getpid(), "chromium")
    assert processes and {resource.prlimit(each, resource.RLIMIT_DATA)[1] for each in processes} == {2 << 30}

    async def rendered(body):
        endless = b"while" in body
        monkeypatch.setattr(browser_module, "_GRACE", 0.5 if endless else 60.0)
        bounds = Bounds(0.5 if endless or b"Interval" in body else 60.0, 1_000_000)
        found = await chromium.render(Answer(200, {"content-type": "text/html"}, body), "http://x.org/", load, bounds)
        while b"never" in body and not given_up:
            await asyncio.sleep(0.01)
        return found

    found = {body: asyncio.run(rendered(body)) for body in HARM}
    assert {body: each.problem for body, each in found.items()} == HARM and b"good" in found[list(HARM)[-1]].body


def descendants(pid, name):
    """The processes below one, of all generations, whose program has this name."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, after = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        number, _, names[int(number)] = before.partition(" (")[0], None, before.partition(" (")[2]
        parents[int(number)] = int(after.split()[1])
    below = {pid}
    while more := {each for each, parent in parents.items() if parent in below} - below:
        below |= more
    return [each for each in below - {pid} if name in names[each]]


def test_a_crawl_that_is_killed_leaves_no_chromium_and_goes_on(tmp_path, chromium, web):
    waiting = threading.Event()

    async def slow(exchange):
        if exchange.path == "/api/reached" and not waiting.is_set():
            waiting.set()
            await asyncio.sleep(PATIENCE)
        await app(exchange)

    site = web.site(slow)
    words = [site.url("/first"), "--browser", "--delay", 0, "--no-sitemaps", "--out", tmp_path / "c", "--allow-private", site.address]
    process = Started("crawl", *words)
    wait_until(waiting.is_set, process)
    left = descendants(process.pid, "")
    assert left
    process.kill()
    wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in left))
    assert crawl(tmp_path / "c", chromium, web, site, seeds=(site.url("/first"),)).rendered == 2
    assert set(pages(tmp_path / "c")) == {"/first", "/reached"} and site.counts["/first"] == 1


def test_a_missing_chromium_is_one_sentence_before_anything_begins(tmp_path):
    ran = cllm("crawl", "http://127.0.0.1:9/", "--browser", "--out", tmp_path / "c", PATH="/nowhere", PLAYWRIGHT_BROWSERS_PATH=str(tmp_path / "none"))
    assert ran.status == 1 and "--browser needs Chromium" in ran.err and "Traceback" not in ran.err and not (tmp_path / "c").exists()
