"""A message names only options that the command in which it appears has."""

import ast
import re
from pathlib import Path

import pytest
from commands import COMMANDS, options

ROOT = Path(__file__).parents[3]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
COMMAND = re.compile(r"cllm ((?:tokenizer |checkpoint )?[a-z]+)")
# Links; options of compilers and scripts; style sheets; declarations and documentation.
ELSEWHERE = (
    "cllm/kernels",
    "cllm/runtime",
    "kernels/triton",
    "kernels/inspection",
    "cllm/cli/bench",
    "cllm/report/style",
    "cllm/cli/app",
    "cllm/cli/options",
    "runtime/variables",
)
EVERYWHERE = {"--help", "--version", "--nproc-per-node"}  # the last one is torchrun's

# Which commands reach the code of a folder or file; the first entry that fits counts.
REACHED_BY = {
    "cllm/train/": ["train"],
    "cllm/monitor/": ["train"],
    "cllm/distributed/": ["train"],
    "cllm/model/memory.py": ["train"],
    "cllm/config/train.py": ["train"],
    "cllm/cli/train.py": ["train"],
    "cllm/cli/train_setup.py": ["train"],
    "cllm/cli/train_looks.py": ["train"],
    "cllm/cli/train_time.py": ["train"],
    "cllm/cli/run_data.py": ["train"],
    "cllm/cli/run_name.py": ["train"],
    "cllm/cli/generate.py": ["generate"],
    "cllm/cli/chat.py": ["chat"],
    "cllm/generate/chat_context.py": ["chat"],
    "cllm/cli/evaluate.py": ["evaluate"],
    "cllm/cli/suite.py": ["evaluate"],
    "cllm/cli/review.py": ["review"],
    "cllm/evaluate/review.py": ["review"],
    "cllm/evaluate/": ["evaluate"],
    "cllm/cli/report.py": ["report"],
    "cllm/report/": ["report"],
    "cllm/cli/export.py": ["export"],
    "cllm/cli/tokenizer.py": ["pack", "tokenizer train"],
    "cllm/interop/gguf.py": ["export"],
    "cllm/checkpoint/store.py": ["train"],
    "cllm/files.py": ["train"],
    "cllm/cli/mistakes.py": ["train"],
    "cllm/data/tokens/loader.py": ["train", "evaluate"],
    "cllm/data/tokens/chat.py": ["train", "evaluate"],
    "cllm/cli/follow.py": ["train"],
    "cllm/cli/crawl.py": ["crawl"],
    "cllm/cli/crawl_training.py": ["train"],
    "cllm/cli/prepare.py": ["prepare"],
    "cllm/cli/data.py": ["data show", "data search"],
    "cllm/cli/serve.py": ["serve"],
    "cllm/serve/": ["serve"],
    "cllm/cli/web_app.py": ["app"],
    "cllm/app/commands.py": ["train"],
    "cllm/app/planning.py": ["train"],
    "cllm/app/": ["app"],
    "cllm/data/sources/": ["crawl"],
    "cllm/data/extract/": ["prepare"],
    "cllm/data/clean/": ["prepare"],
    "cllm/data/preparation/look.py": ["data search"],
    "cllm/data/preparation/": ["prepare"],
    "cllm/data/": ["train", "pack", "evaluate", "tokenizer train", "tokenizer encode"],
    "cllm/cli/machine.py": ["explain"],
    "runtime/device.py": ["train", "generate", "chat", "evaluate", "explain"],
    "": [" ".join(command) for command in COMMANDS],
}


def messages(path: Path):
    """(line, text) of each string in a file that is no documentation; what an f-string fills in becomes "{}"."""
    tree = ast.parse(path.read_text())
    within, documentation = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.add(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("option", "typer.Option", "examples", "Setting", "setting"):
            documentation.update(ast.walk(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "command":  # made by cllm.shell
            words = " ".join(str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.args)
            within.update(ast.walk(node))
            yield node.lineno, f"cllm {words}"
        if isinstance(node, ast.JoinedStr):
            within.update(each for each in ast.walk(node) if isinstance(each, ast.Constant))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and node not in within and node not in documentation:
            yield node.lineno, "".join(str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in within and node not in documentation:
            yield node.lineno, node.value


def wrong(where: str, text: str) -> list[str]:
    """The options in a text that a command does not have: the one that it names before them, or any that reaches the file."""
    found = []
    for option in OPTION.finditer(text):
        named = [" ".join(each) for each in COMMANDS for name in COMMAND.findall(text[: option.start()]) if " ".join(each) == name]
        commands = named[-1:] or next(commands for place, commands in REACHED_BY.items() if where.startswith(place))
        if option[0] not in EVERYWHERE:
            lacking = [each for each in commands if option[0] not in options(*each.split())]
            found += [f"{where}: {option[0]}, which `cllm {lacking[0]}` lacks: {text[:100]!r}"] if lacking else []
    return found


def test_no_message_names_an_option_that_its_command_lacks():
    texts = 0
    faults = []
    for folder in ("cllm", "kernels", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            if where.startswith(ELSEWHERE):
                continue
            for _, text in messages(path):
                texts += "--" in text
                faults += wrong(where, text)
    assert texts > 30 and not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("where", "text", "faulty"),
    [
        ("cllm/data/x.py", "use --tokenizer bpe", True),
        ("cllm/data/x.py", "train it with cllm train --tokenizer bpe", False),
        ("cllm/train/x.py", "use --learning-rat 3", True),
        ("cllm/interop/gguf.py", "use --to hf", False),
        ("cllm/checkpoint/tools.py", "use --set train.keep=10", True),
    ],
)
def test_the_rule_itself(where, text, faulty):
    assert bool(wrong(where, text)) == faulty
