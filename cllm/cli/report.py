"""`cllm report`: one HTML page about runs."""

from pathlib import Path
from typing import Annotated

import typer

from cllm.cli.console import open_console
from cllm.cli.options import Json, argument, examples, option

app = typer.Typer()


@app.command(epilog=examples("cllm report runs/demo", "cllm report runs/small runs/large --out comparison.html"))
def report(
    runs: Annotated[list[str], argument("RUN...", "Folders of training runs: one for its report, several to compare them.")],
    out: Annotated[
        Path | None, option("--out", Path, "File to write. [default: report.html in RUN, or comparison.html in the first of several]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an HTML page about a run. It shows curves, gradients, events, samples and settings, and loads nothing from elsewhere. Several runs are
    compared on one page."""
    console = open_console(as_json)
    from cllm.report import write_report

    place, found = write_report(runs, out)
    for run in found:
        for problem in run.problems:
            console.print(f"{run.name}: {problem}")
    console.print(f"wrote {place}")
    best = [{"name": run.name, "step": run.last_step, "best_loss": run.best and run.best[1], "best_step": run.best and run.best[0]} for run in found]
    console.result({"out": str(place), "runs": best})
