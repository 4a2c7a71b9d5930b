"""What a crawl was asked for, as crawl.json keeps it, and the folder that it owns."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.files import DATA, reported, write_file
from cllm.runtime.errors import DataError, UserError

SETTINGS, DATABASE, PAGES, LOCK = "crawl.json", "crawl.sqlite", "pages", "crawl.sqlite.lock"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to crawl. What names an address of this machine or network (`--allow-private`) is not kept: a folder must not open one on its own."""

    seeds: tuple[str, ...] = ()
    max_pages: int | None = None
    """Pages stored in all."""
    max_per_site: int = 100_000
    """Pages stored of one site."""
    depth: int = 20
    """Links from a seed."""
    delay: float = 2.0
    """Seconds between an answer and the next request to the same site or address."""
    timeout: float = 30.0
    """Seconds for a whole request."""
    retries: int = 3
    """Tries after the first."""
    max_bytes: int = 10_000_000
    """Of a page, after decompression."""
    scope: str = "host"
    """host, domain or prefix."""
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    """Patterns of URLs, as `cllm.data.sources.scope.Patterns` reads them."""
    types: tuple[str, ...] = ()
    """Content types that are stored; empty: those that `cllm prepare` reads."""
    sitemaps: bool = True
    feeds: bool = True
    content_signals: bool = True
    """Whether a site or page is left out that asks not to be trained on (Content-Signal: ai-train=no)."""
    browser: bool = False
    """Whether the scripts of pages are run."""
    contact: str = ""
    """In the user agent: whom a site's owner can write to."""
    revisit: float = 86400.0
    """Seconds after which a page is due again for the first time."""

    def to_json(self) -> dict[str, Any]:
        return {"format": _FORMAT, **{name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}}


def read_settings(folder: Path) -> Settings | None:
    """The settings of a crawl folder; None where there is no crawl. Raises DataError for a file that is not what was written."""
    path = folder / SETTINGS
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format") != _FORMAT:
            raise ValueError("its format is of another version")
        values = {"content_signals": True, "browser": False, **values}  # crawls that were begun before there were these
        known = {each.name: each for each in dataclasses.fields(Settings)}
        if set(values) != set(known):
            raise ValueError(f"it should hold {', '.join(sorted(known))}")
        defaults = Settings()
        for name, value in values.items():
            expected = getattr(defaults, name)
            kinds: Any = {tuple: list, float: (int, float), type(None): (int, type(None))}.get(type(expected), type(expected))
            if not isinstance(value, kinds) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
                raise ValueError(f"{name} is {value!r}")
        read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return Settings(**read)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Put it right, or begin a new crawl with another --out.") from error


def write_settings(folder: Path, settings: Settings) -> None:
    write_file(folder / SETTINGS, (json.dumps(settings.to_json(), indent=2) + "\n").encode(), DATA)


def merged(before: Settings | None, given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The settings to go on with: what is given now (not None), else what was stored, else the defaults. And what changes, in words.

    Seeds are added to those that the crawl has.
    """
    base = before or Settings()
    values = {name: value for name, value in given.items() if value is not None}
    seeds = tuple(dict.fromkeys((*base.seeds, *values.pop("seeds", ()))))
    now = dataclasses.replace(base, seeds=seeds, **values)
    if before is None:
        return now, []
    changes = [
        f"{_option(each.name)} is now {_words(new)}; it was {_words(old)}"
        for each in dataclasses.fields(Settings)
        if each.name != "seeds" and (new := getattr(now, each.name)) != (old := getattr(before, each.name))
    ]
    return now, [*(f"{seed} is one more beginning" for seed in seeds[len(base.seeds) :]), *changes]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _words(value: Any) -> str:
    return (
        "not limited"
        if value is None
        else " ".join(value) or "not given"
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


class CrawlLock:
    """Held by the process that crawls into a folder; the kernel releases it however the process ends. A context manager. Raises UserError."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        with reported(folder, DATA):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+")  # noqa: SIM115 (closing it would release the lock)
        for left in reversed(range(5)):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:  # `is_running` holds it for a moment as well
                if not left:
                    self._file.close()
                    raise UserError(f"{folder} is being crawled by {_holder(self._path)}. Wait for it, stop it, or choose another --out.") from error
            time.sleep(0.05)
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def __enter__(self) -> CrawlLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _holder(path: Path) -> str:
    number = path.read_text().strip()
    return f"process {number}" if number else "another process"


def is_running(folder: Path) -> str | None:
    """The process that crawls into a folder, in words; None where nobody does."""
    path = folder / LOCK
    if not path.exists():
        return None
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return _holder(path)
    return None
