"""The page and its modules, which lie in the package: names that are known from the start, so that no request leads anywhere else.

Each file is read and compressed once. Text shrinks to a third, which is felt where the app is reached through a tunnel.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cllm.serve.errors import Refused

STATIC = Path(__file__).with_name("static")
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}


@dataclass(frozen=True)
class _File:
    """A file as it is sent. compressed: by gzip, or None where that saves nothing."""

    kind: str
    content: bytes
    compressed: bytes | None

    @staticmethod
    def read(path: Path) -> _File:
        content = path.read_bytes()
        compressed = gzip.compress(content, mtime=0)
        return _File(_KINDS[path.suffix], content, compressed if len(compressed) < len(content) else None)

    def answer(self, request: Request) -> Response:
        if self.compressed is None or not _takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(self.content, media_type=self.kind, headers={"Vary": "Accept-Encoding"})
        return Response(self.compressed, media_type=self.kind, headers={"Vary": "Accept-Encoding", "Content-Encoding": "gzip"})


def _takes_gzip(accepted: str) -> bool:
    """Whether gzip stands in an Accept-Encoding header, and not as "gzip;q=0", which refuses it."""
    found = re.search(r"(?:^|,)\s*gzip\s*(?:;\s*q=([\d.]+)\s*)?(?=,|$)", accepted, re.IGNORECASE)
    return found is not None and (found[1] is None or found[1].strip("0.") != "")


def routes() -> APIRouter:
    """To be mounted after all other routes: it answers every path that is left."""
    router = APIRouter()
    paths = (each for each in sorted(STATIC.rglob("*")) if each.suffix in _KINDS and each.is_file())
    files = {f"/{each.relative_to(STATIC).as_posix()}": _File.read(each) for each in paths}
    files["/"] = files["/index.html"]

    @router.get("/{path:path}")
    async def page(path: str, request: Request) -> Response:
        file = files.get(f"/{path}")
        if file is None:
            raise Refused(404, f"there is nothing at this path: {path[:200]!r}.", code="not_found")
        return file.answer(request)

    return router
