"""The profiling scripts run through on tiny shapes and say what they measured. What they measure is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROFILING = Path(__file__).parents[2] / "profiling"


@pytest.mark.parametrize(
    ("script", "arguments", "keys"),
    [
        ("kernels.py", ["--tiny", "--rounds", "1"], {"op", "shape", "dtype", "direction", "ours_ms", "peer_ms", "ratio", "share"}),
        ("train.py", ["--shapes", "tiny", "--rounds", "1"], {"shape", "precision", "seconds", "tokens_per_second", "ratio"}),
    ],
)
def test_a_script_prints_a_table_and_an_object(script, arguments, keys):
    done = subprocess.run([sys.executable, script, *arguments, "--json"], cwd=PROFILING, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows and all(keys <= row.keys() for row in rows)


def test_the_five_lines_of_the_readme_run():
    example = (PROFILING / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", example], cwd=PROFILING, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "causal" in done.stdout, done.stderr
