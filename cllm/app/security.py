"""Who may use the app. Every path is closed by default: nothing is answered without the cookie or the key, except a plain page at `/`.

The address that `cllm app` prints bears a token. The first page that is opened with it gets a cookie in exchange and is sent to the address without
the token, so that it stays in no history and no log. The cookie is a time and its signature by a secret of the workspace: it survives a restart.
On top of that come the checks of `cllm.serve.safety`: a page of another site is told apart by Host, Origin and Sec-Fetch-Site.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from cllm.app.log import Log
from cllm.runtime.errors import UserError
from cllm.runtime.printable import printable
from cllm.serve.errors import Refused
from cllm.serve.guard import Application, refuse
from cllm.serve.safety import ClientGone, Policy, bears, by_name, check_content, check_host, check_origin, same

RAW_BODIES = frozenset({"/api/uploads", "/api/models/import"})  # the bytes of a file, as application/octet-stream
_MOST_REQUESTS = 512  # at once
_COOKIE_SECONDS = 90 * 86400
_READING = frozenset({"GET", "HEAD"})
_CHANGING = frozenset({"POST", "PUT", "DELETE"})
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"content-security-policy", _CONTENT_POLICY.encode()),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
]
_CLOSED = b"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>CLLM</title><link rel="icon" href="data:,"></head>
<body><h1>CLLM</h1>
<p>To open the app, use the whole address that the command <code>cllm app</code> printed when it started; it ends with a token.</p>
<p>If that command has been started again since, the older address is not valid any more: take the new one.</p>
</body>
</html>
"""


class Access:
    """The token of this start of the app, and the cookies that were given for it and for earlier ones."""

    def __init__(self, secret: bytes, port: int) -> None:
        self.token = secrets.token_urlsafe(32)
        self.cookie_name = f"cllm_app_{port}"  # cookies are shared by all ports of a host
        self._secret, self._port = secret, port

    def opens(self, query: bytes) -> bool:
        """Whether the query of an address holds the token."""
        given = parse_qs(query[:1_000].decode("latin-1")).get("token", [])
        return len(given) == 1 and same(given[0], self.token)

    def cookie(self, seconds: float = _COOKIE_SECONDS) -> str:
        """The value of the header Set-Cookie for a browser that has shown the token."""
        until = int(time.time() + seconds)
        return f"{self.cookie_name}={until}.{self._sign(until)}; Max-Age={int(seconds)}; Path=/; HttpOnly; SameSite=Strict"

    def knows(self, headers: Mapping[str, list[str]]) -> bool:
        """Whether one of a request's cookies was given out here."""
        pairs = (pair.partition("=") for line in headers.get("cookie", []) for pair in line.split(";"))
        return any(self._is_valid(value.strip()) for name, _, value in pairs if name.strip() == self.cookie_name)

    def _is_valid(self, value: str) -> bool:
        until, _, signature = value.partition(".")
        if not (until.isascii() and until.isdigit() and len(until) <= 12):
            return False
        return same(signature, self._sign(int(until))) and time.time() < int(until)

    def _sign(self, until: int) -> str:
        return hmac.new(self._secret, f"cookie {self._port} {until}".encode(), hashlib.sha256).hexdigest()


def read_secret(path: Path) -> bytes:
    """The secret of a workspace, which is made where there is none. Raises UserError where it cannot be kept."""
    try:
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(file, "wb") as new:
                found = secrets.token_bytes(32)
                new.write(found)
            return found
        with open(file, "rb") as kept:
            os.fchmod(kept.fileno(), 0o600)
            found = kept.read(33)
    except OSError as error:
        raise UserError(f"the app cannot keep its secret in {path}: {error.strerror or error}. Remove that file and start again.") from error
    if len(found) != 32:
        raise UserError(f"{path} is damaged. Remove it and start again; the app is then to be opened by its new address.")
    return found


class Gate:
    """An ASGI application around the app, which sees only requests that may be answered."""

    def __init__(self, app: Application, policy: Policy, access: Access, log: Log) -> None:
        self.app, self._policy, self._access, self._log = app, policy, access, log
        self.requests = 0  # that are being answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return  # no other protocol is spoken: uvicorn refuses what is left unanswered
        started, status, error = time.monotonic(), 0, ""
        scope["noted"] = {}

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in _HEADERS}
                message = {**message, "headers": [*(each for each in message["headers"] if each[0].lower() not in own), *_HEADERS]}
            await send(message)

        self.requests += 1
        try:
            if self._check(scope):
                await self.app(scope, receive, answer)
            else:
                await self._open(scope, answer)
        except Refused as refused:
            error = refused.code or ""
            if not status:
                await refuse(refused, answer)
        except ClientGone:
            error = "client left"
        except Exception as failure:
            place = traceback.extract_tb(failure.__traceback__)[-1]
            error = f"{type(failure).__name__}: {str(failure)[:300]} ({Path(place.filename).name}:{place.lineno})"
            if not status:
                await refuse(Refused(500, "the app has made a mistake; its log says which.", code="internal_error"), answer)
        finally:
            self.requests -= 1
            self._note(scope, status, time.monotonic() - started, error)

    def _check(self, scope: Any) -> bool:
        """True for a request that is the app's, False for one to `/` from a browser that is to get its cookie first. Raises Refused."""
        method, path, headers = scope["method"], scope["path"], by_name(scope["headers"])
        host = check_host(headers, self._policy)
        is_start = method == "GET" and path == "/"
        if not (is_start and _is_navigation(headers)):  # a link to the printed address may stand on any page
            check_origin(headers, host)
        if is_start and scope["query_string"]:
            return False
        is_known = self._access.knows(headers) or (self._policy.key is not None and bears(headers.get("authorization", []), self._policy.key))
        if not is_known:
            if is_start:
                return False
            raise Refused(401, "open the address that cllm app has printed, with its token, or send Authorization: Bearer KEY.", code="unauthorized")
        if method not in _READING | _CHANGING:
            raise Refused(405, f"{method[:20]!r} is not what the app takes.", code="method_not_allowed")
        if method in _CHANGING and not _is_empty(headers):
            check_content(headers, "application/octet-stream" if path in RAW_BODIES else "application/json")
        if self.requests > _MOST_REQUESTS:
            raise Refused(429, "the app has too many requests at once.", code="rate_limit_exceeded", headers={"Retry-After": "1"})
        return True

    async def _open(self, scope: Any, send: Any) -> None:
        """Exchanges the token for a cookie, or says where to find it."""
        headers = [(b"content-type", b"text/html; charset=utf-8")]
        query = scope["query_string"]
        opens = self._access.opens(query)
        if opens or self._access.knows(by_name(scope["headers"])):
            headers += [(b"location", b"/"), *([(b"set-cookie", self._access.cookie().encode())] if opens else [])]
            await send({"type": "http.response.start", "status": 303, "headers": [*headers, (b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        # A browser that comes from another page keeps the cookie to itself, and sends it when this page leads to itself.
        follows = by_name(scope["headers"]).get("sec-fetch-site") == ["cross-site"] and not query
        page = _CLOSED.replace(b"<title>", b'<meta http-equiv="refresh" content="0; url=/"><title>', follows)
        status = 401 if b"token=" in query else 200
        await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", str(len(page)).encode())]})
        await send({"type": "http.response.body", "body": page})

    def _note(self, scope: Any, status: int, seconds: float, error: str) -> None:
        """Reading happens all the time and leaves no line; what changes something, is refused or fails does."""
        if scope["method"] in _READING and status < 400 and not error:
            return
        values = {"method": printable(scope["method"])[:10], "path": printable(scope["path"])[:200], "status": status, "ms": round(seconds * 1000, 1)}
        self._log("request", "error" if status >= 500 else "info", **values, **({"error": error} if error else {}), **scope["noted"])


def _is_empty(headers: Mapping[str, list[str]]) -> bool:
    """Whether a request has no body at all, and so none of a wrong kind."""
    return not {"content-type", "transfer-encoding"} & headers.keys() and headers.get("content-length", ["0"]) == ["0"]


def _is_navigation(headers: Mapping[str, list[str]]) -> bool:
    """Whether somebody opens the page itself, rather than another page something of it."""
    return headers.get("sec-fetch-mode") == ["navigate"] and headers.get("sec-fetch-dest") == ["document"] and "origin" not in headers
