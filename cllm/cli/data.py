"""`cllm data`: what is in a folder that `cllm prepare` has made."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from cllm.cli.console import open_console, readable, table
from cllm.cli.options import Json, argument, examples, option, text_argument
from cllm.runtime.printable import printable
from cllm.runtime.progress import Stage
from cllm.runtime.quantities import counted

AROUND = 60  # characters of a text on each side of what was found
SHOWN = 20  # lines of a list

app = typer.Typer()
group = typer.Typer(help="Look into prepared data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="data")

Folder = Annotated[str, argument("DIR", "A folder that `cllm prepare` has made.")]
Count = Annotated[int, option("--count", int, "Documents to show at most.", at_least=1, example=20)]


@group.command(
    "show", epilog=examples("cllm data show prepared/", "cllm data show prepared/ report.pdf", "cllm data show prepared/ 000000000000002a")
)
def show(
    folder: Folder,
    document: Annotated[
        str | None, text_argument("DOCUMENT", "Its id, its address or the end of its path. [default: a list of the first ones]")
    ] = None,
    dropped: Annotated[bool, typer.Option("--dropped", help="List documents that were dropped, with their reasons.")] = False,
    count: Count = 20,
    as_json: Json = False,
) -> None:
    """Show one document with all that is known of it, or list documents."""
    console = open_console(as_json)
    from cllm.data.preparation.look import find_document
    from cllm.data.preparation.manifest import open_prepared
    from cllm.data.preparation.rows import read_rows

    prepared = open_prepared(Path(folder))
    if document is not None:
        with Stage("Looking for the document"):
            row = find_document(prepared, document)
        console.print(table([(name.replace("_", " "), printable(value)) for name, value in row.items() if value and name != "text"]))
        console.print()
        console.write(row["text"] + "\n")
        console.result(row)
        return
    rows = (row for place in prepared.paths(kept=not dropped) for row in read_rows(place))
    first = list(itertools.islice(rows, count))
    lines = [_line(row) for row in first]
    console.print(table(lines) if lines else "no documents")
    summary = prepared.summary
    in_all = summary["documents"] - summary["kept"] if dropped else summary["kept"]
    if in_all > len(first):
        console.print(f"{len(first):,} of {counted(in_all, 'document')}; see --count")
    console.result({"documents": [{name: value for name, value in row.items() if name != "text"} for row in first]})


@group.command(
    "search",
    epilog=examples(
        "cllm data search prepared/ 'heat pump'", "cllm data search prepared/ '\"heat pump\" noise'", "cllm data search prepared/ encrypted --dropped"
    ),
)
def search(
    folder: Folder,
    words: Annotated[
        str,
        text_argument("WORDS", "Words, all to be in text, title, path, URL or reason; those between double quotes in a row."),
    ],
    regex: Annotated[bool, typer.Option("--regex", help="WORDS is a regular expression.")] = False,
    dropped: Annotated[bool, typer.Option("--dropped", help="Only documents that were dropped.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Only documents that were kept.")] = False,
    count: Count = 20,
    as_json: Json = False,
) -> None:
    """Find documents by their words, also among those that were dropped."""
    console = open_console(as_json)
    from cllm.data.preparation.look import search as find
    from cllm.data.preparation.manifest import open_prepared

    which = None if kept == dropped else dropped
    found: list[dict[str, Any]] = []
    for row, place in itertools.islice(find(open_prepared(Path(folder)), words, regex=regex, dropped=which), count):
        around = " ".join(row["text"][max(0, place - AROUND) : place + AROUND].split()) if place >= 0 else ""
        console.print("  ".join(each for each in _line(row) if each))
        if around:
            console.print(f"    ... {around} ...")
        found.append({name: row[name] for name in ("id", "source", "path", "url", "dropped_because")} | {"around": around})
    console.print(f"{counted(len(found), 'document')}{' and perhaps more; see --count' if len(found) == count else ''}")
    console.result({"documents": found})


@group.command("stats", epilog=examples("cllm data stats prepared/"))
def stats(folder: Folder, as_json: Json = False) -> None:
    """Count documents by source, language and reason."""
    console = open_console(as_json)
    from cllm.data.preparation.look import figures
    from cllm.data.preparation.manifest import open_prepared

    values = figures(open_prepared(Path(folder)))
    console.print(table([(name, readable(values[name])) for name in ("documents", "kept", "characters", "shards", "digest")]))
    for title, rows in (
        ("sources", [(name, f"{each['kept']:,} kept", f"{each['dropped']:,} dropped") for name, each in values["sources"].items()]),
        ("dropped because", [(reason, f"{number:,}") for reason, number in values["dropped_because"].items()]),
        ("languages", [(name, f"{number:,}") for name, number in values["languages"].items()]),
    ):
        if rows:
            console.print(f"{title}:")
            console.print(table([tuple(printable(cell) for cell in row) for row in rows[:SHOWN]], indent="    "))
    console.result(values)


@group.command("diff", epilog=examples("cllm data diff prepared-old/ prepared/"))
def diff(
    old: Annotated[str, argument("OLD", "A folder that `cllm prepare` has made.")],
    new: Annotated[str, argument("NEW", "Another one.")],
    as_json: Json = False,
) -> None:
    """Tell what two prepared folders differ in. Documents came, went, changed, or were decided otherwise."""
    console = open_console(as_json)
    from cllm.data.preparation.look import difference
    from cllm.data.preparation.manifest import open_prepared

    both = [open_prepared(Path(each)) for each in (old, new)]
    with Stage("Comparing documents"):
        found = difference(*both)
    if not any(found.values()):
        console.print("no difference")
    for kind, entries in found.items():
        if entries:
            console.print(f"{kind}: {len(entries):,}")
            for place, before, after in entries[:SHOWN]:
                reasons = f"  ({before or 'kept'} -> {after or 'kept'})" if before != after and kind not in ("added", "removed") else ""
                console.print(f"  {printable(place)}{reasons}")
            if len(entries) > SHOWN:
                console.print(f"  and {len(entries) - SHOWN:,} more")
    console.result(found)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    """A document in a list."""
    place = row["url"] or f"{row['source']}/{row['path']}"
    return row["id"], printable(place), f"{len(row['text']):,} characters", row["dropped_because"]
