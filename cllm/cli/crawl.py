"""`cllm crawl`: pages of web sites into a folder that `cllm prepare` reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm.cli.console import Console, open_console, readable, table
from cllm.cli.crawl_training import training_beside
from cllm.cli.options import examples, option, text_argument, text_option
from cllm.files import DATA, check_writable
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.progress import Progress, duration, say
from cllm.runtime.quantities import counted, size
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.data.sources.browser import Browser
    from cllm.data.sources.crawl import Figures
    from cllm.data.sources.settings import Settings
    from cllm.data.sources.summary import Summary

SCOPES = ("host", "domain", "prefix")
EVENT_SECONDS = 2.0  # between two lines of progress under --json
_PAUSING = "pausing: what has arrived is brought to the disk (Ctrl-C again to end at once; no stored page would be lost)"

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm crawl https://docs.example.org/ --max-pages 1000 --contact you@example.org --out pages/",
        "cllm crawl --out pages/                        (go on, or look again at what is due)",
        "cllm crawl status pages/",
        "cllm prepare pages/ --out corpus/",
    )
)
def crawl(
    urls: Annotated[list[str] | None, text_argument("URL...", "Where to begin; or `status` and the folder of a crawl.")] = None,
    out: Annotated[Path | None, option("--out", Path, "Folder for the pages.")] = None,
    max_pages: Annotated[
        int | None, option("--max-pages", int, "Pages to store in all. [default: not limited]", unit="pages", optional=True, at_least=1)
    ] = None,
    depth: Annotated[
        int | None, option("--depth", int, "Links to follow from a beginning. [default: 20]", unit="links", optional=True, at_least=0)
    ] = None,
    delay: Annotated[
        float | None,
        option(
            "--delay",
            float,
            "Seconds between requests to a site; up to half of it more. [default: 2]",
            unit="s",
            optional=True,
            at_least=0,
            at_most=86400,
        ),
    ] = None,
    timeout: Annotated[
        float | None, option("--timeout", float, "Seconds for a whole request. [default: 30]", unit="s", optional=True, above=0, at_most=3600)
    ] = None,
    retries: Annotated[
        int | None, option("--retries", int, "Tries after the first that failed. [default: 3]", unit="tries", optional=True, at_least=0, at_most=3)
    ] = None,
    max_bytes: Annotated[
        int | None, option("--max-bytes", int, "Largest page in bytes, unpacked. [default: 10000000]", unit="bytes", optional=True, at_least=1)
    ] = None,
    max_per_site: Annotated[
        int | None, option("--max-per-site", int, "Pages to store of one site. [default: 100000]", unit="pages", optional=True, at_least=1)
    ] = None,
    scope: Annotated[
        str | None,
        option(
            "--scope",
            str,
            "What belongs to a URL: its host and port, its domain, or what begins like it. [default: host]",
            optional=True,
            choices=("host", "domain", "prefix"),
        ),
    ] = None,
    allow: Annotated[list[str] | None, text_option("--allow", "Only URLs like this: /docs/ or /*.html$. Repeatable.")] = None,
    deny: Annotated[list[str] | None, text_option("--deny", "No URLs like this. Repeatable.")] = None,
    types: Annotated[list[str] | None, text_option("--type", "Content type to store, such as text/html or text/*. Repeatable.")] = None,
    sitemaps: Annotated[bool | None, typer.Option("--sitemaps/--no-sitemaps", help="Read sitemaps. [default: yes]", show_default=False)] = None,
    feeds: Annotated[bool | None, typer.Option("--feeds/--no-feeds", help="Read RSS and Atom feeds. [default: yes]", show_default=False)] = None,
    content_signals: Annotated[
        bool | None,
        typer.Option(
            "--content-signals/--ignore-content-signals",
            help="Leave out what asks not to be trained on (ai-train=no). [default: yes]",
            show_default=False,
        ),
    ] = None,
    revisit: Annotated[
        float | None,
        option(
            "--revisit",
            float,
            "Seconds after which a page is due again; sooner where it changes. [default: 86400]",
            unit="s",
            optional=True,
            at_least=0,
        ),
    ] = None,
    browser: Annotated[
        bool | None,
        typer.Option("--browser/--no-browser", help="Run the scripts of pages, in a Chromium without network. [default: no]", show_default=False),
    ] = None,
    contact: Annotated[str | None, text_option("--contact", "Web or e-mail address in the user agent, for the owners of sites.")] = None,
    allow_private: Annotated[
        list[str] | None,
        text_option("--allow-private", "Address of this machine or network to reach. Repeatable; not stored.", "ADDRESS"),
    ] = None,
    train: Annotated[
        Path | None, option("--train", Path, "Run that learns the pages as they come, in rounds. For its settings use cllm train --follow.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON lines on stdout, the result last.")] = False,
) -> None:
    """Crawl web sites. Obeys robots.txt and signals against training, asks one site for one page at a time, and keeps pages as WARC. The same
    command goes on after a pause or a crash, and later looks again at pages that are due."""
    console = open_console(as_json)
    if urls and urls[0] == "status":
        _status(urls[1:], console)
        return
    if out is None:
        raise UserError("--out is missing: the folder for the pages. Example: cllm crawl https://example.org/ --out pages/")
    given: dict[str, Any] = {
        "seeds": _seeds(urls or []),
        "max_pages": max_pages,
        "depth": depth,
        "delay": delay,
        "timeout": timeout,
        "retries": retries,
        "max_bytes": max_bytes,
        "max_per_site": max_per_site,
        "scope": scope,
        "allow": tuple(allow) if allow else None,
        "deny": tuple(deny) if deny else None,
        "types": tuple(types) if types else None,
        "sitemaps": sitemaps,
        "feeds": feeds,
        "content_signals": content_signals,
        "revisit": revisit,
        "browser": browser,
        "contact": contact,
    }
    check_writable(out, DATA)
    from cllm.data.sources.addresses import Guard
    from cllm.data.sources.fetch import agent
    from cllm.data.sources.scope import Patterns
    from cllm.data.sources.settings import CrawlLock, merged, read_settings, write_settings

    guard = Guard(allow_private or [])
    before = read_settings(out)
    settings, changes = merged(before, given)
    agent(settings.contact)
    Patterns(settings.allow, settings.deny)
    if not settings.seeds:
        raise UserError(f"{out} holds no crawl yet, so say where to begin. Example: cllm crawl https://example.org/ --out {out}")
    if before is None and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds other files and no crawl. Choose a new folder with --out.")
    with _browser(settings) as chromium, CrawlLock(out), training_beside(out, train, console):
        write_settings(out, settings)
        for change in changes:
            say(f"{change}.")
        _crawl(out, settings, guard, chromium, console)


def _seeds(texts: list[str]) -> tuple[str, ...]:
    from cllm.data.sources.urls import BadURL, clean

    seeds = []
    for text in texts:
        try:
            seeds.append(clean(text))
        except BadURL as error:
            hint = f" Did you mean https://{text}?" if text and "://" not in text else ""
            raise UserError(f"{text!r} cannot be crawled: {error}.{hint}") from error
    return tuple(seeds)


@contextmanager
def _browser(settings: Settings) -> Iterator[Browser | None]:
    """What runs the scripts of pages, where they are to be run. Raises DataError where it is not there."""
    if not settings.browser:
        yield None
        return
    from cllm.data.sources.browser import Browser

    with Browser() as chromium:
        if not chromium.is_sandboxed:
            say("Chromium has no sandbox as root, nor where users get no namespaces: what breaks out of a page has your rights, without a network.")
        yield chromium


def _crawl(out: Path, settings: Settings, guard: Any, chromium: Browser | None, console: Console) -> None:
    from cllm.data.sources.crawl import Crawl
    from cllm.data.sources.summary import read_summary
    from cllm.monitor.stop_signals import Interrupted, StopSignals

    told = _Told(console, settings)
    with StopSignals(lambda name: None, _PAUSING) as signals, Progress(settings.max_pages, "crawling", unit="pages") as line:
        crawl = Crawl(
            out,
            settings,
            guard,
            browser=chromium,
            stop=lambda: signals.asked is not None,
            tell=lambda each: told.figures(each, line),
            sealed=told.sealed,
        )
        told.event("begun", out=str(out), seeds=list(settings.seeds))
        is_done = crawl.run()
    _, summary, due = read_summary(out)
    for row in _lines(summary):
        console.print(row)
    if not is_done:
        console.result({"event": "paused", "out": str(out), **summary.to_json()})
        raise Interrupted(f"paused with {summary.queued + summary.waiting:,} URLs to go; the same command goes on")
    if not summary.pages:
        reasons = [*summary.failed, *summary.left_out, *summary.not_queued]
        why = reasons[0] if reasons else ""
        meant = "Where that is meant, run it again with --allow-private and the address"
        again = meant if "refused: " in why else "Run the same command again once that is put right"
        raise DataError(f"no page was stored{': ' + why if why else ''}. {again}.")
    more = summary.queued + summary.waiting
    if more:
        console.print(f"--max-pages is reached; {more:,} URLs are still queued. A larger --max-pages goes on with them.")
    elif due is not None and due > time.time():
        console.print(
            f"All that was found is fetched. The next page is due again in {duration(due - time.time())}; the same command looks at it then."
        )
    console.print(f"next: {command('prepare', out, '--out', out.with_name(f'{out.name}-prepared'))}")
    console.result({"event": "done", "out": str(out), **summary.to_json()})


class _Told:
    """What is told while a crawl goes on: the live line, and under --json one event a line on stdout."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self._console, self._settings, self._due = console, settings, 0.0

    def event(self, name: str, **values: Any) -> None:
        if self._console.as_json:
            self._console.event({"event": name, **values})

    def sealed(self, path: Path) -> None:
        self.event("sealed", path=str(path))

    def figures(self, now: Figures, line: Progress) -> None:
        words = f"{now.pages:,} pages  {now.pages_per_second:,.1f}/s  {now.queued:,} queued  {now.failed:,} errors"
        line.update(now.pages, words + (f"  {now.waiting:,} to retry" if now.waiting else ""))
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVENT_SECONDS
            self.event("progress", **vars(now))


def _lines(summary: Summary) -> list[str]:
    doubles = f", {summary.duplicates:,} of them with the bytes of another" if summary.duplicates else ""
    stored = f"in {counted(summary.segments, 'file')} of {size(summary.bytes)}"
    lines = [f"{counted(summary.pages, 'page')}{doubles}, of {counted(summary.sites, 'site')}, {stored}"]
    if summary.rendered:
        lines.append(f"scripts were run on {counted(summary.rendered, 'page')}")
    titles = ("kept as they came, their scripts not run", "failed", "left out", "links not followed")
    for title, reasons in zip(titles, (summary.not_rendered, summary.failed, summary.left_out, summary.not_queued)):
        if reasons:
            lines.append(f"{title}: {sum(reasons.values()):,}")
            lines.append(table([(f"{count:,}", reason) for reason, count in list(reasons.items())[:12]], indent="    "))
    return lines


def _status(folders: list[str], console: Console) -> None:
    from cllm.data.sources.settings import is_running
    from cllm.data.sources.summary import read_summary

    if len(folders) != 1:
        raise UserError("say which folder: cllm crawl status DIR")
    folder = Path(folders[0])
    settings, summary, due = read_summary(folder)
    holder = is_running(folder)
    state = f"running ({holder})" if holder else "to be continued" if summary.queued + summary.waiting else "done"
    rows = [("state", state), ("beginnings", " ".join(settings.seeds)), ("queued", readable(summary.queued)), ("to retry", readable(summary.waiting))]
    if due is not None:
        rows.append(("next visit", "now" if due <= time.time() else f"in {duration(due - time.time())}"))
    console.print(table(rows))
    for row in _lines(summary):
        console.print(row)
    console.result({"out": str(folder), "state": state, "next_due": due, **summary.to_json()})
