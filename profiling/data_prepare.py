"""`cllm prepare` on a mix of English prose, documentation and manuals: how long, how much text, and whether the bytes are the same.

    apt-get download anarchism bible-kjv-text bible-kjv linux-doc-6.1 python3.11-doc perl-doc git-doc llvm-14-doc dict-foldoc dict-jargon dict-devil
    python profiling/data_prepare.py --packages FOLDER_OF_DEB_FILES --work /tmp/mix
    python profiling/data_prepare.py --packages FOLDER_OF_DEB_FILES --work /tmp/mix --workers 1 2 --write data_prepare
    python profiling/data_prepare.py --packages FOLDER_OF_DEB_FILES --work /tmp/mix --datatrove PYTHON_THAT_HAS_IT

The packages (Debian 12) are unpacked with `dpkg-deb`, never installed. Each row is one run of the command into a new folder. The first run of all
compiles and is not counted, so the figures are warm.

With --datatrove the same files go through datatrove's local executor in turn (see datatrove_worker.py). The filters are the same by name and
threshold, and so are the duplicates' bands; what differs favours datatrove. It stops at the first filter that drops a document, where ours measures
all for the report; it does not tell languages (its model is a download), mend characters, look for secrets, compare candidates before it drops them,
or read its files in processes of their own. It keeps fewer documents, because punctuation counts among its words.
"""

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from report import add_output_options, finish, print_table, run

PACKAGES = (
    "anarchism", "bible-kjv-text", "bible-kjv", "linux-doc-6.1", "python3.11-doc", "perl-doc", "git-doc", "llvm-14-doc", "dict-foldoc", "dict-jargon",
    "dict-devil",
)  # fmt: skip
TASKS = 4  # of datatrove for each worker
# Name in the mix, pattern below the unpacked packages.
PARTS = (
    ("anarchism", "usr/share/doc/anarchism/**/*.md*"),
    ("linux", "usr/share/doc/linux-doc-6.1/Documentation/**/*.rst*"),
    ("linux", "usr/share/doc/linux-doc-6.1/Documentation/**/*.txt*"),
    ("python", "usr/share/doc/python3.11/**/*.txt"),
    ("perl", "usr/share/perl/**/*.pod"),
    ("llvm", "usr/share/doc/llvm-14-doc/**/*.txt"),
    ("git", "usr/share/doc/git-doc/**/*.txt"),
    ("dictionaries", "usr/share/dictd/*.dict.dz"),
)


def make_mix(packages: Path, work: Path) -> Path:
    """The folder of the mix: the text files of the packages, unpacked, each under its own name."""
    mix, unpacked = work / "mix", work / "unpacked"
    if mix.is_dir():
        return mix
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    for name in PACKAGES:
        found = sorted(packages.glob(f"{name}_*.deb"))
        if not found:
            sys.exit(f"{packages} has no {name}_*.deb: run `apt-get download {' '.join(PACKAGES)}` there")
        subprocess.run(["dpkg-deb", "-x", found[-1], unpacked], check=True)
    beside = work / "mix.unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    for part, pattern in PARTS:
        for source, content in texts(unpacked, pattern):
            place = beside / part / source
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    (beside / "bible").mkdir()
    said = subprocess.run(
        [unpacked / "usr/bin/bible", "-f", "-l79", "-p", unpacked / "usr/lib/"], input=b"gen1:1-rev22:21\n", capture_output=True, check=True
    ).stdout
    (beside / "bible" / "bible.txt").write_bytes(said)
    beside.rename(mix)
    return mix


def texts(unpacked: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(name below its package, content) of the files; a name that was met before, as of a link, is left out."""
    met = set()
    for path in sorted(unpacked.glob(pattern)):
        name = str(path.relative_to(unpacked / "usr/share")).removesuffix(".gz").removesuffix(".dz")
        if name in met or not path.is_file() or path.is_symlink():
            continue
        met.add(name)
        yield (
            name + (".txt" if path.suffix == ".dz" else ""),
            gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes(),
        )


def prepare(mix: Path, out: Path, workers: int) -> dict:
    command = [sys.executable, "-m", "cllm", "prepare", mix, "--out", out, "--workers", str(workers), "--json"]
    return {"what": "cllm", "workers": workers, **measured(command, out)}


def datatrove(python: str, mix: Path, out: Path, workers: int) -> dict:
    """The best of datatrove for so many workers: several tasks for each, so that none waits long for the other at the end."""
    command = [python, Path(__file__).with_name("datatrove_worker.py"), mix, out, str(workers), str(TASKS * workers)]
    return {"what": "datatrove", "workers": workers, **measured(command, out)}


def measured(command: list, out: Path) -> dict:
    """Runs a command into a new folder; its last line is JSON. CPU seconds are those of all its processes."""
    shutil.rmtree(out, ignore_errors=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "documents": result["documents"],
        "kept": result["kept"],
        "kept_mb": round(result["kept_chars"] / 1e6, 2),
        "digest": result.get("digest", ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the .deb files")
    parser.add_argument("--work", type=Path, required=True, help="folder for the mix and the results")
    parser.add_argument("--workers", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--datatrove", metavar="PYTHON", help="a Python that has datatrove, which then takes part")
    add_output_options(parser)
    arguments = parser.parse_args()
    mix = make_mix(arguments.packages, arguments.work)
    files = [path for path in mix.rglob("*") if path.is_file()]
    text = sum(path.stat().st_size for path in files)
    print(f"{len(files):,} files, {text / 1e6:.1f} MB", file=sys.stderr)
    small = arguments.work / "small"
    small.mkdir(exist_ok=True)
    for path in files[:20]:
        shutil.copy(path, small / path.name)
    prepare(small, arguments.work / "out", 1)
    rows = []
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            found = [prepare(mix, arguments.work / "out", workers)]
            if arguments.datatrove:
                found.append(datatrove(arguments.datatrove, mix, arguments.work / "datatrove", workers))
            rows += [{"mix_mb": round(text / 1e6, 2), **row, "mb_per_second": round(text / 1e6 / row["seconds"], 2)} for row in found]
    columns = ("what", "workers", "seconds", "cpu_seconds", "mb_per_second", "documents", "kept", "kept_mb", "digest")
    print_table(columns, [tuple(str(row[name]) for name in columns) for row in rows])
    finish(arguments, rows, lambda place: draw(rows, place))


def draw(rows: list[dict], place: Path) -> None:
    import plots

    labels = [f"{row['what']}, {row['workers']} workers" for row in rows]
    plots.bars(place, "cllm prepare", labels, {"prepare": [row["seconds"] for row in rows]}, "seconds")


if __name__ == "__main__":
    run(main)
