"""The documentation builds without a warning, and its commands are those of the program."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command import PATIENCE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "generated" not in path.parts and "_build" not in path.parts)


def test_the_site_builds_without_a_warning_and_asks_the_network_for_nothing(tmp_path):
    pytest.importorskip("sphinx", reason="sphinx is not installed (make docs)")
    pytest.importorskip("furo", reason="furo is not installed (make docs)")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", DOCS, tmp_path / "html"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "html").rglob("*.html"):
        loads = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(https?:[^\"]+)|<link[^>]*\shref=\"(https?:[^\"]+)", page.read_text())
        assert not loads, (page.name, loads)
    settings = (tmp_path / "html" / "reference" / "generated" / "settings.html").read_text()
    assert "train.grad_accum" in settings and "data.val_fraction" in settings


def options_of(command: list[str]) -> set[str]:
    """The options of a subcommand, from its declaration."""
    from cllm.cli.app import parser

    found = parser()
    for word in command:
        found = found.commands[word]
    return {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_on_each_page_exist_with_their_options(page):
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "cllm" not in words or words[0] == "pip":
                continue
            words = words[words.index("cllm") + 1 :]
            group = 2 if words[0] in ("tokenizer", "checkpoint") else 1
            given = {word.partition("=")[0] for word in words[group:] if word.startswith("--")}
            assert given <= options_of(words[:group]), line


def test_every_file_that_a_page_shows_or_links_to_exists():
    for page in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists() or "generated/" in target, (page.name, target)


def test_every_setting_that_a_page_names_exists():
    from cllm.config.schema import SECTIONS, SETTINGS

    for page in [*PAGES, ROOT / "README.md"]:
        for name in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_]+\b", page.read_text()):
            if not name.endswith(("_", ".py", ".json", ".md", ".jsonl", ".txt", ".safetensors", ".cllm")):
                assert name in SETTINGS, (page.name, name)
