"""Which addresses belong to a crawl: its scope, patterns to allow and deny, and the signs of endless sites."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable

from cllm.data.sources.urls import authority, host, parts
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.printable import printable

SCOPES = ("host", "domain", "prefix")


class Scope:
    """What the seeds of a crawl reach. Raises UserError for a kind that is not in `SCOPES`.

    host: the host and port of a seed; https and http on their own ports count as one. domain: every host and port of a seed's registrable domain
    ("example.co.uk", by the public suffix list; a site under a suffix such as github.io is a domain of its own); for an address in numbers, that
    address. prefix: what lies in the folder of a seed, on its host: https://example.org/docs/ and https://example.org/docs/index.html both stand for
    /docs/, and https://example.org/docs for /docs and what lies below.
    """

    def __init__(self, kind: str, seeds: Iterable[str] = ()) -> None:
        if kind not in SCOPES:
            raise UserError(f"--scope must be one of {', '.join(SCOPES)}, got {printable(kind)!r}.")
        self.kind = kind
        self._places: set[str] = set()
        self._folders: dict[str, set[str]] = {}
        self._domains: dict[str, str] = {}  # of each host that was asked about
        for seed in seeds:
            self.add(seed)

    def add(self, seed: str) -> None:
        """One more seed, a clean address, as where a seed itself redirects to."""
        if self.kind == "prefix":
            self._folders.setdefault(authority(seed), set()).add(_folder(parts(seed).path))
        else:
            self._places.add(authority(seed) if self.kind == "host" else self._domain(seed))

    def covers(self, url: str) -> bool:
        """Whether a clean address belongs to the crawl."""
        if self.kind == "host":
            return authority(url) in self._places
        if self.kind == "domain":
            return self._domain(url) in self._places
        path = parts(url).path
        return any(
            path.startswith(folder) if folder.endswith("/") else path == folder or path.startswith(folder + "/")
            for folder in self._folders.get(authority(url), ())
        )

    def _domain(self, url: str) -> str:
        name = host(url)
        found = self._domains.get(name)
        if found is None:
            if len(self._domains) > 100_000:
                self._domains.clear()
            found = self._domains[name] = _registrable(name)
        return found


def _folder(path: str) -> str:
    before, _, last = path.rpartition("/")
    return path if last and "." not in last else before + "/"


def _registrable(name: str) -> str:
    if name.startswith("[") or re.fullmatch(r"[\d.]+", name):
        return name
    try:
        from tld import get_tld
    except ImportError as error:
        raise DataError("--scope domain needs tld, which is not installed. Install it with: pip install 'cllm[data]'") from error
    found = get_tld(f"https://{name}/", as_object=True, fail_silently=True, search_private=True)
    return getattr(found, "fld", "") or name  # a name without a public suffix, as in a local network, stands for itself


class Patterns:
    """What the user wants and does not want of a site, in the words of a robots.txt: a pattern is the begin of a path with its query, "*" stands for
    any characters, "$" at its end for the end. "/blog/" is all of that folder, "/*.pdf$" all such files. One that begins with http:// or https:// is
    compared with the whole address. Deny goes before allow; where something is allowed, all else is denied. Raises UserError.
    """

    def __init__(self, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> None:
        self._allow, self._deny = [_Pattern(one, "--allow") for one in allow], [_Pattern(one, "--deny") for one in deny]

    def refusal(self, url: str) -> str:
        """Why a clean address is not wanted; empty where it is."""
        path = url[url.index("/", url.index("://") + 3) :]
        for pattern in self._deny:
            if pattern.matches(url, path):
                return f"denied by {pattern.text}"
        if self._allow and not any(pattern.matches(url, path) for pattern in self._allow):
            return "not among what is allowed"
        return ""


class _Pattern:
    """Compared piece by piece from the left, so that no address makes it slow."""

    def __init__(self, text: str, option: str) -> None:
        if not text.startswith(("/", "*", "http://", "https://")):
            raise UserError(f"{option} must begin with /, * or https://, got {printable(text)!r}. Use a pattern like /docs/, /*.pdf$ or *print=1.")
        self.text = text
        self._whole = text.startswith("http")
        self._ends = text.endswith("$")
        self._first, *self._pieces = text.removesuffix("$").split("*")

    def matches(self, url: str, path: str) -> bool:
        text = url if self._whole else path
        if not text.startswith(self._first):
            return False
        place = len(self._first)
        if not self._pieces:
            return not self._ends or place == len(text)
        *middle, last = self._pieces
        for piece in middle:
            place = text.find(piece, place)
            if place < 0:
                return False
            place += len(piece)
        if self._ends:
            return text.endswith(last) and len(text) - len(last) >= place
        return text.find(last, place) >= 0


# -- endless sites ----------------------------------------------------------------------------------------------------------

MAX_SEGMENTS = 16
MAX_PARAMETERS = 8
_CYCLE = re.compile(r"((?:/[^/]+){1,4}?)\1\1(?=/|$)")  # a/b/a/b/a/b: a relative link that a server answers wherever it leads
_CALENDAR = re.compile(
    r"(?:^|[/_.-])(?:calendar|events?|agenda|schedule|kalender|termine|booking|archive|archives|diary)(?=[/_.?-]|$)", re.IGNORECASE
)
_CALENDAR_PARAMETER = re.compile(r"(?:^|&)(?:year|yr|y|month|mon|date|day|week|from|start|cal\w*|tribe-bar-date|ical)=", re.IGNORECASE)
_YEAR = re.compile(r"(?<![0-9])(1[0-9]{3}|2[0-9]{3}|[3-9][0-9]{3})(?![0-9])")
_PAST = 1990  # nobody kept a calendar on the web before


def trap(url: str, this_year: int | None = None) -> str:
    """Why a clean address looks like one of an endless series; empty where it does not. For links that were found, not for seeds."""
    _, _, path, query = parts(url)
    slashes = path.count("/")
    if slashes > MAX_SEGMENTS:
        return f"its path has more than {MAX_SEGMENTS} parts"
    if slashes >= 3 and _CYCLE.search(path):
        return "its path repeats itself"
    if slashes >= 5:
        segments = [segment for segment in path.split("/") if segment]
        if len(segments) - len(set(segments)) >= 4:
            return "its path repeats itself"
    if query:
        names = [pair.partition("=")[0] for pair in query.split("&")]
        if len(names) > MAX_PARAMETERS:
            return f"its query has more than {MAX_PARAMETERS} parameters"
        if len(names) - len(set(names)) >= 3:
            return "its query repeats a parameter"
    if _CALENDAR.search(path) or _CALENDAR_PARAMETER.search(query):
        this_year = this_year or datetime.date.today().year
        for year in _YEAR.findall(path + "?" + query):
            if not _PAST <= int(year) <= this_year + 1:
                return f"a calendar that goes to the year {year}"
    return ""
