"""Real text and a finished run, made once for all end-to-end tests."""

import shutil
import sysconfig
from pathlib import Path

import pytest
from command import TINY, cllm
from made_once import made_once


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder of real text: some of the standard library's own sources."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("json", "email", "textwrap.py", "bisect.py", "heapq.py"):
        source = Path(sysconfig.get_path("stdlib")) / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    return folder


@pytest.fixture(scope="session")
def run(text, tmp_path_factory) -> Path:
    """A finished tiny run."""

    def make(folder: Path) -> None:
        ran = cllm("train", text, "--out", folder / "tiny", "--steps", 12, "--learning-rate", "3e-3", *TINY)
        assert ran.status == 0, ran.err

    return made_once(tmp_path_factory, "runs", make) / "tiny"
