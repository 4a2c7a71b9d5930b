"""Near duplicates: how many planted ones are found, what the rules on a text cost, and what hangs together among 20 million documents.

    python profiling/data_dedup.py                                # 10,000 documents with edits of 0 to 40 %, and the costs per text
    python profiling/data_dedup.py --documents 20000000           # also band rows of so many documents: sorting and union-find
    python profiling/data_dedup.py --documents 20000000 --write data-dedup

Truth comes from sets of words in plain Python, which share nothing with the code that is measured. A pair is found when one of its two documents is
dropped; a drop is right when the similarity with the document that is named for it reaches the threshold. Seconds are those of the processor.
"""

import argparse
import json
import random
import resource
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from report import print_table, run, write

THRESHOLD = 0.8
STEPS = (0.8, 0.85, 0.9, 0.95, 1.0)
COPIES = 3


def edited(words: list[str], share: float, draw: random.Random) -> str:
    """Words of which a share is replaced, left out or doubled: scattered, or in one passage."""
    words = list(words)
    times = round(len(words) * share)
    start = draw.randrange(len(words) - times + 1)
    places = range(start, start + times) if draw.random() < 0.5 else draw.sample(range(len(words)), times)
    for place in places:
        words[place] = draw.choice(["", f"new{draw.randrange(5000)}", f"{words[place]} {words[place]}"])
    return " ".join(filter(None, words))


def planted(num: int, most_edits: float) -> list[list[str]]:
    """Families of texts: an original of 60 to 1,200 words, commoner ones oftener, and three edited copies."""
    draw = random.Random(1)
    vocabulary, weights = [f"w{i}" for i in range(20_000)], [1 / (i + 10) for i in range(20_000)]
    families = []
    for _ in range(num // (COPIES + 1)):
        words = draw.choices(vocabulary, weights, k=draw.randint(60, 1200))
        families.append([" ".join(words), *(edited(words, draw.uniform(0, most_edits), draw) for _ in range(COPIES))])
    return families


def true_similarity(a: str, b: str) -> float:
    sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a.split(), b.split())]
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


def duplicates(num: int, most_edits: float) -> list[dict[str, Any]]:
    """What 20 bands of 6 and FineWeb's 14 of 8 find of the same texts, by similarity."""
    from cllm.data.clean import near
    from cllm.data.clean.words import ngrams, split

    families = planted(num, most_edits)
    order = list(range(sum(map(len, families))))
    random.Random(2).shuffle(order)
    texts: list[str] = [""] * len(order)
    numbers = [order[4 * i : 4 * i + 4] for i in range(len(families))]
    for family, places in zip(families, numbers):
        for place, text in zip(places, family):
            texts[place] = text
    pairs = [(a, b, true_similarity(texts[a], texts[b])) for places in numbers for a, b in combinations(places, 2)]
    cut = [split(text) for text in texts]
    rows = []
    for num_bands, num_rows in ((near.BANDS, near.ROWS), (14, 8)):
        bands = np.stack([near.bands_of(ngrams(words.hashes, near.SHINGLE), num_bands, num_rows) for words in cut])
        began = time.process_time()
        dropped = near.deduplicate(bands, lambda i: near.shingles(cut[i]), THRESHOLD)
        seconds = time.process_time() - began
        right = sum(true_similarity(texts[copy], texts[kept]) >= THRESHOLD for copy, (kept, _) in dropped.items())
        about = {"what": "planted", "documents": len(texts), "edits": most_edits, "bands": f"{num_bands} x {num_rows}"}
        rows.append({**about, "dropped": len(dropped), "precision": right / max(len(dropped), 1), "seconds": seconds})
        for low, high in zip(STEPS, [*STEPS[1:], 1.01]):
            inside = [(a, b) for a, b, similarity in pairs if low <= similarity < high]
            found = sum(a in dropped or b in dropped for a, b in inside)
            rows.append({**about, "similarity": f"{low:.2f} to {min(high, 1):.2f}", "pairs": len(inside), "found": found / max(len(inside), 1)})
        above = [(a, b) for a, b, similarity in pairs if similarity > 0.85]
        found = sum(a in dropped or b in dropped for a, b in above)
        rows.append({**about, "similarity": "above 0.85", "pairs": len(above), "found": found / max(len(above), 1)})
    return rows


def costs() -> list[dict[str, Any]]:
    """Microseconds of the processor for each rule on a text of 4 kB of English, the median of several rounds."""
    from cllm.data.clean import decontaminate, exact, filters, languages, near, normalise, personal, words
    from cllm.data.clean.rules import Rules

    draw = random.Random(3)
    vocabulary = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "on", "are", "with", "as", "they", "at", "be", "this", "had"]
    vocabulary += ["".join(draw.choice("etaoinshrdlucmfwygpbvk") for _ in range(draw.randint(3, 10))) for _ in range(2000)]
    text = ""
    while len(text) < 4096:
        text += " ".join(draw.choices(vocabulary, [60 / (i + 1) + 1 for i in range(len(vocabulary))], k=draw.randint(8, 20))).capitalize() + ".\n"
    rules, cut = Rules(), words.split(text)
    grams = decontaminate.grams_of(" ".join(draw.choices(vocabulary, k=200)) for _ in range(500))
    calls: dict[str, Callable[[], Any]] = {
        "normalise": lambda: normalise.normalise(text, False, rules),
        "words": lambda: words.split(text),
        "language": lambda: languages.language_of(text, 3000),
        "filters": lambda: filters.judge(text, "en", False, rules, cut),
        "secrets": lambda: personal.protect(text, rules),
        "digest": lambda: exact.digest(text),
        "signature": lambda: near.signature(cut),
        "shingles": lambda: near.shingles(cut),
        "evaluation": lambda: decontaminate.overlap(cut, grams),
    }
    rows = []
    for name, call in calls.items():
        call()
        rounds = []
        for _ in range(9):
            began = time.process_time()
            for _ in range(200):
                call()
            rounds.append((time.process_time() - began) / 200 * 1e6)
        rows.append(
            {"what": "cost", "rule": name, "characters": len(text), "words": len(cut.hashes), "microseconds": sorted(rounds)[len(rounds) // 2]}
        )
    return rows


def followed(pointers: np.ndarray) -> np.ndarray:
    """Where pointers to smaller numbers end."""
    while not np.array_equal(further := pointers[pointers], pointers):
        pointers = further
    return pointers


def scale(num: int, parts_bits: int) -> list[dict[str, Any]]:
    """Band rows of `num` documents, of which a tenth are near copies of earlier ones, sorted part by part; then the groups, against the truth."""
    from cllm.data.clean.components import edges, forest, part, roots
    from cllm.data.clean.near import BANDS

    draw = np.random.default_rng(1)
    copies = np.flatnonzero(draw.random(num) < 0.1)[1:]
    origins = (draw.random(len(copies)) * copies).astype(np.int64)
    numbers = np.arange(num, dtype=np.uint32)
    roots(2, np.zeros((1, 2), np.uint32))  # compiled
    truth = np.arange(num)
    joined = np.empty((0, 2), np.uint32)
    seconds = {"sort": 0.0, "forest": 0.0, "union-find": 0.0}
    num_edges = 0
    for _ in range(BANDS):
        keys = draw.integers(1, 2**64, num, dtype=np.uint64)
        same = draw.random(len(copies)) < 0.8
        truth[copies[same]] = origins[same]
        # A copy has the key of its origin in four bands of five. An origin can be a copy itself.
        source = np.arange(num)
        source[copies[same]] = origins[same]
        keys = keys[followed(source)]
        began = time.process_time()
        places = part(keys, parts_bits)
        found = []
        for i in range(1 << parts_bits):
            here = places == i
            found.append(edges(keys[here], numbers[here]))
        pairs = np.concatenate(found)
        seconds["sort"] += time.process_time() - began
        num_edges += len(pairs)
        began = time.process_time()
        joined = forest(np.concatenate([joined, pairs]))
        seconds["forest"] += time.process_time() - began
    began = time.process_time()
    labels = roots(num, joined)
    seconds["union-find"] = time.process_time() - began
    right = np.array_equal(labels, followed(truth))
    about = {"what": "scale", "documents": num, "rows": num * BANDS, "parts": 1 << parts_bits, "edges": num_edges, "forest": len(joined)}
    return [{
        **about, **{f"{name} seconds": value for name, value in seconds.items()}, "sort microseconds a row": 1e6 * seconds["sort"] / (num * BANDS),
        "union-find nanoseconds an edge": 1e9 * seconds["union-find"] / max(len(joined), 1), "labels are right": right,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--planted", type=int, default=10_000, metavar="N", help="documents among which duplicates are planted; 0: none, and no costs"
    )
    parser.add_argument("--edits", type=float, default=0.4, help="most of a copy that is edited, as a share")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="documents whose band rows are sorted and joined")
    parser.add_argument("--parts-bits", type=int, default=4, help="band rows are sorted in 2^N parts")
    parser.add_argument("--write", metavar="NAME", help="write profiling/results/NAME.json")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    rows = costs() + duplicates(options.planted, options.edits) if options.planted else []
    if options.documents:
        rows += scale(options.documents, options.parts_bits)
    print_table(("rule", "us a text of 4 kB"), [(row["rule"], f"{row['microseconds']:.0f}") for row in rows if row["what"] == "cost"])
    print_table(
        ("bands", "similarity", "pairs", "found"),
        [(row["bands"], row["similarity"], f"{row['pairs']:,}", f"{100 * row['found']:.2f} %") for row in rows if "similarity" in row],
    )
    print_table(
        ("bands", "dropped", "precision", "seconds"),
        [(row["bands"], f"{row['dropped']:,}", f"{100 * row['precision']:.3f} %", f"{row['seconds']:.1f}") for row in rows if "precision" in row],
    )
    for row in rows:
        if row["what"] == "scale":
            print("\n".join(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}" for name, value in row.items()))
    if options.write:
        print(f"wrote {write(options.write, rows, threads=1)}")
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    run(main)
