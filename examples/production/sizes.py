"""What a megabyte costs from text to tokens, and the memory that it takes, for about 1, 10 and all MB of a folder: both should stay as they are.

    python sizes.py SOURCE WORK [MEGABYTES...]

Each part is files of SOURCE spread over all of it. The commands run with one worker, one after the other; seconds are of the processor and not of the
clock, so that other work on the machine counts little, and memory is that of the largest process.
"""

import os
import subprocess
import sys
from pathlib import Path

VOCAB = 8192  # of all sizes, so that tokens are the same


def main(source: Path, work: Path, megabytes: list[float]) -> None:
    files = sorted(each for each in source.rglob("*") if each.is_file() and not each.is_symlink())
    total = sum(each.stat().st_size for each in files) / 1e6
    print(
        "| MB | files | prepare, s/MB | memory, MB | tokenizer, s/MB | memory, MB | pack, s/MB | memory, MB |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for wanted in megabytes or [1, 10, total]:
        part = work / f"{wanted:.0f}"
        size, count = take(files, source, part / "text", min(1.0, wanted / total))
        steps = (
            ("prepare", part / "text", "--out", part / "corpus", "--workers", 1, "--allow-loss"),
            ("tokenizer", "train", part / "corpus", "--vocab-size", VOCAB, "--out", part / "tokenizer.json"),
            ("pack", part / "corpus", "--tokenizer", part / "tokenizer.json", "--out", part / "tokens"),
        )
        cells = [cell for words in steps for cell in cost(words, size)]
        print(f"| {size:.1f} | {count:,} | {' | '.join(cells)} |", flush=True)


def take(files: list[Path], source: Path, into: Path, share: float) -> tuple[float, int]:
    """Links a share of the files, spread evenly. (megabytes, files)"""
    chosen = [files[int(number / share)] for number in range(int(len(files) * share))]
    for file in chosen:
        place = into / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, place)
    return sum(each.stat().st_size for each in chosen) / 1e6, len(chosen)


def cost(words: tuple, megabytes: float) -> tuple[str, str]:
    """(seconds of the processor for a megabyte, megabytes of memory) of a command."""
    command = subprocess.Popen(["cllm", *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(command.pid, 0)
    if status:
        raise SystemExit(f"cllm {words[0]} ended with status {os.waitstatus_to_exitcode(status)}")
    return f"{(used.ru_utime + used.ru_stime) / megabytes:.2f}", f"{used.ru_maxrss / 1e3:,.0f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [float(each) for each in sys.argv[3:]])
