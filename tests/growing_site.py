"""A web site of this machine with as many articles as a test publishes: prose from this project's own notes."""

import html
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]


def articles():
    """Prose of about 1,000 characters each, from this project's own notes."""
    found, now = [], []
    notes = [ROOT / "profiling" / "NOTES.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for paragraph in "\n".join(each.read_text("utf-8") for each in notes if "generated" not in each.parts).split("\n"):
        words = paragraph.split()
        if len(words) > 12 and sum(any(each.isalpha() for each in word) for word in words) > 0.85 * len(words):
            now.append(paragraph)
        if sum(map(len, now)) > 1000:
            found.append(now)
            now = []
    return found


class Site:
    """A server with an index of as many articles as are published."""

    def __init__(self):
        self.articles, self.published = articles(), 0
        assert len(self.articles) > 20
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
