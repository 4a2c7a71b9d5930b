"""`cllm crawl --train RUN`: a second process that follows the pages as they come, and a last look when the crawl is done."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from cllm.cli.console import Console
from cllm.files import RUN, check_writable
from cllm.shell import command

LOG = "follow.log"


@contextmanager
def training_beside(crawl: Path, run: Path | None, console: Console) -> Iterator[None]:
    """Follows the pages of a crawl with `cllm train --follow` while the block runs; its words go to RUN/follow.log. run None: nothing is done.

    When the block ends it is stopped, with a checkpoint. Only where the block was not interrupted does it then learn what is left, in the foreground.
    Crawl and training share nothing but finished files, so either may crash or be started again without the other.
    """
    if run is None:
        yield
        return
    check_writable(run, RUN)
    run.mkdir(parents=True, exist_ok=True)
    follow = [sys.executable, "-m", "cllm", "train", str(crawl), "--follow", "--out", str(run)]
    with open(run / LOG, "ab") as log:
        beside = subprocess.Popen(follow, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        console.print(f"training on the pages as they come in {run}; see {run / LOG}")
        try:
            yield
        finally:
            if beside.poll() is None:
                beside.send_signal(signal.SIGINT)
            beside.wait()
    last = subprocess.run([*follow, "--once"], stdin=subprocess.DEVNULL, stdout=sys.stderr if console.as_json else None)
    if last.returncode:
        console.print(f"The pages are stored; training on them has stopped as told above. To go on with it: {command(*follow[3:])}")
        raise typer.Exit(last.returncode)
