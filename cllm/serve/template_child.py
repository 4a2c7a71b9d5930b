"""The child process of `templates.py`: renders chat templates as it is asked to over a socket, until its parent is gone."""

from __future__ import annotations

import json
import sys
from multiprocessing.connection import Connection
from typing import Any

from cllm.data.extract.confine import confine, limit_cpu
from cllm.data.extract.options import Options
from cllm.data.tokens.jinja import render
from cllm.runtime.errors import DataError
from cllm.serve.template_limits import MOST_CHARACTERS, MOST_MEMORY, SECONDS


def main() -> None:
    parent = Connection(int(sys.argv[1]))
    render("{{ 1 | tojson }}", {})  # imports what it needs while it may
    confine(Options(memory_bytes=MOST_MEMORY))
    while True:
        try:
            asked = json.loads(parent.recv_bytes())
        except EOFError:
            return
        limit_cpu(SECONDS)
        parent.send_bytes(json.dumps(_answer(asked["template"], asked["variables"])).encode("ascii"))


def _answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": render(template, variables, MOST_CHARACTERS)}
    except DataError as error:
        return {"error": str(error)[:1000]}
    except MemoryError:
        return {"error": "the chat template takes more memory than it may."}
    except Exception as error:  # of a filter, whatever it is: the template's fault
        return {"error": f"the chat template fails: {type(error).__name__}."}


if __name__ == "__main__":
    main()
