"""Around the whole application: who may ask, one line of log for each request, and no error without an answer in OpenAI's form."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from cllm.serve.errors import Refused, error_body
from cllm.serve.metrics import Metrics
from cllm.serve.replies import encode
from cllm.serve.safety import Policy, check

MOST_REQUESTS = 1_024  # at once; each may hold a body
_ALWAYS = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]

Application = Callable[[Any, Any, Any], Awaitable[None]]


class Guard:
    """An ASGI application around another. What a handler notes in `scope["noted"]` stands in the log: numbers and ids, never a text.

    log: takes one line for each request. routes: the paths that the metrics know by name.
    """

    def __init__(self, app: Application, policy: Policy, metrics: Metrics, routes: frozenset[str], log: Callable[[str], None] | None = None) -> None:
        self._app, self._policy, self._metrics, self._routes = app, policy, metrics, routes
        self._log = log or _to_stderr
        self.requests = 0  # that are being answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no other protocol is spoken: uvicorn refuses what is left unanswered
        started, status = time.monotonic(), 0
        noted: dict[str, Any] = {}
        scope["noted"] = noted

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_ALWAYS]}
            await send(message)

        self.requests += 1
        try:
            check(scope["method"], scope["path"], scope["headers"], self._policy)
            if self.requests > MOST_REQUESTS:
                raise Refused(429, "the server has too many requests at once.", code="rate_limit_exceeded", headers={"Retry-After": "1"})
            await self._app(scope, receive, answer)
        except Refused as error:
            noted["error"] = error.code or ""
            if not status:
                await refuse(error, answer)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            noted["error"] = f"{type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})"
            if not status:
                await refuse(Refused(500, "the server has made a mistake; its log says which.", code="internal_error"), answer)
        finally:
            self.requests -= 1
            seconds = time.monotonic() - started
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.answered(route, status, seconds)
            self._write(scope, route, status, seconds, noted)

    def _write(self, scope: Any, route: str, status: int, seconds: float, noted: dict[str, Any]) -> None:
        client = scope.get("client")
        line = {
            "ts": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": "error" if status >= 500 else "info",
            "event": "request",
            "client": client[0] if client else "",
            "method": scope["method"] if scope["method"] in ("GET", "POST") else "other",
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            **noted,
        }
        self._log(json.dumps(line))


async def refuse(error: Refused, send: Any) -> None:
    """Answers with an error."""
    content = encode(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def status_error(status: int, method: str, path: str) -> dict[str, Any]:
    """What a path or method that does not exist is answered."""
    if status == 404:
        return error_body(404, f"there is nothing at this path. The API is below /v1, as in /v1/models. Asked for: {path[:200]!r}.", code="not_found")
    if status == 405:
        return error_body(405, f"{method[:20]} is not what this path takes.", code="method_not_allowed")
    return error_body(status, "the request cannot be answered.")


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
