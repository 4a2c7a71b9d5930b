"""What jobs may run, and what a training would be before it begins."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cllm.app.exchange import body, reply
from cllm.app.live import changes
from cllm.app.planning import Planner
from cllm.app.state import App


def routes(app: App) -> APIRouter:
    router = APIRouter()
    planner = Planner(app.workspace)
    app.closing.append(planner.close)
    app.live.register("plan", lambda name: changes(planner.progress, 0.5, lambda now: {"kind": "plan", "progress": now}))

    @router.get("/api/commands")
    async def commands() -> Response:
        return reply(app.commands.describe())

    @router.post("/api/plan")
    async def plan(request: Request) -> Response:
        given = await body(request)
        return reply(await planner.plan(app.commands, given.get("options", {}), request.is_disconnected))

    return router
