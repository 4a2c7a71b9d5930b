"""The conversations that the page keeps: listed, searched, read, written and deleted."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from cllm.app.exchange import body, reply
from cllm.app.readers.conversations import MOST_BYTES, Conversations
from cllm.app.state import App

_LONGEST_QUERY = 1_000


def routes(app: App) -> APIRouter:
    router = APIRouter()
    conversations = Conversations(app.workspace.state / "conversations")

    @router.get("/api/conversations")
    def all_of_them(q: str = "") -> Response:
        return reply(conversations.list(q[:_LONGEST_QUERY]))

    @router.post("/api/conversations")
    async def create(request: Request) -> Response:
        value = await body(request, MOST_BYTES)
        return reply({"id": await run_in_threadpool(conversations.create, value)}, 201)

    @router.get("/api/conversations/{identity}")
    def read(identity: str) -> Response:
        return reply(conversations.read(identity))

    @router.put("/api/conversations/{identity}")
    async def replace(identity: str, request: Request) -> Response:
        value = await body(request, MOST_BYTES)
        await run_in_threadpool(conversations.replace, identity, value)
        return reply({"id": identity})

    @router.delete("/api/conversations/{identity}")
    def delete(identity: str) -> Response:
        conversations.delete(identity)
        return reply({})

    return router
