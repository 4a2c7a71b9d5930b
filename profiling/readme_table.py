"""Writes the README's table of whole training steps from the measured files, so that it cannot drift.

python profiling/readme_table.py            # rewrite the part of README.md between the two markers
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- measured: written by profiling/readme_table.py -->", "<!-- end of measured -->"


def table() -> str:
    lines = []
    for path in sorted((ROOT / "profiling" / "results").glob("train-*.json")):
        found = json.loads(path.read_text())
        machine, versions = found["machine"]["devices"][0], found["versions"]
        lines += [
            f"{machine['name']}, {machine['workers']} cores ({', '.join(machine['features'])}), torch {versions['torch']}, "
            f"numba {versions['numba']}, {found['date']}, commit {found['commit']}:",
            "",
            "| whole training step | precision | CLLM tokens/s | best PyTorch tokens/s | ratio |",
            "|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            speeds = row["tokens_per_second"]
            peer = max(speed for name, speed in speeds.items() if name != "cllm")
            lines.append(f"| {row['shape']} | {row['precision']} | {speeds['cllm']:,.0f} | {peer:,.0f} | {row['ratio']:.2f} |")
        lines += ["", *(f"Warning: {text}" for text in found.get("warnings", ())), ""]
    return "\n".join(lines)


def updated(readme: str) -> str:
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
