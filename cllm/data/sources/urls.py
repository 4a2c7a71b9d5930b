"""Web addresses: what is fetched for a link, and the key under which two spellings of one page meet.

`clean` reads an address as browsers do (WHATWG URL) and writes it in the one form that is fetched; nothing that a server could tell apart is
changed, apart from the fragment, which is never sent. `key` goes further and is only compared: parameters sorted, trackers and session
identifiers dropped. A page is fetched under the address that was found, never under its key.
"""

from __future__ import annotations

import functools
import re
from ipaddress import AddressValueError, IPv6Address
from typing import NamedTuple
from urllib.parse import quote, unquote, urljoin

MAX_LENGTH = 2083  # characters; the longest that all browsers took, and far more than a page that is meant to be found has
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_SPACE = "".join(map(chr, range(33)))  # what WHATWG takes off both ends

# An address that `clean` would leave as it is: most are, and this is ten times as fast. Of numbers, only IPv4 addresses of the usual form.
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_CLEAN = re.compile(
    rf"https?://(?:(?:[a-z0-9_-]+\.)*+[a-z][a-z0-9-]*|{_BYTE}(?:\.{_BYTE}){{3}})(?::(?!80/|443/)(?:[1-9][0-9]{{0,3}}|[1-5][0-9]{{4}}))?/"
    r"(?:[A-Za-z0-9/_~!$&'()*+,;=:@-]|(?<!/)\.|\.(?![./?]|\Z)|%(?!2[Ee])[0-9A-Fa-f]{2})*+(?:\?(?:[A-Za-z0-9/_.~!$&()*+,;=:@?-]|%[0-9A-Fa-f]{2})*+)?"
)
_PARTS = re.compile(r"(https?):/*([^/?#]*)([^?#]*)(?:\?([^#]*))?", re.DOTALL)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?")
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_DOTS = re.compile(r"/(?:\.|%2e){1,2}(?:/|$)", re.IGNORECASE)
_PATH_SAFE = "/%:@!$&'()*+,;=~-._|[]^"
_QUERY_SAFE = "/%:@!$&()*+,;=~-._?|[]^`{}"


class BadURL(ValueError):
    """An address that is not fetched, and why: words that complete "not fetched: ..."."""


class Parts(NamedTuple):
    """A clean address taken apart; `authority` is the host, with its port where that is not the scheme's own."""

    scheme: str
    authority: str
    path: str
    query: str


def clean(href: str, base: str = "", charset: str = "utf-8") -> str:
    """The absolute address to fetch for a link on the page `base`, itself a clean address; `charset` of the page, for the query (WHATWG).

    Raises BadURL where it is no address of the web, names a user or password, or is longer than `MAX_LENGTH`.
    """
    href = href.strip(_SPACE)
    if len(href) > 4 * MAX_LENGTH:
        raise BadURL(f"the address is longer than {MAX_LENGTH:,} characters")
    cut = href.find("#")
    if cut >= 0:
        href = href[:cut]
    return _form(_joined(base, href) if base else href, charset)


def parts(url: str) -> Parts:
    """A clean address taken apart."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    return Parts(scheme, authority, "/" + path, query)


def authority(url: str) -> str:
    """Host and port of a clean address, "example.org" or "example.org:8080": what delays, budgets and scopes count by."""
    start = url.index("://") + 3
    return url[start : url.index("/", start)]


def origin(url: str) -> str:
    """Scheme, host and port of a clean address, "https://example.org": what a robots.txt speaks for."""
    return url[: url.index("/", url.index("://") + 3)]


def host(url: str) -> str:
    """The host of a clean address without its port: a name, an IPv4 address, or an IPv6 address in brackets."""
    return re.sub(r":\d+$", "", authority(url))


# -- one form ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(1 << 14)  # the same menu stands on every page of a site
def _form(url: str, charset: str) -> str:
    if not _CLEAN.fullmatch(url):
        url = _written(url, charset)
    if len(url) > MAX_LENGTH:
        raise BadURL(f"the address is longer than {MAX_LENGTH:,} characters")
    return url


def _joined(base: str, href: str) -> str:
    if href.startswith(("http://", "https://")):
        return href
    if href[:1] == "/" and href[:2] not in ("//", "/\\"):
        return origin(base) + href
    if _SCHEME.match(href):
        return href
    href = "".join(href.splitlines()).replace("\t", "")
    try:
        return urljoin(base, href.replace("\\", "/") if "?" not in href else href)
    except ValueError as error:
        raise BadURL("it is not an address") from error


def _written(url: str, charset: str) -> str:
    url = url.strip(_SPACE).translate({9: None, 10: None, 13: None})
    before, mark, query = url.partition("?")
    url = before.replace("\\", "/") + mark + query
    scheme = _SCHEME.match(url)
    if scheme:
        url = scheme[0].lower() + url[scheme.end() :]
    found = _PARTS.match(url)
    if not found:
        raise BadURL(f"its scheme is {scheme[1].lower()}, not http or https" if scheme else "it has no scheme (https://)")
    if "@" in found[2]:
        raise BadURL("it names a user or a password")
    path = _encoded(found[3], _PATH_SAFE, "utf-8")
    if _DOTS.search(path):
        path = _without_dots(path)
    asked = "?" + _encoded(found[4], _QUERY_SAFE, charset) if found[4] is not None else ""
    return f"{found[1]}://{_authority(found[1], found[2])}{path or '/'}{asked}"


@functools.lru_cache(4096)
def _authority(scheme: str, text: str) -> str:
    name, colon, port = text.rpartition(":") if re.search(r":[^\]]*$", text) else (text, "", "")
    if colon and port and not (port.isascii() and port.isdigit() and 0 < int(port[:8]) < 65536):
        raise BadURL("its port is not a number from 1 to 65535")
    port = str(int(port)) if port else ""
    return _host(name) + (f":{port}" if port and port != _DEFAULT_PORTS[scheme] else "")


def _host(text: str) -> str:
    if text.startswith("["):
        try:
            return f"[{IPv6Address(text[1:-1] if text.endswith(']') and '%' not in text else '').compressed}]"
        except AddressValueError:
            raise BadURL("its host is not an IPv6 address") from None
    name = unquote(text, errors="replace").lower()
    if not name.isascii():
        import idna

        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise BadURL("its host is not a name") from None
    name = name.removesuffix(".")
    last = name.rpartition(".")[2]
    if last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last):  # browsers and the C library read both as an IPv4 address in any base
        return _ipv4(name)
    if len(name) > 253 or not _HOST.fullmatch(name) or not all(0 < len(label) < 64 for label in name.split(".")):
        raise BadURL("its host is not a name" if name else "it has no host")
    return name


def _ipv4(name: str) -> str:
    """An IPv4 address of one to four numbers, each decimal, octal (0...) or hexadecimal (0x...), as inet_aton reads it."""
    pieces = name.split(".")
    try:
        numbers = [int(one[2:] or "0", 16) if one[:2] == "0x" else int(one, 8) if one[:1] == "0" and len(one) > 1 else int(one) for one in pieces]
        *first, last = numbers
        if len(numbers) > 4 or any(number > 255 for number in first) or last >= 256 ** (5 - len(numbers)):
            raise ValueError
    except ValueError:
        raise BadURL("its host is not an IPv4 address") from None
    value = last + sum(number << (24 - 8 * place) for place, number in enumerate(first))
    return ".".join(str((value >> shift) & 255) for shift in (24, 16, 8, 0))


def _encoded(text: str, safe: str, charset: str) -> str:
    """Percent-encoded where it has to be; escapes that are there already stay."""
    if "%" in text:
        text = _STRAY_PERCENT.sub("%25", text)
    if charset != "utf-8":
        try:
            return quote(text.encode(charset), safe=safe)
        except (UnicodeError, LookupError):  # browsers send a character that the charset lacks in another way; UTF-8 is as good
            pass
    try:
        return quote(text.encode("utf-8", "surrogateescape"), safe=safe)  # bytes of a header that are no text come as surrogates
    except UnicodeError:
        return quote(text.encode("utf-8", "replace"), safe=safe)


def _without_dots(path: str) -> str:
    """RFC 3986, 5.2.4; an escaped dot is a dot."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for place, segment in enumerate(segments):
        name = segment.lower().replace("%2e", ".")
        if name == "..":
            del kept[-1:]
        if name not in (".", ".."):
            kept.append(segment)
        elif place == len(segments) - 1:
            kept.append("")
    return "/" + "/".join(kept)


# -- the key ----------------------------------------------------------------------------------------------------------------

# Parameters that say where a visitor came from.
_TRACKERS = re.compile(
    r"utm_\w+|gclid|gclsrc|gbraid|wbraid|gad_source|dclid|fbclid|msclkid|yclid|twclid|ttclid|li_fat_id|irclickid|s_kwcid|mc_[ce]id|igsh(?:id)?|_ga|_gl"
    r"|_hsenc|_hsmi|__hs\w+|hsctatracking|mkt_tok|ref_src|vero_(?:id|conv)|oly_(?:anon|enc)_id|pk_\w+|piwik_\w+|mtm_\w+|_openstat|wt_mc|__cf_\w+|spm",
    re.IGNORECASE,
)
# Parameters that name a visit. The short names are also used for other things, so their values have to look drawn at random.
_SESSIONS = re.compile(r"jsessionid|phpsessid|aspsessionid\w*|asp\.net_sessionid|cfid|cftoken|session_?id|sess_?id|oscsid|zenid", re.IGNORECASE)
_SHORT_SESSIONS = re.compile(r"s|sid|sess|session|token|visit|visitor", re.IGNORECASE)
_RANDOM = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9]{16,}")
_PATH_SESSION = re.compile(r";(?:jsessionid|phpsessid|sid|sessionid|cfid|cftoken)=[^/;]*", re.IGNORECASE)
_DOTNET_SESSION = re.compile(r"/\([A-Za-z]\([A-Za-z0-9]{16,}\)\)")  # as in /(S(4hqa0555fwsecu455xqckv45))/page.aspx
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def key(url: str) -> str:
    """What the spellings of one page have in common, of a clean address. Never fetched."""
    scheme, name, path, query = parts(url)
    if ";" in path:
        path = _PATH_SESSION.sub("", path)
    if "(" in path:
        path = _DOTNET_SESSION.sub("", path)
    if "%" in path:
        path = _ESCAPE.sub(_unescaped, path)
    if query:
        if "%" in query:
            query = _ESCAPE.sub(_unescaped, query)
        pairs = [pair for pair in query.split("&") if pair and not _is_noise(pair)]
        query = "&".join(sorted(pairs))
    return f"{scheme}://{name}{path}?{query}" if query else f"{scheme}://{name}{path}"


def _is_noise(pair: str) -> bool:
    name, _, value = pair.partition("=")
    if _TRACKERS.fullmatch(name) or _SESSIONS.fullmatch(name):
        return True
    return bool(_SHORT_SESSIONS.fullmatch(name) and _RANDOM.fullmatch(value))


def _unescaped(found: re.Match[str]) -> str:
    character = chr(int(found[1], 16))
    return character if character in _UNRESERVED else found[0].upper()
