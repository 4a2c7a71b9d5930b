"""Keeps every twentieth file of a folder out of the training, for figures about text that the model has not seen.

    python hold_out.py SOURCE TEXT HELD_OUT

Files are linked where the disk allows it and copied elsewhere. Which ones are kept depends on their names alone.
"""

import os
import shutil
import sys
from pathlib import Path

EVERY = 20


def main(source: Path, text: Path, held_out: Path) -> None:
    files = sorted(each for each in source.rglob("*") if each.is_file() and not each.is_symlink())
    if len(files) < EVERY:
        raise SystemExit(f"{source} has {len(files)} files: every {EVERY}th is held out, so give a folder of at least {EVERY}.")
    for number, file in enumerate(files):
        place = (held_out if number % EVERY == EVERY // 2 else text) / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            try:
                os.link(file, place)
            except OSError:
                shutil.copyfile(file, place)
    print(f"{len(files):,} files, {sum(each.stat().st_size for each in files) / 1e6:.1f} MB; every {EVERY}th is held out")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
