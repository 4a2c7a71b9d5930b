"""One request and its redirects, against servers that may mean harm: bounded in time, bytes and memory, and only to addresses that may be reached.

    async with Fetcher(Limits(), Guard(), agent("https://example.org/about-our-crawler")) as fetcher:
        page = await fetcher.fetch("https://example.org/", may_follow=...)

What a server does is an answer and never an exception: `Fetched.problem` says what was the matter. No cookie is kept, no proxy and no variable of
the environment is looked at, no password is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cllm._version import __version__
from cllm.data.sources.addresses import Guard, Refused
from cllm.data.sources.decoding import ACCEPTED, TooLarge, Undecodable, decode
from cllm.data.sources.urls import BadURL, clean
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.printable import printable

if TYPE_CHECKING:
    import aiohttp

PRODUCT = "cllm"  # the name by which a robots.txt speaks to this crawler
MAX_HOPS = 12
MAX_RETRY_AFTER = 3600.0  # seconds; a server that asks for more is not waited for any longer
_REDIRECTS = (301, 302, 303, 307, 308)
_CONDITIONS = ("If-None-Match", "If-Modified-Since")
_MAX_FIELD = 32 << 10  # bytes of one header; some policies of real sites are longer than the usual 8 KiB
_ENCODED = re.compile(r"[!-~]{1,500}")
_DNS_THREADS = 32
_BROTLI = (1, 2, 1)  # CVE-2026-111497

DOCUMENTS = (
    "text/*", "application/xhtml+xml", "application/xml", "application/rss+xml", "application/atom+xml", "application/json", "application/ld+json",
    "application/x-ndjson", "application/jsonl", "application/pdf", "application/epub+zip", "application/rtf", "application/msword",
    "application/vnd.openxmlformats-officedocument.*", "application/vnd.oasis.opendocument.*", "application/x-ipynb+json", "application/x-tex",
    "application/x-subrip", "application/javascript", "application/x-sh", "message/rfc822",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    timeout: float = 30.0
    """Seconds for one request with its redirects: looking up names, connecting, headers and body together."""
    max_bytes: int = 10_000_000
    """Of a body, as sent and also once it is unpacked."""
    types: tuple[str, ...] = DOCUMENTS
    """Content types that are read; "text/*" stands for all that begin with "text/". A body without a type is read."""
    connections: int = 100
    """Open connections in all."""


@dataclass(frozen=True)
class Hop:
    """A redirect that was followed."""

    url: str
    status: int
    location: str


@dataclass(frozen=True)
class Fetched:
    """What came of a request."""

    url: str
    """As it was asked for."""
    final_url: str
    """Where the answer came from, after redirects. Where a redirect was not followed, the address that sent it."""
    status: int = 0
    """Of HTTP; 0 where no answer came."""
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    """As received, in their order. `body` is unpacked, so that Content-Encoding, Transfer-Encoding and Content-Length do not describe it."""
    body: bytes = b""
    """Empty unless `problem` is empty."""
    hops: tuple[Hop, ...] = ()
    address: str = ""
    """The numeric address of the server."""
    problem: str = ""
    """Why there is no body, as words that complete "not stored: ..."; empty for an answer of status 2xx or 304."""
    transient: bool = False
    """Whether the same request may well succeed later: time limits, broken connections, status 408, 425, 429 and 5xx."""
    retry_after: float | None = None
    """Seconds that the server asks to wait, at most `MAX_RETRY_AFTER`."""
    redirect: str = ""
    """Where a redirect that was not followed leads, when it is an address at all."""
    cut: bool = False
    """Whether the body was longer and only its begin was asked for."""
    seconds: float = 0.0

    @property
    def not_modified(self) -> bool:
        return self.status == 304 and not self.problem

    def header(self, name: str) -> str:
        """The values of a header, joined by commas; empty where there is none."""
        name = name.lower()
        return ", ".join(value for key, value in self.headers if key.lower() == name)

    @property
    def content_type(self) -> str:
        """In small letters and without parameters; empty where the server tells none."""
        return _type(self.header("Content-Type"))

    @property
    def charset(self) -> str:
        """That the server tells; empty where it tells none."""
        found = re.search(r"""charset\s*=\s*["']?\s*([\w.:-]{1,40})""", self.header("Content-Type"), re.IGNORECASE)
        return found[1].lower() if found else ""


Follow = Callable[[str], Awaitable[str]]
"""Asked before each redirect is followed: why it is not, empty where it is. Time that it takes does not count against the time limit."""


def agent(contact: str = "") -> str:
    """The User-Agent: the product token, and where its owner can be reached (a web address or an e-mail address). Raises UserError."""
    contact = contact.strip()
    if not contact:
        return f"{PRODUCT}/{__version__}"
    if not re.fullmatch(r"https?://[!-'*-;=?-~]{3,300}|[\w.+-]{1,100}@[\w.-]{1,200}", contact, re.ASCII):
        raise UserError(
            f"--contact must be a web address or an e-mail address, got {printable(contact)!r}. Use a value like https://example.org/crawler."
        )
    return f"{PRODUCT}/{__version__} (+{contact})"


class Fetcher:
    """Makes requests. An asynchronous context manager; any number of `fetch` may run at once."""

    def __init__(self, limits: Limits, guard: Guard, user_agent: str, resolver: Any = None) -> None:
        """resolver: an `aiohttp.abc.AbstractResolver` in place of the system's. What it answers is as little trusted."""
        self.limits = limits
        self._guard, self._agent, self._resolver = guard, user_agent, resolver
        self._types = _pattern(limits.types)
        self._session: aiohttp.ClientSession | None = None
        self._threads: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Fetcher:
        try:
            import aiohttp
            import brotli
            import zstandard  # noqa: F401
        except ImportError as error:
            raise DataError(f"crawling needs {error.name}, which is not installed. Install it with: pip install 'cllm[data]'") from error
        if tuple(map(int, re.findall(r"\d+", brotli.__version__)[:3])) < _BROTLI:
            raise DataError(
                f"brotli {brotli.__version__} is installed; servers can run code through versions before 1.2.1. Update it with: pip install -U brotli"
            )
        if self._resolver is None:
            # A name server that hangs keeps a thread for minutes; a pool of its own keeps the others going.
            self._threads = ThreadPoolExecutor(_DNS_THREADS, "dns")
        connector = aiohttp.TCPConnector(
            limit=self.limits.connections,
            socket_factory=self._guard.socket,
            resolver=self._resolver or _resolver(self._threads),
            ttl_dns_cache=60,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            response_class=_response_class(),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            auto_decompress=False,
            trust_env=False,
            max_field_size=_MAX_FIELD,
            headers={"User-Agent": self._agent, "Accept": "text/html,application/xhtml+xml,*/*;q=0.8", "Accept-Encoding": ACCEPTED},
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(
        self,
        url: str,
        *,
        etag: str = "",
        last_modified: str = "",
        may_follow: Follow | None = None,
        max_hops: int = MAX_HOPS,
        types: tuple[str, ...] | None = None,
        head_bytes: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Fetched:
        """Asks for a clean address (see `urls.clean`) and follows its redirects.

        etag, last_modified: of the copy that is at hand; the answer may then be 304. may_follow: asked before each redirect; none is followed
        without it. types: in place of those of the limits. head_bytes: take this much of a longer body instead of refusing it. headers: sent in
        place of the usual ones of their names.
        """
        asked = _Request(url, dict(headers or {}), self._types if types is None else _pattern(types), head_bytes)
        if _ENCODED.fullmatch(etag):
            asked.headers["If-None-Match"] = etag
        if re.fullmatch(r"[ -~]{1,100}", last_modified):
            asked.headers["If-Modified-Since"] = last_modified
        begin = time.monotonic()
        hops: list[Hop] = []
        left, at = self.limits.timeout, url
        while True:
            started = time.monotonic()
            answer = await self._request(asked, at, hops, left)
            left -= time.monotonic() - started
            if not answer.redirect or answer.problem:
                break
            problem = downgrade(at, answer.redirect)
            if len(hops) >= max_hops:
                problem = f"it redirects more than {max_hops} times"
            elif answer.redirect == url or any(answer.redirect == hop.url for hop in hops):
                problem = "it redirects in a circle"
            elif not problem:
                problem = await may_follow(answer.redirect) if may_follow else f"it redirects to {answer.redirect}"
            if problem:
                answer = _with(answer, problem=problem)
                break
            hops.append(Hop(at, answer.status, answer.redirect))
            at = answer.redirect
        return _with(answer, seconds=time.monotonic() - begin)

    async def _request(self, asked: _Request, url: str, hops: list[Hop], seconds: float) -> Fetched:
        """One request, no redirect followed, within `seconds`."""
        import aiohttp
        from yarl import URL

        assert self._session is not None, "a Fetcher is used inside of its `async with`"
        base = Fetched(asked.url, url, hops=tuple(hops))
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                target = URL(url, encoded=True)  # sent as it is written
                async with self._session.get(target, allow_redirects=False, headers=asked.headers) as response:
                    return await self._answer(asked, base, response)
        except TimeoutError:
            return _with(base, problem=f"no complete answer within the time limit of {self.limits.timeout:g} s", transient=True)
        except aiohttp.ClientConnectorDNSError:
            return _with(base, problem="its name cannot be looked up", transient=True)
        except aiohttp.ClientConnectorCertificateError as error:
            return _with(base, problem=f"its certificate is not valid ({_words(error.certificate_error)})")
        except (aiohttp.ClientConnectorSSLError, ssl.SSLError):
            return _with(base, problem="no encrypted connection could be made (TLS)", transient=True)
        except aiohttp.ClientConnectorError as error:
            words = _refusal(error.os_error)
            return _with(base, problem=words or f"no connection ({_words(error.os_error)})", transient=not words)
        except aiohttp.ClientResponseError as error:
            return _with(base, problem=f"its answer is not HTTP ({_words(error.message)})", transient=True)
        except aiohttp.ClientPayloadError:
            return _with(base, problem="its body is truncated or damaged", transient=True)
        except (aiohttp.ClientError, OSError) as error:
            return _with(base, problem=f"the connection broke ({_words(error)})", transient=True)
        except (ValueError, UnicodeError):  # a name that cannot be written in DNS
            return _with(base, problem="its address cannot be connected to")

    async def _answer(self, asked: _Request, base: Fetched, response: aiohttp.ClientResponse) -> Fetched:
        status = response.status
        answer = _with(
            base,
            status=status,
            reason=(response.reason or "")[:200],
            headers=tuple(response.headers.items()),
            address=getattr(response, "peer", ""),
            retry_after=_retry_after(response.headers.get("Retry-After", "")),
        )
        if status == 304 and not asked.headers.keys().isdisjoint(_CONDITIONS):
            return answer
        if status in _REDIRECTS:
            return _redirected(answer, response.headers.get("Location", ""))
        if not 200 <= status < 300:
            return _with(answer, problem=f"status {status}", transient=status in (408, 425, 429) or status >= 500)
        kind = answer.content_type
        if kind and not asked.types.fullmatch(kind):
            return _with(answer, problem=f"its type is {printable(kind)[:100]}")
        limit = self.limits.max_bytes if asked.head_bytes is None else asked.head_bytes
        too_large = f"it is larger than {limit:,} bytes"
        if asked.head_bytes is None and (response.content_length or 0) > limit:
            return _with(answer, problem=too_large)
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > limit:
                if asked.head_bytes is None or response.headers.get("Content-Encoding"):
                    return _with(answer, problem=too_large)
                break
        cut = len(body) > limit
        del body[limit:]
        try:
            content = decode(bytes(body), response.headers.get("Content-Encoding", ""), limit)
        except TooLarge:
            return _with(answer, problem=f"{too_large} once it is unpacked")
        except Undecodable as error:
            return _with(answer, problem=str(error))
        return _with(answer, body=content, cut=cut)


@dataclass(frozen=True)
class _Request:
    """What stays the same over all redirects."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    types: re.Pattern[str] = re.compile("")
    head_bytes: int | None = None


def _with(answer: Fetched, **changes: Any) -> Fetched:
    return Fetched(**{**answer.__dict__, **changes})


def _redirected(answer: Fetched, location: str) -> Fetched:
    if not location:
        return _with(answer, problem=f"status {answer.status} without an address")
    try:
        return _with(answer, redirect=clean(location, answer.final_url))
    except BadURL as error:
        return _with(answer, problem=f"it redirects to {printable(location)[:100]}: {error}")


def downgrade(url: str, target: str) -> str:
    """Why a redirect may not be followed, whoever asks; empty where it may."""
    return "it redirects from https to http" if url.startswith("https:") and target.startswith("http:") else ""


def _refusal(error: BaseException) -> str:
    """The guard's words, where it is what stopped the connection; several addresses of a name come as one OSError that lists them."""
    if isinstance(error, Refused):
        return f"refused: {error.strerror}"
    return "refused: no address of its name is public" if "is not a public address" in str(error) and "Connect call failed" not in str(error) else ""


def _retry_after(value: str) -> float | None:
    """Seconds from now, from a number of seconds or a date (RFC 9110, 10.2.3)."""
    value = value.strip()
    if re.fullmatch(r"\d{1,12}(?:\.\d{1,6})?", value):
        return min(float(value), MAX_RETRY_AFTER)
    if not value:
        return None
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
        return min(max(0.0, email.utils.parsedate_to_datetime(value[:100]).timestamp() - time.time()), MAX_RETRY_AFTER)
    return None


def _type(value: str) -> str:
    return value.partition(";")[0].partition(",")[0].strip().lower()


def _pattern(types: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(one.lower()).replace(r"\*", ".*") for one in types), re.DOTALL)


def _words(error: object) -> str:
    return printable(" ".join(str(getattr(error, "strerror", None) or error or "no details").split()))[:150]


def _response_class() -> Any:
    import aiohttp

    class Response(aiohttp.ClientResponse):
        """Remembers whom the answer came from: a short one gives its connection back before anybody can ask."""

        peer = ""

        async def start(self, connection: Any) -> Any:
            place = connection.transport.get_extra_info("peername") if connection.transport else None
            self.peer = place[0] if place else ""
            return await super().start(connection)

    return Response


def _resolver(threads: ThreadPoolExecutor | None) -> Any:
    from aiohttp.abc import AbstractResolver

    class Resolver(AbstractResolver):
        """The system's own, in threads of its own."""

        async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[Any]:
            def look_up() -> list[Any]:
                return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)

            found = await asyncio.get_running_loop().run_in_executor(threads, look_up)
            return [
                {"hostname": host, "host": place[0], "port": place[1], "family": kind, "proto": protocol, "flags": socket.AI_NUMERICHOST}
                for kind, _, protocol, _, place in found
            ]

        async def close(self) -> None:
            pass

    return Resolver()
