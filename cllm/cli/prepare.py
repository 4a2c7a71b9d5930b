"""`cllm prepare`: files of any kind to clean documents, ready to train on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm.cli.console import Console, open_console, table
from cllm.cli.interrupt import stopping_with
from cllm.cli.options import Json, argument, examples, option, text_option
from cllm.files import DATA, check_writable
from cllm.runtime.errors import UserError
from cllm.runtime.quantities import counted, size
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.data.preparation.manifest import Prepared
    from cllm.data.preparation.recipe import Recipe

STOPPED = "interrupted; nothing is lost: the same command goes on where this one stopped"
SHOWN_REASONS, SHOWN_FILES = 8, 5
BESIDE = (("evaluation", "text for evaluation"), ("examples", "examples of good text"))

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm prepare papers/ notes.zip --out prepared/",
        "cllm prepare crawled/ books/ --out prepared/ --epochs books=2 --exclude tests/",
        "cllm prepare shared/pages/ --out shared/prepared/ --runner dask://127.0.0.1:8786",
    )
)
def prepare(
    sources: Annotated[
        list[str], argument("SRC...", "Folders, files, archives (zip, tar, gz, xz, zst), records (JSON, CSV, Parquet), crawls, WARC.")
    ],
    out: Annotated[Path, option("--out", Path, "Folder for the documents. It remembers what was done, so only what has changed is done again.")],
    workers: Annotated[
        int | None,
        option(
            "--workers",
            int,
            "Processes that work at once. Any number gives the same bytes. [default: all usable cores]",
            unit="processes",
            optional=True,
            at_least=1,
            at_most=4096,
            example=2,
        ),
    ] = None,
    no_filter: Annotated[bool, typer.Option("--no-filter", help="Keep documents whatever they are like: no rule about quality drops any.")] = False,
    no_dedup: Annotated[bool, typer.Option("--no-dedup", help="Keep exact and near duplicates.")] = False,
    ocr: Annotated[bool, typer.Option("--ocr", help="Read images and scanned pages by character recognition (pip install 'cllm[ocr]').")] = False,
    passwords: Annotated[
        list[str] | None, text_option("--password", "Password of encrypted files. Can be given several times; each is tried.", metavar="TEXT")
    ] = None,
    text_field: Annotated[
        str, text_option("--text-field", "Field of records that holds the text. [default: the one that looks like it]", metavar="NAME")
    ] = "",
    rules: Annotated[
        list[str] | None,
        text_option(
            "--rule", "Change a rule for all sources, or for one. Can be given several times; off switches it off.", metavar="[SRC:]NAME=VALUE"
        ),
    ] = None,
    like: Annotated[
        Path | None, option("--like", Path, "Folder with examples of good text: documents are scored by how alike they are, and the worst dropped.")
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        option(
            "--exclude",
            Path,
            "Folder of text for evaluation: documents with a part of it (13 words in a row) are dropped. Can be given several times.",
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        option("--against", Path, "Folder that was prepared before: its documents count as seen. Can be given several times."),
    ] = None,
    epochs: Annotated[
        list[str] | None, text_option("--epochs", "How often each document of a source is taken: 2 is twice, 0.5 every second.", metavar="SRC=N")
    ] = None,
    weight: Annotated[
        list[str] | None,
        text_option("--weight", "Share of a source in the text beside those of the others; for all sources or none.", metavar="SRC=N"),
    ] = None,
    cap: Annotated[list[str] | None, text_option("--cap", "The most text to take of a source, as in 500MB.", metavar="SRC=SIZE")] = None,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Go on where a source loses more than half of its documents as near duplicates.")
    ] = False,
    runner: Annotated[
        str,
        text_option(
            "--runner", "Where the work is done: pool (this machine), dask://HOST:PORT, tls://HOST:PORT, ray://HOST:PORT.", metavar="ADDRESS"
        ),
    ] = "pool",
    as_json: Json = False,
) -> None:
    """Turn files of any kind into clean documents to train on. Text is extracted, cleaned, filtered and deduplicated. Files that cannot be read are
    reported and stop nothing. `cllm train` reads the folder as it is; report.html in it tells what came, what went and why."""
    console = open_console(as_json, needs_reader=False)
    check_writable(out, DATA)
    from cllm.data.preparation.inputs import find_sources
    from cllm.data.preparation.plan import prepare as run
    from cllm.data.preparation.recipe import read_mix
    from cllm.data.preparation.runner import runner_of
    from cllm.report.prepared import write_prepared_report

    with stopping_with(STOPPED):
        mixes = {name: values for name, values in (("epochs", epochs), ("weight", weight), ("cap", cap)) if values}
        recipe = _recipe(
            no_filter,
            no_dedup,
            ocr,
            passwords,
            text_field,
            rules,
            exclude,
            against,
            like,
            read_mix(mixes, find_sources(sources, out) if mixes else []),
        )
        where = runner_of(runner, workers or len(os.sched_getaffinity(0)))
        try:
            prepared = run(sources, out, recipe, where, lambda question: allow_loss or _confirmed(question, as_json))
        finally:
            where.close()
        report = write_prepared_report(prepared)
    _tell(console, prepared, report)
    console.result({"out": str(out), "report": str(report), "digest": prepared.digest, **{k: v for k, v in prepared.summary.items() if k != "tally"}})


def _recipe(
    no_filter: bool,
    no_dedup: bool,
    ocr: bool,
    passwords: list[str] | None,
    text_field: str,
    rules: list[str] | None,
    exclude: list[Path] | None,
    against: list[Path] | None,
    like: Path | None,
    mixes: Any,
) -> Recipe:
    from cllm.data.preparation.recipe import Recipe

    extraction: dict[str, Any] = {}
    if ocr:
        extraction["ocr"] = True
    if passwords:
        extraction["passwords"] = passwords
    if text_field:
        extraction["text_field"] = text_field
    changed = {}
    for each in rules or []:
        name, equals, value = each.partition("=")
        if not equals:
            raise UserError(f"--rule must be NAME=VALUE, got {each!r}. Use something like --rule gopher_min_words=20 or --rule mojibake=off.")
        changed[name.strip()] = value.strip()
    return Recipe(
        filter=not no_filter,
        dedup=not no_dedup,
        rules=changed,
        extraction=extraction,
        mixes=mixes,
        against=[str(place) for place in against or []],
        exclude=[str(place) for place in exclude or []],
        like="" if like is None else str(like),
    )


def _confirmed(question: str, as_json: bool) -> bool:
    """Asks a person, where there is one."""
    if as_json or not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{question}. Drop them? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _tell_beside(console: Console, read: dict[str, Any] | None, what: str) -> None:
    """What of the text for evaluation, or of the examples, could not be heeded."""
    if read is None:
        return
    console.print(f"  {what}: {counted(read['texts'], 'text')} in {', '.join(read['places'])}")
    for path, reason in read["unread"][:SHOWN_FILES]:
        console.print(f"    not heeded: {path}: {reason}")
    if read["num_unread"] > SHOWN_FILES:
        console.print(f"    and {counted(read['num_unread'] - SHOWN_FILES, 'other file')} that could not be read, see the report")


def _tell(console: Console, prepared: Prepared, report: Path) -> None:
    """The summary for a person: what came, what was kept, what went and why, and what to do next."""
    from cllm.data.clean.rules import Rules

    summary, found = prepared.summary, prepared.summary["tally"]
    dropped = summary["documents"] - summary["kept"]
    console.print(f"{counted(summary['files'], 'file')} gave {counted(summary['documents'], 'document')}.")
    console.print(f"  kept     {summary['kept']:,}  ({size(summary['kept_chars'])} of text)")
    console.print(f"  dropped  {dropped:,}{':' if dropped else ''}")
    reasons: dict[str, int] = {}
    for counts in found["sources"].values():
        for reason, count in counts["dropped"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    if ordered:
        console.print(table([(f"{count:,}".rjust(9), reason) for reason, count in ordered[:SHOWN_REASONS]], indent="    "))
    if len(ordered) > SHOWN_REASONS:
        console.print(f"    and for {counted(len(ordered) - SHOWN_REASONS, 'other reason')}")
    if ordered and 2 * ordered[0][1] > summary["documents"] and hasattr(Rules, ordered[0][0]) and ordered[0][0] != "max_evaluation_overlap":
        console.print(f"  One rule dropped more than half. Where it should not: --rule {ordered[0][0]}=off, or --no-filter for all of its kind.")
    for source, path, reason in found["unreadable"][:SHOWN_FILES]:
        console.print(f"  {source}/{path}: {reason}")
    if found["without_text"] > SHOWN_FILES:
        console.print(f"  and {counted(found['without_text'] - SHOWN_FILES, 'other file')} without text, see the report")
    for name, what in BESIDE:
        _tell_beside(console, summary[name], what)
    console.print(f"What came, what went and why, with samples: {report}")
    if summary["kept"]:
        console.print(f"Next: {command('train', prepared.folder)}")
    else:
        hint = "; --no-filter keeps what the rules dropped" if any(hasattr(Rules, reason) for reason in reasons) else ""
        console.print(f"Nothing was kept, so there is nothing to train on. The report says why{hint}.")
