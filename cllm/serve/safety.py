"""Who may ask: checks that every request passes before any of it is read, whatever its path.

A server on loopback is reached by every web page that its user opens, so the address alone protects nothing. A page of another site is told apart by
the Host that it asked for (DNS rebinding), and by the Origin and Sec-Fetch-Site that browsers send. There is no CORS: no answer may be read by a page
of another origin. On any other address a key is needed as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cllm.runtime.errors import UserError
from cllm.serve.errors import Refused

MOST_BODY = 4 << 20  # bytes; a context of a million tokens is about as long
_MOST_DRAINED = 64 << 20
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")
_OPEN = frozenset({"/health"})  # what needs no key: whether the process serves at all
_SAME = frozenset({"same-origin", "none"})

Headers = Iterable[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Policy:
    """hosts: the names, in lower case, that a request may have asked for; any_address: also every IP address, where the server listens on all of
    them (a page cannot make a browser take another's address for its own name). key: what requests must bear, None: nothing."""

    hosts: frozenset[str]
    any_address: bool
    key: str | None

    @classmethod
    def of(cls, host: str, key: str | None, names: Iterable[str] = ()) -> Policy:
        """What `cllm serve --host HOST --api-key KEY --allow-host NAME` means. Raises UserError for an open address without a key."""
        if key is not None and not re.fullmatch(r"[!-~]{1,1000}", key):
            raise UserError("--api-key must be made of visible ASCII characters without spaces. Make one with: openssl rand -hex 24")
        if not is_loopback(host) and key is None:
            raise UserError(
                f"--host {host} can be reached from other machines, so a key is needed. Give --api-key KEY (or the variable CLLM_API_KEY), "
                "or leave --host out to serve this machine alone."
            )
        found = {host.strip("[]").lower(), *(name.lower() for name in names)}
        address = _address(host)
        wildcard = address is not None and address.is_unspecified
        if wildcard:
            found.add(socket.gethostname().lower())
        return cls(frozenset(found), wildcard, key)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def check(method: str, path: str, headers: Headers, policy: Policy) -> None:
    """Raises Refused for a request that may not be answered: of another site, without the key, or with a body that is no JSON."""
    found = by_name(headers)
    check_origin(found, check_host(found, policy))
    if path not in _OPEN:
        _check_key(found.get("authorization", []), policy.key)
    if method == "POST":
        check_content(found)


def by_name(headers: Headers) -> dict[str, list[str]]:
    """The values of each header by its name in lower case."""
    found: dict[str, list[str]] = {}
    for name, value in headers:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def check_host(headers: Mapping[str, list[str]], policy: Policy) -> str:
    """The Host that was asked for. Raises Refused where the server is not known by it."""
    given = headers.get("host", [])
    match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
    if match is None:
        raise Refused(400, "the Host header is missing or malformed: it must name this server once.", code="invalid_host")
    name = match[1].strip("[]").lower()
    address = _address(name)
    if not (name in policy.hosts or is_loopback(name) or (address is not None and policy.any_address)):
        raise Refused(
            403, f"this server is not known as {name[:100]!r}. Ask for it by its address, or start it with --allow-host NAME.", code="invalid_host"
        )
    return given[0].lower()


def check_origin(headers: Mapping[str, list[str]], host: str) -> None:
    """Raises Refused for what a page of another origin, or of another site, sent to this host."""
    for origin in headers.get("origin", []):
        parts = _split(origin)
        if parts is None or parts.scheme not in ("http", "https") or parts.netloc.lower() != host:
            raise Refused(403, "requests from web pages of another origin are not answered.", code="invalid_origin")
    if any(site.strip().lower() not in _SAME for site in headers.get("sec-fetch-site", [])):
        raise Refused(403, "requests from web pages of another site are not answered.", code="invalid_origin")


def _check_key(given: list[str], key: str | None) -> None:
    if key is None:
        return
    if not bears(given, key):
        words = "a key is needed: send the header Authorization: Bearer KEY." if not given else "the API key is not the one that this server expects."
        raise Refused(401, words, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def bears(given: list[str], key: str) -> bool:
    """Whether the values of the header Authorization are this key as a bearer's."""
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return same(token.strip(), key) and scheme.lower() == "bearer"


def same(text: str, secret: str) -> bool:
    """Whether two texts are equal. Digests are of one length, so that the time of a comparison says nothing about the secret's."""
    return hmac.compare_digest(_digest(text), _digest(secret))


def check_content(headers: Mapping[str, list[str]], kind: str = "application/json") -> None:
    """Raises Refused for a body of another kind: those that a form of any web page can send are never taken."""
    kinds = headers.get("content-type", [])
    given, _, parameters = kinds[0].partition(";") if len(kinds) == 1 else ("", "", "")
    charset = parameters.strip().lower().replace('"', "")
    if given.strip().lower() != kind or charset not in ("", "charset=utf-8", "charset=utf8"):
        what = "JSON in UTF-8" if kind == "application/json" else "the bytes of a file"
        raise Refused(415, f"the body must be {what}: send the header Content-Type: {kind}.", code="unsupported_media_type")
    if any(each.strip().lower() not in ("", "identity") for each in headers.get("content-encoding", [])):
        raise Refused(415, "compressed bodies are not read. Leave Content-Encoding out.", code="unsupported_media_type")


async def read_body(scope: Mapping[str, Any], receive: Receive, most: int = MOST_BODY, seconds: float = 30.0) -> bytes:
    """The body of a request. Raises Refused: 413 beyond `most` bytes, 408 where it does not arrive in time; ClientGone when the client leaves.

    What is too long is thrown away as it arrives. It is still taken up to a limit, because a client that is answered while it sends often does not
    see the answer.
    """
    headers = {name.lower(): value for name, value in scope["headers"]}
    announced = headers.get(b"content-length", b"")
    too_long = announced.isdigit() and int(announced[:20]) > most
    if too_long and (headers.get(b"expect", b"").lower() == b"100-continue" or int(announced[:20]) > _MOST_DRAINED):
        raise _too_long(most)
    parts: list[bytes] = []
    count = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body = message.get("body", b"")
                count += len(body)
                if count > most:
                    too_long = True
                    parts.clear()
                if not too_long:
                    parts.append(body)
                if not message.get("more_body", False) or count > _MOST_DRAINED:
                    break
    except TimeoutError:
        if not too_long:
            raise Refused(408, f"the body did not arrive within {seconds:.0f} seconds.", code="request_timeout") from None
    if too_long:
        raise _too_long(most)
    return b"".join(parts)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def _too_long(most: int) -> Refused:
    return Refused(413, f"the body is longer than {most:,} bytes. Send less at once.", code="request_too_large", headers={"Connection": "close"})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _split(origin: str) -> Any:
    try:
        return urlsplit(origin)
    except ValueError:
        return None
