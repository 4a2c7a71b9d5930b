"""Which parts of Python code are written for people: comments and docstrings."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings

import numpy as np


def remarks_in(text: str) -> np.ndarray:
    """Of each byte of a text in UTF-8 whether it belongs to a comment or to a string that is a statement by itself, (n,) bool; nowhere in a text that
    is no Python."""
    content = text.encode("utf-8")
    mask = np.zeros(len(content), dtype=bool)
    starts = np.concatenate([[0], np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == 10) + 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
            comments = [each for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.type == tokenize.COMMENT]
        except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
            return mask
    for each in comments:
        begin = starts[each.start[0] - 1] + len(each.line[: each.start[1]].encode())
        mask[begin : begin + len(each.string.encode())] = True
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.value.end_lineno is not None and node.value.end_col_offset is not None
            mask[starts[node.value.lineno - 1] + node.value.col_offset : starts[node.value.end_lineno - 1] + node.value.end_col_offset] = True
    return mask
