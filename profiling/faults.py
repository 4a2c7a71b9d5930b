"""Single-line faults in Python files: what a tired programmer writes and a parser lets pass.

    candidates = faults_of(text)            # every fault of every kind that can be made in it
    faulty = candidates[0].applied(text)    # the same text with one line changed

Four kinds: two arguments of a call in each other's place, a wrong operator, the name of another variable of the same function, and a number or a
bound that is off by one. Each changes one line and leaves a file that parses.
"""

import ast
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KINDS = ("swapped arguments", "wrong operator", "wrong name", "off by one")
_OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.Mod: ("%", "//"), ast.FloorDiv: ("//", "%"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Lt: ("<", ">"), ast.Gt: (">", "<"), ast.LtE: ("<=", ">="), ast.GtE: (">=", "<="),
    ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
_BOUNDS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}


@dataclass(frozen=True)
class Fault:
    """Bytes `start` to `end` of line `line` (from 1) become `new`."""

    kind: str
    line: int
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        lines = text.split("\n")
        raw = lines[self.line - 1].encode()
        lines[self.line - 1] = (raw[: self.start] + self.new.encode() + raw[self.end :]).decode()
        return "\n".join(lines)


def faults_of(text: str) -> list[Fault]:
    """Every fault that can be made in a text, in the order of kinds and lines; none in a text that does not parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = [line.encode() for line in text.split("\n")]
    found = {fault for node in ast.walk(tree) for fault in (*_swaps(node, lines), *_operators(node, lines), *_off_by_one(node, lines))}
    found |= {fault for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for fault in _names(node, lines)}
    return sorted(found, key=lambda each: (KINDS.index(each.kind), each.line, each.start, each.new))


def draw(texts: dict[str, str], count: int, seed: int) -> list[tuple[str, Fault]]:
    """(name of the text, fault): `count` faults, as many of each kind, drawn by the seed. Each leaves a text that parses and differs in its line."""
    generator = random.Random(seed)
    found: list[tuple[str, Fault]] = []
    every = {name: faults_of(text) for name, text in sorted(texts.items())}
    for number, kind in enumerate(KINDS):
        pool = [(name, fault) for name, faults in every.items() for fault in faults if fault.kind == kind]
        generator.shuffle(pool)
        wanted = count * (number + 1) // len(KINDS) - count * number // len(KINDS)
        taken: set[tuple[str, int]] = set()
        for name, fault in pool:
            if len(taken) == wanted:
                break
            if (name, fault.line) not in taken and _is_sound(texts[name], fault):
                taken.add((name, fault.line))
                found.append((name, fault))
    return found


def _is_sound(text: str, fault: Fault) -> bool:
    faulty = fault.applied(text)
    try:
        return ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


def _on_one_line(*nodes: ast.expr) -> bool:
    return len({line for node in nodes for line in (node.lineno, node.end_lineno)}) == 1


def _swaps(node: ast.AST, lines: Sequence[bytes]) -> Iterator[Fault]:
    if not isinstance(node, ast.Call):
        return
    for one, other in zip(node.args, node.args[1:]):
        if not _on_one_line(one, other) or any(isinstance(each, ast.Starred) for each in (one, other)):
            continue
        line, start, end = lines[one.lineno - 1], one.col_offset, other.end_col_offset
        assert one.end_col_offset is not None and end is not None
        first, between, second = line[start : one.end_col_offset], line[one.end_col_offset : other.col_offset], line[other.col_offset : end]
        if first != second:
            yield Fault("swapped arguments", one.lineno, start, end, (second + between + first).decode())


def _operators(node: ast.AST, lines: Sequence[bytes]) -> Iterator[Fault]:
    pairs: list[tuple[ast.expr, ast.AST, ast.expr]] = []
    if isinstance(node, ast.BinOp):
        pairs = [(node.left, node.op, node.right)]
    elif isinstance(node, ast.BoolOp):
        pairs = [(left, node.op, right) for left, right in zip(node.values, node.values[1:])]
    elif isinstance(node, ast.Compare):
        pairs = list(zip([node.left, *node.comparators], node.ops, node.comparators))
    for left, operator, right in pairs:
        if not _on_one_line(left, right):
            continue
        low, high = left.end_col_offset, right.col_offset
        assert low is not None
        between = lines[left.lineno - 1][low:high]
        for kind, table in (("wrong operator", _OPERATORS), ("off by one", _BOUNDS)):
            if type(operator) in table:
                old, new = table[type(operator)]
                at = between.find(old.encode())
                if at >= 0:
                    yield Fault(kind, left.lineno, low + at, low + at + len(old), new)


def _names(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[bytes]) -> Iterator[Fault]:
    """Another variable of the function read in the place of each one: one that its place in the text picks, so that every place counts once."""
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    own = {each.arg for each in arguments} | {
        each.id for each in ast.walk(function) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in own and _stands(node, node.id, lines):
            assert node.end_col_offset is not None
            others = sorted(own - {node.id})
            if others:
                other = others[(31 * node.lineno + node.col_offset) % len(others)]
                yield Fault("wrong name", node.lineno, node.col_offset, node.end_col_offset, other)


def _off_by_one(node: ast.AST, lines: Sequence[bytes]) -> Iterator[Fault]:
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value < 1000 and _stands(node, str(node.value), lines):
        assert node.end_col_offset is not None
        for value in (node.value - 1, node.value + 1):
            if value >= 0:
                yield Fault("off by one", node.lineno, node.col_offset, node.end_col_offset, str(value))


def _stands(node: ast.expr, written: str, lines: Sequence[bytes]) -> bool:
    """Whether a node is written so where it says that it is; in formatted strings it may be elsewhere before Python 3.12."""
    return lines[node.lineno - 1][node.col_offset : node.end_col_offset] == written.encode()
