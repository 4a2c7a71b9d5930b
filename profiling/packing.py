"""How fast text becomes tokens: bytes a second of one core in packing, and small files a second.

    python profiling/packing.py TEXT [--files 100000] [--out profiling/results/packing-MACHINE.json]

TEXT is a text file of some megabytes, from which everything is made: the text again and again, and small files of 20 to 300 of its words. Times are
CPU seconds of all threads, so that other work on the machine counts little. The tokenizer is a BPE of 8,192 tokens learned from TEXT; in the first
pass over a text its words are new, in the second they are known.
"""

import argparse
import json
import platform
import random
import subprocess
import tempfile
import time
from pathlib import Path

from cllm.data.pipeline import prepare
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.files import DATA, write_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = options.text.read_text("utf-8")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    found: dict[str, object] = {"machine": platform.processor() or platform.machine(), "python": platform.python_version(), "commit": commit}
    with tempfile.TemporaryDirectory(prefix="cllm-packing-") as scratch:
        place = Path(scratch)
        tokenizer = Tokenizer.train([text], 8192)
        parts = [text[i : i + 32768] for i in range(0, len(text), 32768)]
        encoded = len(text.encode("utf-8")) / 1e6
        found["library_mb_s"] = round(encoded / cpu(lambda: tokenizer._backend.encode_batch_fast(parts, add_special_tokens=False)), 2)
        (place / "large").mkdir()
        words = text.split(" ")
        rng = random.Random(0)
        with open(place / "large" / "a.txt", "w", encoding="utf-8") as file:
            while file.tell() < options.megabytes * 1e6:
                start = rng.randrange(len(words) - 300)
                file.write(" ".join(words[start : start + 300]) + " ")
        tokenizer.encode_arrays([text] * (1 + 2_000_000 // len(text)))  # compiled, and the words known
        megabytes = (place / "large" / "a.txt").stat().st_size / 1e6
        seconds = cpu(lambda: prepare(place / "large", place / "out", tokenizer))
        found["pack_one_file"] = {"megabytes": round(megabytes, 1), "cpu_seconds": round(seconds, 2), "mb_s": round(megabytes / seconds, 2)}
        for number in range(options.files):
            folder = place / "small" / f"{number // 1000:04}"
            folder.mkdir(parents=True, exist_ok=True)
            start = rng.randrange(len(words) - 300)
            (folder / f"{number:06}.txt").write_text(" ".join(words[start : start + rng.randrange(20, 300)]), "utf-8")
        for name in ("first", "again", "one changed"):
            if name == "one changed":
                (place / "small" / "0000" / "000007.txt").write_text("other words in one file\n", "utf-8")
            seconds = cpu(lambda: prepare(place / "small", place / "small-out", tokenizer))
            found[f"small_files_{name.replace(' ', '_')}"] = {"cpu_seconds": round(seconds, 2), "files_s": round(options.files / seconds)}
            print(name, found[f"small_files_{name.replace(' ', '_')}"], flush=True)
    print(json.dumps(found, indent=1))
    if options.out:
        write_file(options.out, (json.dumps(found, indent=1) + "\n").encode("utf-8"), DATA)


def cpu(work) -> float:  # type: ignore[no-untyped-def]
    """CPU seconds of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
