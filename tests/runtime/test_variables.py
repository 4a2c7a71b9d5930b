"""The documented environment variables are those that the code reads."""

import re
from pathlib import Path

from cllm.runtime.variables import VARIABLES

ROOT = Path(__file__).parents[2]


def test_every_variable_that_is_read_is_documented_and_no_other():
    reads = re.compile(r"""(?:environ|getenv)[^\n]*?["'](CLLM_[A-Z0-9_]+)["']""")
    files = [path for folder in ("runtime", "kernels", "cllm", "profiling") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {name for path in files for name in reads.findall(path.read_text())} == set(VARIABLES)
