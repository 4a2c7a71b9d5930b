"""Imports run downwards: runtime knows neither of the others, kernels knows runtime, cllm knows both."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANK = {"runtime": 0, "kernels": 1}


def _imported(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the import in full, from cllm...."
            module = node.module or ""
            # `from cllm import runtime` names the layer in the list, not in the module.
            found += [(node.lineno, f"{module}.{alias.name}" if module == "cllm" else module) for alias in node.names]
    return found


def test_no_layer_imports_from_one_above():
    wrong = []
    for layer, rank in RANK.items():
        files = sorted((ROOT / layer).rglob("*.py"))
        assert files
        for path in files:
            for line, module in _imported(path):
                parts = module.split(".")
                if parts[0] == "cllm" and (len(parts) < 2 or RANK.get(parts[1], 2) > rank):
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_layers_in_the_package_are_links_to_the_folders_at_the_top():
    for layer in RANK:
        assert (ROOT / "cllm" / layer).resolve() == ROOT / layer
