"""Jane Austen's six novels as text, one file for each chapter, out of the R package janeaustenr.

    python novels.py Rdata.rdb OUT

R keeps the data of a package as a row of zlib streams, each behind its length in four bytes. In each stream stands one novel: a vector of lines in
R's serialisation, of which nothing but texts is read here.
"""

import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

CHAPTER = re.compile(r"(?:volume|chapter)\s+(?:[0-9]+|[ivxl]+)\.?", re.IGNORECASE)
TEXT, NO_TEXT = 9, 0xFFFFFFFF  # of R: the type of one text in a vector, and the length that stands for none


def main(data: Path, out: Path) -> None:
    rest = data.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        lines = list(lines_of(stream.decompress(rest[4:])))
        rest = stream.unused_data
        title = next(line for line in lines if line).strip().title()
        for number, chapter in enumerate(chapters(lines), 1):
            place = out / title.replace(" ", "-").lower() / f"{number:03}.txt"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(chapter, "utf-8")


def lines_of(serialised: bytes) -> Iterator[str]:
    """The texts of a vector of R: behind a head that ends with the name of a charset, each as its type, its length and its bytes."""
    at = serialised.index(b"UTF-8") + len(b"UTF-8") + 4  # behind the charset stands the type of the vector
    count = int.from_bytes(serialised[at : at + 4], "big")
    at += 4
    for _ in range(count):
        kind, length = serialised[at + 3], int.from_bytes(serialised[at + 4 : at + 8], "big")
        if kind != TEXT:
            raise SystemExit(f"the data hold something of type {kind} where a text was expected: this is another version of R's format.")
        at += 8
        if length != NO_TEXT:
            yield serialised[at : at + length].decode("utf-8")
            at += length


def chapters(lines: list[str]) -> Iterator[str]:
    """The chapters of a novel, their paragraphs in one line each, without their headings and the marks of italics."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        words = " ".join(paragraph.replace("_", "").split())
        if not CHAPTER.fullmatch(words):
            paragraphs.append(words)
            continue
        if sum(map(len, paragraphs)) > 1000:  # else it is a title page
            yield "\n\n".join(paragraphs) + "\n"
        paragraphs = []
    yield "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
