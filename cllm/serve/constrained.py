"""Answers that have to be JSON, fit a schema, an expression or a grammar: from what was asked to what restricts one answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cllm.generate.constraint import compile_constraint
from cllm.runtime.errors import UserError
from cllm.serve.errors import Refused

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.generate.sampler import Constraint
    from cllm.serve.openai import Form


def constraint_for(form: Form, tokenizer: Tokenizer) -> Callable[[], Constraint]:
    """What makes the constraint of each answer. Raises Refused where llguidance is not installed or the form cannot be compiled in time."""
    try:
        return compile_constraint(tokenizer, form.kind, form.text)
    except UserError as error:
        raise Refused(400, str(error), param=form.param, code="invalid_value") from None
