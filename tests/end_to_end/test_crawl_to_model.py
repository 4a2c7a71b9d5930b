"""From a web site that grows to a model that has learnt it: crawl, prepare and train as a user types them, on a server of this machine."""

import html
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command import cllm

for module in ("aiohttp", "protego", "pyarrow", "trafilatura"):
    pytest.importorskip(module, reason="of the extra [data]")

ROOT = Path(__file__).parents[2]
SETTINGS = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 32, "--batch-size", 4, "--vocab-size", 320, "--threads", 2,
            "--steps", 10, "--round-bytes", 1000, "--set", "log.tensorboard=false")  # fmt: skip


def articles():
    """Prose of about 3,000 characters each, from this project's own notes."""
    paragraphs = [each for each in (ROOT / "profiling" / "NOTES.md").read_text("utf-8").split("\n") if len(each) > 80 and "|" not in each]
    found, now = [], []
    for paragraph in paragraphs:
        now.append(paragraph)
        if sum(map(len, now)) > 3000:
            found.append(now)
            now = []
    return found


class Site:
    """A server with an index of as many articles as are published."""

    def __init__(self):
        self.articles, self.published = articles(), 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                page = site.page(self.path)
                self.send_response(404 if page is None else 200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write((page or "").encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"

    def page(self, path):
        if path == "/":
            links = "".join(f'<li><a href="/article/{number}">Article {number}</a></li>' for number in range(self.published))
            return f"<html><head><title>Index</title></head><body><ul>{links}</ul></body></html>"
        number = path.removeprefix("/article/")
        if not number.isdigit() or int(number) >= self.published:
            return None
        text = "".join(f"<p>{html.escape(each)}</p>" for each in self.articles[int(number)])
        return (
            f"<html><head><title>Article {number}</title></head><body><nav>Home</nav><article><h1>Article {number}</h1>{text}</article></body></html>"
        )

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()


def test_a_site_that_grows_is_crawled_and_learnt_in_rounds(tmp_path):
    crawl = ("crawl", "--out", tmp_path / "site", "--delay", 0, "--revisit", 0)
    train = ("train", tmp_path / "site", "--follow", "--once", "--out", tmp_path / "run", *SETTINGS, "--json")
    with Site() as site:
        site.published = 8
        begun = cllm(*crawl, f"http://{site.address}/", "--allow-private", site.address)
        assert begun.status == 0 and "9 pages" in begun.out, begun
        first = cllm(*train)
        assert first.status == 0, first.err
        (row,) = first.json["rounds"]
        assert row["documents"] + row["held_out"] == 8, "the index is no text"

        site.published = 14
        again = cllm(*crawl, "--allow-private", site.address)
        assert again.status == 0, again.err
        second = cllm(*train)
        assert second.status == 0, second.err
        assert second.json["rounds"][0] == row
        assert second.json["rounds"][1]["documents"] + second.json["rounds"][1]["held_out"] == 6
    prepared = cllm("data", "show", tmp_path / "run" / "documents")
    assert prepared.status == 0 and "14" in prepared.out
    written = cllm("generate", tmp_path / "run" / "model", "--prompt", "The", "--max-tokens", 4)
    assert written.status == 0
