"""The routes of the server, and how it begins and ends."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from cllm.serve.errors import Refused, error_body
from cllm.serve.guard import Guard, status_error
from cllm.serve.listening import new_server
from cllm.serve.openai import chat_request, completion_request, detokenize_request, embedding_request, tokenize_request
from cllm.serve.replies import embeddings_reply, encode, model_reply, models_reply
from cllm.serve.safety import ClientGone, Policy, read_body
from cllm.serve.service import Service
from cllm.serve.stream import Answering, Reply
from cllm.serve.strict_json import parse_object

ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/health", "/ready", "/metrics")
GRACE = 10  # seconds in which answers that run may end when the server is asked to


def application(service: Service, policy: Policy, log: Callable[[str], None] | None = None) -> Guard:
    """The ASGI application. log: takes one line of JSON for each request; by default they go to standard error."""
    return Guard(api(service), policy, service.metrics, frozenset(ROUTES), log)


def api(service: Service) -> FastAPI:
    """The routes alone, for whoever has checked a request already and notes in `scope["noted"]` what it came to."""
    # Its pages of documentation load scripts from elsewhere, and its description of the API is of no use without models.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    def reply(value: Any, status: int = 200) -> Response:
        return Response(encode(value), status, media_type="application/json")

    async def body(request: HTTPRequest) -> dict[str, Any]:
        return parse_object(await read_body(request.scope, request.receive))

    @app.exception_handler(HTTPException)
    async def not_here(request: HTTPRequest, error: HTTPException) -> Response:
        found = reply(status_error(error.status_code, request.method, request.url.path), error.status_code)
        if error.headers and "allow" in {name.lower() for name in error.headers}:
            found.headers["allow"] = next(value for name, value in error.headers.items() if name.lower() == "allow")
        return found

    @app.exception_handler(Refused)
    async def refused(request: HTTPRequest, error: Refused) -> Response:
        request.scope["noted"]["error"] = error.code
        return Response(encode(error.body()), error.status, headers=error.headers, media_type="application/json")

    @app.exception_handler(Exception)
    async def failed(request: HTTPRequest, error: Exception) -> Response:  # and the guard writes it into the log
        return reply(error_body(500, "the server has made a mistake; its log says which.", code="internal_error"), 500)

    @app.exception_handler(ClientGone)
    async def gone(request: HTTPRequest, error: ClientGone) -> Response:
        request.scope["noted"]["finish"] = "client left"
        return Response(status_code=400)

    @app.get("/health")
    async def health() -> Response:
        return reply({"status": "ok"}) if service.is_alive else reply({"status": "failed"}, 503)

    @app.get("/ready")
    async def ready() -> Response:
        return reply({"status": "ready"}) if service.is_ready else reply({"status": "not ready"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(service.stats()), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return reply(models_reply([(each.identity, each.created, each.context) for each in service.models.values()]))

    @app.get("/v1/models/{identity}")
    async def model(identity: str) -> Response:
        found = service.find(identity)
        return reply(model_reply(found.identity, found.created, found.context))

    @app.post("/v1/completions")
    async def completions(request: HTTPRequest) -> Response:
        asked = completion_request(await body(request))
        job = await asyncio.to_thread(service.complete, asked, client_of(request, asked.options.user))
        found = Reply(job, is_chat=False, echo=asked.echo)
        return Answering(service, found, streamed=asked.options.stream, include_usage=asked.options.include_usage)

    @app.post("/v1/chat/completions")
    async def chats(request: HTTPRequest) -> Response:
        asked = chat_request(await body(request))
        job = await asyncio.to_thread(service.chat, asked, client_of(request, asked.options.user))
        calls = job.served.call_form if asked.tools else None
        if calls is not None and asked.must_call:
            calls = calls.after_opening
        found = Reply(job, is_chat=True, calls=calls)
        return Answering(service, found, streamed=asked.options.stream, include_usage=asked.options.include_usage)

    @app.post("/v1/embeddings")
    async def embeddings(request: HTTPRequest) -> Response:
        asked = embedding_request(await body(request))
        served, vectors, tokens = await asyncio.to_thread(service.embed, asked)
        request.scope["noted"] |= {"model": served.identity, "prompt_tokens": tokens}
        return reply(embeddings_reply(served.identity, vectors, asked.as_base64, tokens))

    @app.post("/tokenize")
    async def tokenize(request: HTTPRequest) -> Response:
        identity, prompt = tokenize_request(await body(request))
        served = service.find(identity)
        tokens = await asyncio.to_thread(served.tokenize, prompt)
        return reply({"tokens": tokens, "count": len(tokens), "max_model_len": served.context})

    @app.post("/detokenize")
    async def detokenize(request: HTTPRequest) -> Response:
        identity, tokens = detokenize_request(await body(request))
        return reply({"prompt": await asyncio.to_thread(service.find(identity).detokenize, tokens)})

    return app


def client_of(request: Any, user: str) -> str:
    """Whose turn it is: the address, and the user where a program on one machine asks for several."""
    return f"{request.client.host if request.client else ''} {user}"


async def serve(service: Service, app: Guard, where: socket.socket, ready: Callable[[], None], should_end: Callable[[], bool]) -> None:
    """Answers until `should_end`, then lets running answers end for GRACE seconds. ready: called when the first request may come."""
    server = new_server(app)
    service.start(asyncio.get_running_loop())
    serving = asyncio.create_task(server.serve(sockets=[where]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        ready()
        while not serving.done() and not should_end():
            await asyncio.sleep(0.05)
        service.is_draining = True
        until = time.monotonic() + GRACE
        while app.requests and time.monotonic() < until:
            await asyncio.sleep(0.05)
    finally:
        await asyncio.to_thread(service.stop)  # whoever still waits is told so
        server.should_exit = True
        await serving
