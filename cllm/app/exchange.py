"""What every route does with a request's body and its reply."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from cllm.serve.replies import encode
from cllm.serve.safety import MOST_BODY, read_body
from cllm.serve.strict_json import parse_object


def reply(value: Any, status: int = 200) -> Response:
    """A value as JSON. Numbers that JSON does not have (NaN, infinities) are null."""
    try:
        content = encode(value)
    except ValueError:
        content = encode(finite(value))
    return Response(content, status, media_type="application/json")


def finite(value: Any) -> Any:
    """The same with None for every number that is none."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(value: Any) -> str:
    """A value as JSON in a line."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def body(request: Request, most: int = MOST_BODY, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The JSON object that a request bears; may_be_empty: no body is one without fields. Raises Refused."""
    found = await read_body(request.scope, request.receive, most)
    return {} if may_be_empty and not found else parse_object(found)
