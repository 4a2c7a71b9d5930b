"""Every URL of a crawl and what became of it, in SQLite: what is queued, what is in flight, what was stored, and when each site may be asked.

One process writes, over one connection, in one transaction after another (`commit`); the crawl's lock sees to it. What happens between two commits
is lost when the process is killed, as if it had not happened: a URL that was in flight then is queued again when the frontier is opened.

The order of a site is breadth first, and the same whenever the crawl is repeated: pages that are due again, then by `rank` (the depth, plus what a
path prefix with many URLs has to wait, see `cllm.data.sources.traps`), then by a digest of the URL. It does not depend on when a page arrived.
"""

from __future__ import annotations

import heapq
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.files import DATA, Wording
from cllm.runtime.errors import DataError

# States of a URL. The first two are queues; a leased one is in flight; a waiting one is tried again at `due`.
AGAIN, NEW, LEASED, WAITING, DONE, FAILED, LEFT_OUT = range(7)
PAGE, SITEMAP, FEED = range(3)  # kinds of a URL
TOO_DEEP = "deeper than --depth"
FORMAT = 1  # of the database
DAY = 86400.0
SLOWEST, FASTEST = 6, -4  # a page that never changes is looked at 2^6 times as rarely as a new one, one that always does 2^4 times as often

_SCHEMA = """
CREATE TABLE sites(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, ready_at REAL NOT NULL, failures INTEGER NOT NULL, pages INTEGER NOT NULL,
  found INTEGER NOT NULL, closed TEXT NOT NULL) STRICT;
CREATE TABLE prefixes(id INTEGER PRIMARY KEY, site INTEGER NOT NULL, name TEXT NOT NULL, found INTEGER NOT NULL, pages INTEGER NOT NULL,
  stale INTEGER NOT NULL, closed TEXT NOT NULL, UNIQUE(site, name)) STRICT;
CREATE TABLE urls(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, url TEXT NOT NULL, site INTEGER NOT NULL, prefix INTEGER NOT NULL,
  kind INTEGER NOT NULL, depth INTEGER NOT NULL, hops INTEGER NOT NULL, rank INTEGER NOT NULL, state INTEGER NOT NULL,
  tries INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0, status INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', etag TEXT,
  last_modified TEXT, digest BLOB, fetched_at REAL NOT NULL DEFAULT 0, pace INTEGER NOT NULL DEFAULT 0, stored INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE INDEX queue ON urls(site, state, rank, key) WHERE state <= 1;
CREATE INDEX pending ON urls(state, due) WHERE state IN (2, 3);
CREATE TABLE contents(digest BLOB PRIMARY KEY, url INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE skipped(key BLOB PRIMARY KEY, reason TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE segments(number INTEGER PRIMARY KEY, bytes INTEGER NOT NULL, pages INTEGER NOT NULL, opened_at REAL NOT NULL,
  sealed INTEGER NOT NULL) STRICT;
CREATE TABLE facts(name TEXT PRIMARY KEY, value ANY) STRICT;
INSERT INTO segments VALUES(0, 0, 0, 0, 0);
"""
_ENTRY = "id, key, url, site, prefix, kind, depth, hops, tries, etag, last_modified, digest, pace, stored, state"
_RELEASE = f"UPDATE urls SET state = CASE WHEN stored THEN {AGAIN} ELSE {NEW} END WHERE state = {LEASED}"
_REMEMBERED = 200_000  # keys and prefixes kept in memory, so that a link that stands on every page costs no query
_DISK = Wording(DATA.error, "another folder with --out", "Pages that were stored are whole.")


@dataclass(slots=True)
class Entry:
    """A URL that is in flight. `key`: 16 bytes that tell equal URLs; `hops`: redirects that led to it; `digest`: of the bytes stored before."""

    id: int
    key: bytes
    url: str
    site: int
    prefix: int
    kind: int
    depth: int
    hops: int
    tries: int
    etag: str | None
    last_modified: str | None
    digest: bytes | None
    pace: int
    stored: int
    state: int


@dataclass(slots=True)
class Site:
    """A scheme, host and port. `ready_at`: not before this time (seconds since 1970); `failures`: in a row; `closed`: why nothing more is fetched.

    `new`, `again`: URLs in its two queues; `address`: where its name leads to in this run.
    """

    id: int
    name: str
    ready_at: float = 0.0
    failures: int = 0
    pages: int = 0
    found: int = 0
    closed: str = ""
    new: int = 0
    again: int = 0
    address: str = ""


@dataclass(slots=True)
class Prefix:
    """URLs of a site that begin alike: how many were found and stored, and how many of the newest brought nothing new."""

    id: int
    site: int
    name: str
    found: int = 0
    pages: int = 0
    stale: int = 0
    closed: str = ""


@dataclass
class Frontier:
    """The database of a crawl folder, opened by `open_frontier`."""

    path: Path
    sql: sqlite3.Connection
    sites: dict[int, Site] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)
    """URLs of each state."""
    pages: int = 0
    """URLs of which something is stored."""
    num_too_deep: int = 0
    waiting: list[tuple[float, int, int]] = field(default_factory=list)
    """A heap of (due, id, site) of what is tried again."""

    def __post_init__(self) -> None:
        self._named = {site.name: site for site in self.sites.values()}
        self._prefixes: dict[tuple[int, str], Prefix] = {}
        self._by_id: dict[int, Prefix] = {}
        self._known: set[bytes] = set()
        self._changed: dict[tuple[str, int], Site | Prefix] = {}

    # -- sites and prefixes ---------------------------------------------------------------------------------------------

    def site(self, name: str) -> Site:
        """The site of this name, which is made when it is new."""
        found = self._named.get(name)
        if found is None:
            found = Site(len(self.sites) + 1, name)
            self.sql.execute("INSERT INTO sites VALUES(?, ?, 0, 0, 0, 0, '')", (found.id, name))
            self.sites[found.id] = self._named[name] = found
        return found

    def prefix(self, site: Site, name: str) -> Prefix:
        found = self._prefixes.get((site.id, name))
        if found is None:
            columns = "id, site, name, found, pages, stale, closed"
            row = self.sql.execute(f"SELECT {columns} FROM prefixes WHERE site = ? AND name = ?", (site.id, name)).fetchone()
            if row is None:
                cursor = self.sql.execute("INSERT INTO prefixes VALUES(NULL, ?, ?, 0, 0, 0, '')", (site.id, name))
                row = (cursor.lastrowid, site.id, name)
            found = self._remember(Prefix(*row))
        return found

    def prefix_of(self, entry: Entry) -> Prefix:
        found = self._by_id.get(entry.prefix)
        if found is None:
            row = self.sql.execute("SELECT id, site, name, found, pages, stale, closed FROM prefixes WHERE id = ?", (entry.prefix,)).fetchone()
            found = self._remember(Prefix(*row))
        return found

    def _remember(self, prefix: Prefix) -> Prefix:
        self._prefixes[prefix.site, prefix.name] = self._by_id[prefix.id] = prefix
        return prefix

    def changed(self, each: Site | Prefix) -> None:
        """Says that a site or prefix has to be written at the next commit."""
        self._changed[type(each).__name__, each.id] = each

    # -- what is found --------------------------------------------------------------------------------------------------

    def is_known(self, key: bytes) -> bool:
        """Whether a URL was found before."""
        if key in self._known:
            return True
        found = self.sql.execute("SELECT 1 FROM urls WHERE key = ?", (key,)).fetchone() is not None
        if found:
            self._know(key)
        return found

    def _know(self, key: bytes) -> None:
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known.add(key)

    def add(self, url: str, key: bytes, site: Site, prefix: Prefix, *, kind: int, depth: int, hops: int, rank: int) -> None:
        """Queues a URL that is not known."""
        self.sql.execute(
            "INSERT INTO urls(key, url, site, prefix, kind, depth, hops, rank, state) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, url, site.id, prefix.id, kind, depth, hops, rank, NEW),
        )
        self._know(key)
        site.new += 1
        site.found += 1
        prefix.found += 1
        self.counts[NEW] += 1
        self.changed(site)
        self.changed(prefix)

    def leave_out(self, url: str, key: bytes, site: Site, prefix: Prefix, *, kind: int, depth: int, hops: int) -> None:
        """Keeps a URL that is too deep, for the case that it is found on a shorter way, or the limit is raised."""
        self.sql.execute(
            "INSERT INTO urls(key, url, site, prefix, kind, depth, hops, rank, state, reason) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, url, site.id, prefix.id, kind, depth, hops, 8 * depth, LEFT_OUT, TOO_DEEP),
        )
        self.counts[LEFT_OUT] += 1
        self.num_too_deep += 1
        self._know(key)

    def not_so_deep(self, key: bytes, depth: int) -> Site | None:
        """Queues a URL that was too deep and is found on a shorter way. Returns its site, None where that is not the case."""
        row = (
            self.num_too_deep
            and self.sql.execute(f"SELECT id, site FROM urls WHERE key = ? AND state = {LEFT_OUT} AND reason = ?", (key, TOO_DEEP)).fetchone()
        )
        if not row:
            return None
        self.sql.execute("UPDATE urls SET depth = ?, rank = ?, reason = '' WHERE id = ?", (depth, 8 * depth, row[0]))
        self.counts[LEFT_OUT] -= 1
        self.num_too_deep -= 1
        self._queue(row[0], self.sites[row[1]], NEW)
        return self.sites[row[1]]

    def reach(self, depth: int) -> None:
        """Queues what was too deep and is not with this limit."""
        query = f"SELECT key, depth FROM urls WHERE state = {LEFT_OUT} AND reason = ? AND depth <= ?"
        for key, found in self.sql.execute(query, (TOO_DEEP, depth)).fetchall():
            self.not_so_deep(key, found)

    def skip(self, key: bytes, reason: str) -> None:
        """Counts a URL that is not followed and of which nothing else is kept."""
        if key not in self._known:
            self.sql.execute("INSERT OR IGNORE INTO skipped VALUES(?, ?)", (key, reason))
            self._know(key)

    # -- what is fetched ------------------------------------------------------------------------------------------------

    def take(self, site: Site, new: bool = True) -> Entry | None:
        """The next URL of a site, which is in flight from now on. `new`: whether it may be one that was never stored."""
        states = "state <= 1" if new else "state = 0"
        row = self.sql.execute(f"SELECT {_ENTRY} FROM urls WHERE site = ? AND {states} ORDER BY state, rank, key LIMIT 1", (site.id,)).fetchone()
        if row is None:
            return None
        entry = Entry(*row)
        self.sql.execute("UPDATE urls SET state = ? WHERE id = ?", (LEASED, entry.id))
        self._left(entry.state, site)
        self.counts[LEASED] += 1
        return entry

    def _left(self, state: int, site: Site) -> None:
        self.counts[state] -= 1
        site.new -= state == NEW
        site.again -= state == AGAIN

    def release(self, entry: Entry) -> None:
        """Queues a URL in flight again, as if it had not been taken."""
        self._queue(entry.id, self.sites[entry.site], AGAIN if entry.stored else NEW)
        self.counts[LEASED] -= 1

    def _queue(self, number: int, site: Site, state: int) -> None:
        self.sql.execute("UPDATE urls SET state = ? WHERE id = ?", (state, number))
        self.counts[state] += 1
        site.new += state == NEW
        site.again += state == AGAIN

    def retry(self, entry: Entry, due: float, reason: str, status: int = 0) -> None:
        """A URL in flight is to be tried once more, not before `due`."""
        self.sql.execute(
            "UPDATE urls SET state = ?, tries = tries + 1, due = ?, reason = ?, status = ? WHERE id = ?", (WAITING, due, reason, status, entry.id)
        )
        self.counts[LEASED] -= 1
        self.counts[WAITING] += 1
        heapq.heappush(self.waiting, (due, entry.id, entry.site))

    def wake(self, now: float) -> list[Site]:
        """Queues what waited for this time. Returns its sites."""
        woken = []
        while self.waiting and self.waiting[0][0] <= now:
            _, number, site = heapq.heappop(self.waiting)
            stored = self.sql.execute("SELECT stored FROM urls WHERE id = ?", (number,)).fetchone()[0]
            self.counts[WAITING] -= 1
            self._queue(number, self.sites[site], AGAIN if stored else NEW)
            woken.append(self.sites[site])
        return woken

    def moved(self, entry: Entry, url: str) -> None:
        """A page in flight has another spelling, under which it is to be asked for."""
        self.sql.execute("UPDATE urls SET url = ?, hops = hops + 1 WHERE id = ?", (url, entry.id))
        self.release(entry)

    def finish(self, entry: Entry, state: int, reason: str, now: float, *, status: int = 0, pace: int = 0) -> None:
        """A URL in flight has come to its end for this time: `state` DONE, FAILED or LEFT_OUT. `pace`: see `due_again`."""
        self.sql.execute(
            "UPDATE urls SET state = ?, reason = ?, status = ?, fetched_at = ?, pace = ?, tries = tries + 1 WHERE id = ?",
            (state, reason, status, now, pace, entry.id),
        )
        self.counts[LEASED] -= 1
        self.counts[state] += 1

    def stored(self, entry: Entry, now: float, *, status: int, etag: str | None, last_modified: str | None, digest: bytes, reason: str) -> None:
        """A page in flight whose record is on the disk. `reason`: empty, or whose bytes it has."""
        pace = entry.pace if not entry.stored else max(FASTEST, entry.pace - 1)
        self.finish(entry, DONE, reason, now, status=status, pace=pace)
        self.sql.execute(
            "UPDATE urls SET etag = ?, last_modified = ?, digest = ?, stored = stored + 1 WHERE id = ?", (etag, last_modified, digest, entry.id)
        )
        self.sql.execute("INSERT OR IGNORE INTO contents VALUES(?, ?)", (digest, entry.id))
        self.pages += not entry.stored

    def with_digest(self, digest: bytes) -> str | None:
        """The URL under which these bytes were stored first."""
        row = self.sql.execute("SELECT urls.url FROM contents JOIN urls ON urls.id = contents.url WHERE contents.digest = ?", (digest,)).fetchone()
        return row and row[0]

    def close_site(self, site: Site, reason: str) -> int:
        """Leaves out what is queued of a site, until `reopen`. Returns how many URLs."""
        site.closed = reason
        self.changed(site)
        return self._close("site = ? AND state <= 1", site.id, site, reason)

    def close_prefix(self, prefix: Prefix, reason: str) -> int:
        """Leaves out what is queued under a prefix."""
        prefix.closed = reason
        self.changed(prefix)
        return self._close("site = ? AND state <= 1 AND prefix = ?", prefix.site, self.sites[prefix.site], reason, prefix.id)

    def _close(self, where: str, number: int, site: Site, reason: str, *more: int) -> int:
        gone = Counter(dict(self.sql.execute(f"SELECT state, COUNT(*) FROM urls WHERE {where} GROUP BY state", (number, *more))))
        self.sql.execute(f"UPDATE urls SET state = {LEFT_OUT}, reason = ? WHERE {where}", (reason, number, *more))
        site.new, site.again = site.new - gone[NEW], site.again - gone[AGAIN]
        self.counts.subtract(gone)
        self.counts[LEFT_OUT] += gone.total()
        return gone.total()

    def reopen(self, max_per_site: int) -> None:
        """Queues what was left out because its site did not answer: in another run it may. Or because it had given enough, where more is allowed."""
        for site in self.sites.values():
            if site.closed and site.pages < max_per_site:
                rows = self.sql.execute(f"SELECT id, stored FROM urls WHERE site = ? AND state = {LEFT_OUT} AND reason = ?", (site.id, site.closed))
                for number, stored in rows.fetchall():
                    self.counts[LEFT_OUT] -= 1
                    self.sql.execute("UPDATE urls SET tries = 0 WHERE id = ?", (number,))
                    self._queue(number, site, AGAIN if stored else NEW)
                site.closed, site.failures = "", 0
                self.changed(site)

    # -- the next visit -------------------------------------------------------------------------------------------------

    def due_again(self, now: float, interval: float) -> int:
        """Queues what is to be looked at again: what was fetched `interval` * 2^pace seconds ago. Returns how many URLs."""
        where = f"state IN ({DONE}, {FAILED}, {LEFT_OUT}) AND fetched_at > 0 AND fetched_at + ? * (1 << (pace + 4)) / 16.0 <= ?"
        rows = self.sql.execute(f"SELECT id, site, state, stored FROM urls WHERE {where}", (interval, now)).fetchall()
        for number, site, state, stored in rows:
            self.counts[state] -= 1
            self.sql.execute("UPDATE urls SET tries = 0 WHERE id = ?", (number,))
            self._queue(number, self.sites[site], AGAIN if stored else NEW)
        return len(rows)

    def next_due(self, interval: float) -> float | None:
        """When the first URL is due again; None where nothing was fetched."""
        where = f"state IN ({DONE}, {FAILED}, {LEFT_OUT}) AND fetched_at > 0"
        return self.sql.execute(f"SELECT MIN(fetched_at + ? * (1 << (pace + 4)) / 16.0) FROM urls WHERE {where}", (interval,)).fetchone()[0]

    # -- the disk -------------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        row = self.sql.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def add_seed(self, url: str) -> None:
        """A page that became a beginning, because a seed redirects to it."""
        self.set_fact("more seeds", "\n".join((*self.more_seeds(), url)))

    def more_seeds(self) -> list[str]:
        return (self.fact("more seeds") or "").split()

    def set_fact(self, name: str, value: Any) -> None:
        self.sql.execute("INSERT INTO facts VALUES(?, ?) ON CONFLICT(name) DO UPDATE SET value = excluded.value", (name, value))

    def segment(self) -> tuple[int, int, int, float]:
        """Number, bytes, pages and beginning of the segment that is open."""
        return self.sql.execute("SELECT number, bytes, pages, opened_at FROM segments WHERE sealed = 0").fetchone()

    def sealed(self) -> list[tuple[int, int]]:
        """Number and bytes of the sealed segments."""
        return self.sql.execute("SELECT number, bytes FROM segments WHERE sealed = 1").fetchall()

    def grew(self, num_bytes: int, pages: int, now: float) -> None:
        """The open segment is longer."""
        self.sql.execute(
            "UPDATE segments SET opened_at = CASE WHEN bytes THEN opened_at ELSE ? END, bytes = bytes + ?, pages = pages + ? WHERE sealed = 0",
            (now, num_bytes, pages),
        )

    def next_segment(self) -> None:
        """The open segment is full, and another begins."""
        number = self.segment()[0]
        self.sql.execute("UPDATE segments SET sealed = 1 WHERE number = ?", (number,))
        self.sql.execute("INSERT INTO segments VALUES(?, 0, 0, 0, 0)", (number + 1,))

    def commit(self) -> None:
        """Returns when all that was done is on the disk."""
        for each in self._changed.values():
            if isinstance(each, Site):
                values = (each.ready_at, each.failures, each.pages, each.found, each.closed, each.id)
                self.sql.execute("UPDATE sites SET ready_at = ?, failures = ?, pages = ?, found = ?, closed = ? WHERE id = ?", values)
            else:
                row = (each.found, each.pages, each.stale, each.closed, each.id)
                self.sql.execute("UPDATE prefixes SET found = ?, pages = ?, stale = ?, closed = ? WHERE id = ?", row)
        self._changed.clear()
        if len(self._by_id) > _REMEMBERED:
            self._by_id.clear()
            self._prefixes.clear()
        self.sql.execute("COMMIT")
        self.sql.execute("BEGIN IMMEDIATE")

    def end(self) -> None:
        """The crawl has come to rest: nothing is in flight, and all is on the disk."""
        self.sql.execute(_RELEASE)
        self.set_fact("clean", 1)
        self.commit()

    def close(self) -> None:
        """What was not committed is dropped."""
        self.sql.close()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an error of SQLite into a DataError that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        words = str(error)
        if "full" in words or "disk I/O" in words:
            raise DataError(f"could not write {path}: {words}. Free some space and run the same command again; it goes on where it was.") from error
        if "interrupted" in words:
            raise DataError(f"{path} takes too long to look into. Use cllm crawl status, which has no limit of time.") from error
        if "locked" in words or "readonly" in words or "unable to open" in words:
            raise DataError(f"{path} cannot be used: {words}. Let the program that has it open end, or make it writable.") from error
        raise DataError(
            f"{path} is damaged: {words}. Put back a copy, or begin a new crawl with another --out; the sealed segments in pages/ are whole."
        ) from error


def open_frontier(path: Path, pause_until: float = 0.0, *, read_only: bool = False, seconds: float | None = None) -> Frontier:
    """The frontier of a crawl folder, which is made when there is none. Raises DataError for a file that is none, or is damaged.

    What was in flight when a crawl was killed is queued again. Nobody knows when its sites were asked last, so none is asked before `pause_until`.
    seconds: in which everything that is asked of it has to be answered, for readers of files that anybody may have written.
    """
    with explained(path):
        place = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        sql = sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
        try:
            if seconds is not None:
                until = time.monotonic() + seconds
                sql.set_progress_handler(lambda: time.monotonic() > until, 20_000)
                sql.execute("PRAGMA trusted_schema = OFF")
            if not read_only:
                sql.execute("PRAGMA journal_mode = WAL")
                sql.execute("PRAGMA synchronous = FULL")
                sql.execute("PRAGMA cache_size = -65536")
                # URLs come in no order, so each transaction changes pages of the indexes all over the file: 64 MB of them are gathered before the
                # file itself is written, where the usual 4 MB would have it written at almost every commit of a large frontier.
                sql.execute("PRAGMA wal_autocheckpoint = 16384")
            sql.execute("PRAGMA mmap_size = 0")
            version = sql.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not read_only:
                sql.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
            elif version != FORMAT:
                raise DataError(f"{path} is of version {version}, and this is a program for version {FORMAT}. Use the version of cllm that wrote it.")
            sql.execute("BEGIN" if read_only else "BEGIN IMMEDIATE")
            return _load(path, sql, pause_until, read_only)
        except BaseException:
            sql.close()
            raise


def _load(path: Path, sql: sqlite3.Connection, pause_until: float, read_only: bool) -> Frontier:
    sites = {row[0]: Site(*row) for row in sql.execute("SELECT id, name, ready_at, failures, pages, found, closed FROM sites")}
    if not read_only:
        if next(iter(sql.execute("PRAGMA quick_check(1)")))[0] != "ok":
            raise sqlite3.DatabaseError("it fails its own check")
        if next(sql.execute("SELECT value FROM facts WHERE name = 'clean'"), (0,)) != (1,):
            for site in sites.values():
                site.ready_at = max(site.ready_at, pause_until)
            sql.execute(_RELEASE)
        sql.execute("INSERT INTO facts VALUES('clean', 0) ON CONFLICT(name) DO UPDATE SET value = 0")
    counts = Counter(dict(sql.execute("SELECT state, COUNT(*) FROM urls GROUP BY state")))
    for number, state, count in sql.execute("SELECT site, state, COUNT(*) FROM urls WHERE state <= 1 GROUP BY site, state"):
        sites[number].new, sites[number].again = (count, sites[number].again) if state == NEW else (sites[number].new, count)
    waiting = sql.execute(f"SELECT due, id, site FROM urls WHERE state = {WAITING}").fetchall()
    heapq.heapify(waiting)
    pages = sql.execute("SELECT COUNT(*) FROM urls WHERE stored > 0").fetchone()[0]
    (deep,) = sql.execute(f"SELECT COUNT(*) FROM urls WHERE state = {LEFT_OUT} AND reason = ?", (TOO_DEEP,)).fetchone()
    return Frontier(path, sql, sites, counts, pages, deep, waiting)
