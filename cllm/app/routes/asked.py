"""The parameters of a request's address: read one by one, with an error that names the one that is wrong."""

from __future__ import annotations

import math

from fastapi import Request

from cllm.serve.errors import Refused

_LONGEST = 4_000


def text(request: Request, name: str, default: str | None = None) -> str:
    """The value of a parameter. Raises Refused where it is missing and has no default, or is given twice."""
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise Refused(400, f"{name} is given twice.", param=name, code="invalid_value")
    value = values[0] if values else default
    if value is None:
        raise Refused(400, f"{name} is missing.", param=name, code="missing_required_parameter")
    if len(value) > _LONGEST:
        raise Refused(400, f"{name} is too long.", param=name, code="invalid_value")
    return value


def choice(request: Request, name: str, choices: tuple[str, ...], default: str) -> str:
    value = text(request, name, default)
    if value not in choices:
        raise Refused(400, f"{name} must be one of {', '.join(choices)}.", param=name, code="invalid_value")
    return value


def number(request: Request, name: str) -> float | None:
    """A finite number; None where it is not given."""
    value = text(request, name, "")
    if not value:
        return None
    try:
        found = float(value) if len(value) < 40 and value.isascii() else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise Refused(400, f"{name} must be a number.", param=name, code="invalid_value")
    return found


def whole(request: Request, name: str, least: int, most: int, default: int) -> int:
    value = text(request, name, "")
    if not value:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 20 and least <= int(value) <= most):
        raise Refused(400, f"{name} must be a whole number from {least:,} to {most:,}.", param=name, code="invalid_value")
    return int(value)
