"""Documents to prepare, the same each time, and a program that prepares them in a process of its own."""

import hashlib
import json
import random
import sys
from pathlib import Path

from cllm.data.preparation.plan import prepare
from cllm.data.preparation.recipe import Recipe, Sizes
from cllm.data.preparation.runner import Pool

# Small, so that some hundred kilobytes take many tasks.
SIZES = Sizes(piece_bytes=15_000, part_chars=5_000, piece_files=6, shard_bytes=40_000, partition_rows=150, verify_documents=4)
_SYLLABLES = ("ba", "ne", "ri", "so", "tu", "mar", "len", "dor", "vin", "cal", "per", "mo", "sti", "gra")


def prose(seed, sentences=30):
    """A text that the filters keep: the words that hold English together, between words that nobody knows."""
    draw = random.Random(seed)

    def word():
        return "".join(draw.choices(_SYLLABLES, k=draw.randint(2, 3)))

    said = []
    for _ in range(sentences):
        parts = (f"the {word()} of {word()}", f"a {word()} {word()}", f"{word()} and {word()}", f"that {word()} to have {word()}", f"with {word()}")
        said.append(" ".join(draw.sample(parts, draw.randint(3, 5))).capitalize() + ".")
    return "\n\n".join(" ".join(said[start : start + 5]) for start in range(0, sentences, 5)) + "\n"


def edited(text, seed, share):
    """The text with a share of its words exchanged."""
    draw, words = random.Random(seed), text.split(" ")
    for place in draw.sample(range(len(words)), max(1, int(share * len(words)))):
        words[place] = f"other{draw.randrange(1000)}"
    return " ".join(words)


def make(folder, reverse=False):
    """Two folders of documents, with copies, near copies, files without text, one that no rule lets pass, and one of records that is read in parts.
    reverse: created in another order."""
    files = {}
    for number in range(60):
        text = prose(number // 2 if number % 10 == 1 else number)
        files[f"{'letters' if number % 3 else 'stories'}/{number % 7}/{number:03}.txt"] = edited(text, number, 0.01) if number % 10 == 3 else text
    for number in range(4, 40, 9):
        files[f"letters/copies/{number:03}.txt"] = edited(prose(number), 1, 0.01)
        files[f"stories/copies/{number:03}.txt"] = prose(number)
    files["letters/empty.txt"] = ""
    files["letters/short.txt"] = "Too short.\n"
    files["stories/list.txt"] = "\n".join(f"* {number}" for number in range(300))
    records = [json.dumps({"text": prose(number + 180 * (number % 5 > 0))}) for number in range(30)]
    files["letters/records.jsonl"] = "\n".join([*records[:20], '{"text": "broken', *records[20:]])
    for name in sorted(files, reverse=reverse):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(files[name])
    (folder / "stories/noise.dat").write_bytes(bytes(range(256)) * 20)
    return [str(folder / "letters"), str(folder / "stories")]


def digest(out):
    """Of the names and bytes of everything in a folder of results but its memory."""
    found = hashlib.blake2b(digest_size=16)
    for place in sorted(out.rglob("*")):
        if place.is_file() and ".ledger" not in place.parts:
            found.update(f"{place.relative_to(out)}\0".encode() + hashlib.blake2b(place.read_bytes()).digest())
    return found.hexdigest()


def recipe(**more):
    return Recipe(sizes=SIZES, **more)


if __name__ == "__main__":
    pool = Pool(int(sys.argv[1]))
    prepare(sys.argv[3:], Path(sys.argv[2]), recipe(), pool)
    pool.close()
