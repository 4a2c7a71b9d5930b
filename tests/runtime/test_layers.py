"""The architecture as one picture: a module imports from its own room and from those below, never from above, and never in a circle.

Every import counts, also one inside a function, which only hides an arrow, and one for type checkers alone, because whoever reads the file has
to follow it. Names count as well: a file that says in a string what a higher module is called knows as much as one that imports it.
"""

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# The top floor first. A room is a folder, or a file where a line names one; rooms on one line know nothing of each other.
FLOORS = """
cllm                                     the public names, each loaded when it is first asked for
cllm.cli                                 the commands: what a person types and what is printed
cllm.app.server                          everything in a browser: one application of all routes
cllm.app.routes                          what the app answers
cllm.app.readers                         what it tells, read from the workspace
cllm.app                                 its security, jobs, live updates and page
cllm.serve                               text for many clients over HTTP
cllm.report                              one HTML page about finished or running runs
cllm.train                               the training loop, one step of it, faults, fine-tuning
cllm.train.optimizers                    the update rules
cllm.monitor                             what a run shows and records
cllm.evaluate                            how well a model predicts
cllm.checkpoint                          models and runs on disk
cllm.generate                            text from a model
cllm.interop                             the formats of other programs
cllm.distributed                         the processes of a run
cllm.model                               the network, its cache, its adapters
cllm.data                                from a folder of text to a data set
cllm.data.preparation                    from files, archives and crawls to clean documents: tasks, ledger, runners, report
cllm.data.sources                        the crawler
cllm.data.clean                          rules on text: normalising, languages, filters, personal data, duplicates
cllm.data.extract                        text out of files of any kind, in child processes with limits
cllm.data.tokens                         tokenizers, packed tokens, batches, chats
cllm.data.documents                      files, charsets, texts
cllm.config                              the settings and what follows from them
cllm.files cllm.shell cllm._lazy cllm._version     what every room may use
cllm.kernels                             the fused operations with their contracts
cllm.kernels.sdpa                        their backends, those that build on others first
cllm.kernels.gluon
cllm.kernels.triton
cllm.kernels.numba
cllm.kernels.torch
cllm.kernels.backend                     what a backend declares
cllm.kernels.operations                  the operations and their work
cllm.kernels.philox                      what dropout draws
cllm.kernels.stack                       what a decoded token passes through
cllm.kernels.quantization                matrices of 8-bit weights
cllm.kernels.strips                      matrices in the order in which decoding reads them
cllm.runtime.workers                     the threads of the CPU kernels
cllm.runtime                             the machine, threads, and which backend an operation gets
"""

# Arrows that still point up or around, as "importer imported". A line that is no longer needed fails its test.
EXCEPTIONS: set[tuple[str, str]] = set()


class Import(NamedTuple):
    """`module` imports `imported` in `line`. `late`: only when a function is called, or only for type checkers."""

    module: str
    imported: str
    line: int
    late: bool


def lines_of(picture):
    """The rooms of each floor, the lowest first."""
    return [re.split(r" {2,}", line)[0].split() for line in reversed(picture.strip().splitlines())]


FLOOR = {room: height for height, rooms in enumerate(lines_of(FLOORS)) for room in rooms}


@functools.cache
def modules():
    """Every module of the package and its file; kernels and runtime lie at the top of the repository and are linked into it."""
    found = {}
    for folder in ("cllm", "kernels", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.resolve() == path:
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts if folder == "cllm" else ("cllm", *parts))
                found[name.removesuffix(".__init__")] = path
    return found


def room_of(module):
    """The longest name in the picture that the module's name begins with."""
    while module not in FLOOR:
        module = module.rpartition(".")[0]
    return module


@functools.cache
def tree_of(module):
    return ast.parse(modules()[module].read_text())


def walk(node, late=False):
    """Every node below, and whether what it does happens only in a call or only for type checkers."""
    for child in ast.iter_child_nodes(node):
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        inside = late or typing or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, inside
        yield from walk(child, inside)


@functools.cache
def imports():
    found = set()
    for module in modules():
        for node, late in walk(tree_of(module)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}:{node.lineno}: write the import in full, from cllm...."
                # `from cllm.data import tokens` names a module in the list, `from cllm.data import Batch` does not.
                names = [each if (each := f"{node.module}.{alias.name}") in modules() else node.module for alias in node.names]
            else:
                continue
            found |= {Import(module, name, node.lineno, late) for name in names if name in modules()}
    return sorted(found)


def place(module, line):
    return f"{modules()[module].relative_to(ROOT)}:{line}"


def points_up(module, other):
    """Whether `other` lies on a floor above `module`, or in another room of the same floor."""
    here, there = room_of(module), room_of(other)
    return here != there and FLOOR[there] >= FLOOR[here]


def test_every_folder_has_its_place_in_the_picture():
    folders = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert folders - FLOOR.keys() == set(), "a new folder needs a line in FLOORS"
    assert FLOOR.keys() - modules().keys() == set(), "a line of FLOORS names what does not exist"


def test_no_import_points_up():
    wrong = [each for each in imports() if points_up(each.module, each.imported) and (each.module, each.imported) not in EXCEPTIONS]
    assert not wrong, "\n".join(f"{place(each.module, each.line)} imports {each.imported}, which lies above it" for each in wrong)


def test_no_imports_go_round_in_a_circle():
    below = {module: set() for module in modules()}
    for each in imports():
        if (each.module, each.imported) not in EXCEPTIONS:
            below[each.module].add(each.imported)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_exceptions_are_still_needed():
    assert {(each.module, each.imported) for each in imports()} >= EXCEPTIONS


def named_in(text):
    """The modules that a text names, as cllm.train.step, cllm/train/step.py, kernels/numba or train/step.py."""
    found = set()
    for name in re.findall(r"\b(?:cllm|kernels|runtime)(?:[./]\w+)+", text):
        name = name.removesuffix(".py").replace("/", ".")
        name = name if name.startswith("cllm.") else f"cllm.{name}"
        while name not in modules():
            name = name.rpartition(".")[0]
        if name != "cllm":  # what only begins like a module, cllm.save for example
            found.add(name)
    for name in re.findall(r"[\w./]*\w/\w+\.py\b", text):
        found |= {module for module, path in modules().items() if f"/{path.relative_to(ROOT)}".endswith(f"/{name}")}
    return found


def test_the_names_of_modules_are_found_in_strings():
    assert named_in('import_module(f"cllm.kernels.numba.x")') == named_in("reads kernels/numba/*.py") == {"cllm.kernels.numba"}
    assert named_in("see train/step.py") == named_in("see cllm/train/step.py") == named_in("cllm.train.step.TrainStep") == {"cllm.train.step"}
    assert named_in("cllm.save(model), demo.cllm, runtime errors, a.b.c, x/y.py") == set()


def test_no_string_names_a_module_above():
    wrong = []
    for module in modules():
        nodes = [node for node, _ in walk(tree_of(module))]
        words = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings may send a reader anywhere
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words:
                wrong += [f"{place(module, node.lineno)} names {other}" for other in named_in(node.value) if points_up(module, other)]
    assert not wrong, "\n".join(wrong)


def loaded_with(module):
    """The modules that are loaded when `module` is, before anything is called."""
    found, left = set(), {module}
    while left:
        found |= left
        left = {each.imported for each in imports() if each.module in left and not each.late} - found
    return found


@pytest.mark.parametrize("module", ["cllm.evaluate.loss", "cllm.evaluate.documents", "cllm.train.trainer"])
def test_plain_text_is_trained_on_and_evaluated_without_chats(module):
    chats = loaded_with(module) & {"cllm.data.tokens.chat", "cllm.data.tokens.conversations"}
    assert not chats


def test_a_process_that_trains_alone_loads_nothing_for_several():
    loaded = {name for name in loaded_with("cllm.train.trainer") if name.startswith("cllm.distributed.")}
    assert not loaded


def test_kernels_and_runtime_are_links_to_the_folders_at_the_top():
    for layer in ("kernels", "runtime"):
        assert (ROOT / "cllm" / layer).resolve() == ROOT / layer
