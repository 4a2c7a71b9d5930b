"""Chat templates in Jinja, with what Hugging Face's templates find there: a sandbox, loop controls, raise_exception, strftime_now, plain JSON.

The sandbox keeps a template from Python's inner workings, not from looping without end: who renders templates of strangers for others does it in a
process with limits.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from cllm.runtime.errors import DataError


def render(source: str, variables: dict[str, Any], most: int | None = None) -> str:
    """The text that a template makes of its variables. Raises DataError where it is no template, refuses them, or writes over `most` characters."""
    from jinja2 import TemplateError

    template = _compiled(source)
    pieces, count = [], 0
    try:
        for piece in template.generate(**variables):
            count += len(piece)
            if most is not None and count > most:
                raise DataError(f"the chat template writes more than {most:,} characters.")
            pieces.append(piece)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant says, for training; the text is the same."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> str:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False, ensure_ascii: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
        environment.filters["tojson"] = to_json  # Jinja's own is for HTML
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise DataError(f"the chat template is not valid Jinja: {error}.") from error
