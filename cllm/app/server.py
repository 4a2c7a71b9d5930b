"""The app as one ASGI application, and how it begins and ends."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from cllm.app import pages
from cllm.app.exchange import reply
from cllm.app.routes import commands, crawls, data, events, jobs, llm, models, runs, system
from cllm.app.security import Access, Gate
from cllm.app.state import App
from cllm.runtime.errors import CLLMError
from cllm.serve.errors import Refused, error_body
from cllm.serve.listening import new_server
from cllm.serve.safety import Policy

_PARTS = (commands, jobs, events, runs, models, data, crawls, llm, system)
_GRACE = 3.0  # seconds in which answers that run may end


def build(app: App, policy: Policy, access: Access) -> Gate:
    """The ASGI application: every route of every part, behind the gate."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _answer_errors(api, f"{app.workspace.root}/")
    for part in _PARTS:
        api.include_router(part.routes(app))
    api.include_router(pages.routes())
    return Gate(api, policy, access, app.log)


def _answer_errors(api: FastAPI, root: str) -> None:
    """root: of the workspace, which no error needs to name: places below it are named as the page names them."""

    @api.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        request.scope["noted"]["error"] = error.code
        found = reply(error.body(), error.status)
        found.headers.update(error.headers)
        return found

    @api.exception_handler(CLLMError)  # a damaged run, a folder that is no data set: what the command line would say of it
    async def wrong(request: Request, error: CLLMError) -> Response:
        request.scope["noted"]["error"] = type(error).__name__
        words = str(error).replace(root, "")
        return reply(error_body(400, words, code="invalid_value"), 400)

    @api.exception_handler(RequestValidationError)
    async def wrong_query(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return reply(error_body(400, f"{name} is wrong: {first['msg'][:200]}.", name, "invalid_value"), 400)

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # and the gate writes it into the log
        return reply(error_body(500, "the app has made a mistake; its log says which.", code="internal_error"), 500)

    @api.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        words = {404: "there is nothing at this path.", 405: "this path does not take that method."}
        return reply(error_body(error.status_code, words.get(error.status_code, "the request cannot be answered.")), error.status_code)


async def run(app: App, gate: Gate, where: socket.socket, ready: Callable[[], None], should_end: Callable[[], bool]) -> None:
    """Answers until `should_end`. ready: called when the first request may come."""
    server: Any = new_server(gate)
    serving = asyncio.create_task(server.serve(sockets=[where]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        ready()
        while not serving.done() and not should_end():
            await asyncio.sleep(0.05)
    finally:
        await asyncio.to_thread(app.close)  # which ends the streams of all pages
        until = time.monotonic() + _GRACE
        while gate.requests and time.monotonic() < until:
            await asyncio.sleep(0.02)
        server.should_exit = True
        await serving
