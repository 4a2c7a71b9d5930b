"""What a model of Python code is worth: whether functions that it writes are Python, and whether it knows how a line goes on.

    tasks = functions(documents, tokenizer, context=512, count=100)
    written = bodies(tasks, tokenizer, writer)               # the body of each function, sampled behind its header
    judged = judge(tasks, written)                           # how many parse, compile, import what there is
    lines = next_lines(tasks, tokenizer, writer)             # one line of each function, foretold
    filled = missing_lines(tasks, tokenizer, writer, 512)    # the same line, where what follows it is known as well

Nothing that a model wrote is ever run. A sample is parsed and compiled to byte code; of an import it is asked whether a module of that name can be
found on this machine, by its first part alone, which runs no code either.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cllm.data.tokens.batch import spread
from cllm.data.tokens.fim import fim_prompt
from cllm.evaluate.held_out import TEMPERATURE, Document, Writer
from cllm.evaluate.shares import Share

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer

BODY_TOKENS = 128  # that are sampled for a function; what is longer is cut after its last whole line
LINE_TOKENS = 64


@dataclass(frozen=True)
class Function:
    """A function of a document, cut behind its header.

    statement: the text of the top statement that it stands in, up to the end of the header's last line. indent: blanks before `def`. prompt: the
    tokens of the document up to there, as many as leave room for a body. body: the true text behind, from a line break to the end of the function.
    line_prompt, line: the tokens up to a line break within the body, and the line that follows, without blanks around it. before: the line above.
    behind: the rest of the document from the end of that line on.
    """

    name: str
    statement: str
    indent: int
    prompt: list[int]
    body: str
    line_prompt: list[int]
    line: str
    before: str
    behind: str


def functions(documents: Iterable[Document], tokenizer: Tokenizer, context: int, count: int) -> list[Function]:
    """At most `count` functions, at even distances over all of the documents whose names end in .py, methods of top classes included.

    Left out are those whose header or body has no line of its own, and where the statement up to the header leaves no room for a body in the context.
    """
    found = [(document, *each) for document in documents if document.name.partition(":")[0].endswith(".py") for each in _places(document.text)]
    tasks: list[Function] = []
    for document, top, node in spread(found, 2 * count):  # some of them have no room
        task = _task(document, top, node, tokenizer, context)
        if task is not None and len(tasks) < count:
            tasks.append(task)
    return tasks


def _places(text: str) -> list[tuple[ast.stmt, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(top statement, function) of a text that parses."""
    tree = _parsed(text)
    if tree is None:
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    inner = [(top, each) for top in tree.body for each in (top.body if isinstance(top, ast.ClassDef) else [top]) if isinstance(each, kinds)]
    return [(top, node) for top, node in inner if len({each.lineno for each in node.body}) > 1 and node.body[0].lineno > _header_end(node)]


def _header_end(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """A line that surely belongs to the header: that of the last argument, default or annotation."""
    parts = [each for each in ast.walk(node.args) if isinstance(each, ast.expr | ast.arg)] + ([node.returns] if node.returns else [])
    return max([node.lineno, *(each.end_lineno or 0 for each in parts)])


def _task(
    document: Document, top: ast.stmt, node: ast.FunctionDef | ast.AsyncFunctionDef, tokenizer: Tokenizer, context: int
) -> Function | None:  # fmt: skip
    lines = document.text.split("\n")
    decorators = getattr(top, "decorator_list", [])
    begin = min([top.lineno, *(each.lineno for each in decorators)]) - 1
    first = node.body[0]
    header = min([first.lineno, *(each.lineno for each in getattr(first, "decorator_list", []))]) - 1  # of lines, up to the first of the body
    statement, end = "\n".join(lines[begin:header]), node.end_lineno or header
    room = context - BODY_TOKENS
    if room < 1 or len(tokenizer.encode(statement)) > room:
        return None
    # The line in the middle of the body that is to be foretold, and the one above it that holds anything.
    held = [number for number in range(header, end) if lines[number].strip()]
    target = held[len(held) // 2]
    above = next(number for number in range(target - 1, -1, -1) if lines[number].strip())
    return Function(
        f"{document.name}:{node.lineno}", statement, node.col_offset, tokenizer.encode("\n".join(lines[:header]))[-room:],
        "\n" + "\n".join(lines[header:end]), tokenizer.encode("\n".join(lines[: above + 1]))[-(context - LINE_TOKENS) :], lines[target].strip(),
        lines[above].strip(), "".join(f"\n{line}" for line in lines[target + 1 :]),
    )  # fmt: skip


# -- whole functions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Of samples: how many parse, how many compile; of the imports in those that parse, how many name a module that there is."""

    parse: Share
    compiles: Share
    imports: Share

    def to_dict(self) -> dict[str, Any]:
        return {"parse": self.parse.to_dict(), "compile": self.compiles.to_dict(), "imports": self.imports.to_dict()}


def bodies(tasks: Sequence[Function], tokenizer: Tokenizer, writer: Writer) -> list[str]:
    """What a writer puts behind the header of each function, up to the end of that function."""
    least = min((task.indent for task in tasks), default=0)

    def ends(tokens: Sequence[int]) -> bool:  # of the function that is indented least; what others have too much is cut off below
        return _end_of_body(tokenizer.decode(tokens), least) is not None

    written = writer([task.prompt for task in tasks], BODY_TOKENS, TEMPERATURE, ends)
    return [_cut(tokenizer.decode(tokens), task.indent, len(tokens) >= BODY_TOKENS) for task, tokens in zip(tasks, written)]


def true_bodies(tasks: Sequence[Function], tokenizer: Tokenizer) -> list[str]:
    """The bodies that really stand there, cut as those of a writer are."""
    cut = [tokenizer.encode(task.body)[:BODY_TOKENS] for task in tasks]
    return [_cut(tokenizer.decode(tokens), task.indent, len(tokens) >= BODY_TOKENS) for task, tokens in zip(tasks, cut)]


def _end_of_body(text: str, indent: int) -> int | None:
    """Where a line begins that is not indented more than `def`; None where there is none yet."""
    found = re.search(rf"\n[ \t]{{0,{indent}}}(?=[^\s])", text)
    return None if found is None else found.start()


def _cut(text: str, indent: int, is_cut: bool) -> str:
    """The text up to the end of the function; of one that was cut by its number of tokens, the last whole line."""
    end = _end_of_body(text, indent)
    return text[:end] if end is not None else text.rpartition("\n")[0] if is_cut else text


def judge(tasks: Sequence[Function], written: Sequence[str]) -> Judged:
    """Parses and compiles each function; runs nothing."""
    parsed = compiled = imports = there = 0
    for task, body in zip(tasks, written):
        program = task.statement + body
        tree = _parsed(program)
        if tree is None or not body.strip():
            continue
        parsed += 1
        compiled += _compiles(program)
        header = task.statement.count("\n") + 1
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno > header and not getattr(node, "level", 0):
                names = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                imports += len(names)
                there += sum(_is_module(name.partition(".")[0]) for name in names)
    return Judged(Share(parsed, len(tasks)), Share(compiled, len(tasks)), Share(there, imports))


def _parsed(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _compiles(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "sample", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return False
        return True


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


# -- single lines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextLines:
    """exact: lines that were foretold whole. similarity: 1 less the edits (Levenshtein 1966) over the longer length, the mean over all lines."""

    exact: Share
    similarity: float

    def to_dict(self) -> dict[str, Any]:
        return {"exact": self.exact.to_dict(), "edit_similarity": self.similarity}


def next_lines(tasks: Sequence[Function], tokenizer: Tokenizer, writer: Writer) -> list[str]:
    """The line that a writer holds for the likeliest in the middle of each function, without blanks around it."""
    return _lines([task.line_prompt for task in tasks], tokenizer, writer)


def missing_lines(tasks: Sequence[Function], tokenizer: Tokenizer, writer: Writer, context: int) -> list[str]:
    """The same by a model that fills in the middle (`Tokenizer.fim`): it is shown what follows the line, too, in the same context."""
    room = context - LINE_TOKENS
    return _lines([fim_prompt(tokenizer, task.line_prompt, tokenizer.encode(task.behind), room) for task in tasks], tokenizer, writer)


def _lines(prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, writer: Writer) -> list[str]:
    """The first line with anything in it that is written behind each prompt."""

    def ends(tokens: Sequence[int]) -> bool:
        return "\n" in tokenizer.decode(tokens).lstrip()

    written = writer(prompts, LINE_TOKENS, 0.0, ends)
    return [tokenizer.decode(tokens).strip().split("\n")[0].strip() for tokens in written]


def compare_lines(tasks: Sequence[Function], lines: Sequence[str]) -> NextLines:
    similar = [similarity(line, task.line) for task, line in zip(tasks, lines)]
    return NextLines(Share(sum(line == task.line for task, line in zip(tasks, lines)), len(tasks)), sum(similar) / max(1, len(similar)))


def similarity(one: str, other: str) -> float:
    """1 for equal texts, 0 for texts without a character in its place."""
    row = list(range(len(other) + 1))
    for count, here in enumerate(one, 1):
        before, row[0] = row[0], count
        for place, there in enumerate(other, 1):
            before, row[place] = row[place], min(before + (here != there), row[place] + 1, row[place - 1] + 1)
    return 1.0 - row[-1] / max(1, len(one), len(other))
