"""Talking to models: OpenAI's API for those of the workspace, loaded when they are first asked for, and what the page needs beside it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cllm.app.commands import Option
from cllm.app.exchange import body, reply
from cllm.app.live import changes
from cllm.app.readers.library import Library
from cllm.app.routes import conversations
from cllm.app.state import App
from cllm.app.talk import Talk
from cllm.config.sampling import SAMPLING
from cllm.serve.errors import Refused
from cllm.serve.replies import models_reply
from cllm.serve.safety import read_body
from cllm.serve.strict_json import parse_object


def routes(app: App) -> APIRouter:
    router = APIRouter()
    router.include_router(conversations.routes(app))
    talk = app.part(Talk)
    app.live.register("talk", lambda name: changes(talk.waiting, 0.5, lambda now: {"kind": "talk", **now}))
    sampling = [_described(name) for name in SAMPLING]

    async def load(path: str) -> dict[str, Any]:
        return await asyncio.to_thread(talk.load, path, asyncio.get_running_loop())

    @router.get("/api/llm")
    async def state() -> Response:
        return reply({"models": talk.loaded(), "sampling": sampling})

    @router.post("/api/llm/load")
    async def make_ready(request: Request) -> Response:
        return reply(await load(_text(await body(request), "path")))

    @router.post("/api/llm/unload")
    async def let_go(request: Request) -> Response:
        await asyncio.to_thread(talk.unload, _text(await body(request), "path"))
        return reply({})

    @router.post("/api/llm/surprise")
    async def surprise(request: Request) -> Response:
        given = await body(request)
        identity, text = _text(given, "model"), _text(given, "text")
        found = await load(identity)
        return reply(await talk.surprise(found["id"], text))

    @router.get("/v1/models")
    async def models() -> Response:
        found = await asyncio.to_thread(app.part(Library).models)
        return reply(models_reply([(each["path"], int(each["updated"] or 0), each["context"] or 0) for each in found if each["loadable"]]))

    @router.post("/v1/{rest:path}")
    @router.post("/tokenize")
    @router.post("/detokenize")
    async def answer(request: Request) -> Response:
        content = await read_body(request.scope, request.receive)
        model = parse_object(content).get("model")
        if not isinstance(model, str):
            raise Refused(400, "model is missing: the path of a model in the workspace, such as runs/demo.", param="model", code="model_not_found")
        await load(model)
        return _Through(talk, content)

    return router


class _Through(Response):
    """Hands a request, whose body is read already, to OpenAI's routes."""

    def __init__(self, talk: Talk, content: bytes) -> None:
        self._talk, self._content = talk, content
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        content: bytes | None = self._content

        async def again() -> Any:
            nonlocal content
            if content is None:
                return await receive()  # only that the client has left can come
            message, content = {"type": "http.request", "body": content, "more_body": False}, None
            return message

        assert self._talk.api is not None
        await self._talk.api({**scope, "noted": scope["noted"]}, again, send)


def _described(name: str) -> dict[str, Any]:
    declared = SAMPLING[name]
    kind = "integer" if declared.types[0] is int else "number"
    return Option(name.replace("_", "-"), declared, kind, key=name, group="Sampling").describe()


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise Refused(400, f"{name} is missing: a text.", param=name, code="missing_required_parameter")
    return value
