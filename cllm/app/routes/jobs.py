"""Jobs: begin, look at, pause, go on, stop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from cllm.app.exchange import body, reply
from cllm.app.state import App
from cllm.serve.errors import Refused

_MOST_LOG = 256 << 10  # bytes of one answer


def routes(app: App) -> APIRouter:
    router = APIRouter(prefix="/api/jobs")
    jobs = app.jobs

    async def act(action: Callable[[str], dict[str, Any]], identity: str, request: Request) -> Response:
        given = await body(request, may_be_empty=True)
        if given:
            raise Refused(400, "this takes no options: send an empty object, {}.", param=next(iter(given))[:100], code="unknown_option")
        return reply(await asyncio.to_thread(action, identity))

    @router.get("")
    async def listed() -> Response:
        return reply(jobs.listed())

    @router.post("")
    async def submit(request: Request) -> Response:
        given = await body(request)
        for name in given:
            if name not in ("command", "options"):
                raise Refused(400, f"a job is a command and its options; {name[:100]!r} is neither.", param=name[:100], code="unknown_option")
        asked = await asyncio.to_thread(app.commands.ask, given.get("command"), given.get("options", {}), app.workspace)
        return reply(await asyncio.to_thread(jobs.submit, asked), 202)

    @router.get("/{identity}")
    async def one(identity: str) -> Response:
        return reply(jobs.get(identity))

    @router.get("/{identity}/log")
    async def log(identity: str, start: Annotated[int | None, Query(alias="from", ge=0, le=1 << 53)] = None) -> Response:
        return reply(await asyncio.to_thread(_part_of, jobs.log_of(identity), start))

    @router.post("/{identity}/stop")
    async def stop(identity: str, request: Request) -> Response:
        return await act(jobs.stop, identity, request)

    @router.post("/{identity}/pause")
    async def pause(identity: str, request: Request) -> Response:
        return await act(jobs.pause, identity, request)

    @router.post("/{identity}/resume")
    async def resume(identity: str, request: Request) -> Response:
        return await act(jobs.resume, identity, request)

    @router.post("/{identity}/forget")
    async def forget(identity: str, request: Request) -> Response:
        return await act(jobs.forget, identity, request)

    return router


def _part_of(path: os.PathLike[str], start: int | None) -> dict[str, Any]:
    """A part of a log: from a byte on, or its end."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - _MOST_LOG) if start is None else min(start, size)
            file.seek(begin)
            found = file.read(_MOST_LOG)
    except FileNotFoundError:
        return {"text": "", "from": 0, "to": 0, "size": 0}
    return {"text": found.decode("utf-8", "replace"), "from": begin, "to": begin + len(found), "size": size}
