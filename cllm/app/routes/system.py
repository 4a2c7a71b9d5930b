"""The machine, and the app's own log."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cllm.app.exchange import reply
from cllm.app.readers.library import Library
from cllm.app.readers.machine import Machine
from cllm.app.routes import asked
from cllm.app.state import App


def routes(app: App) -> APIRouter:
    router = APIRouter()
    library, workspace = app.part(Library), app.workspace
    machine = Machine(workspace.state / "doctor.json")
    app.closing.append(machine.close)

    @router.get("/api/machine")
    def facts() -> Response:
        cut = None if library.inventory.is_whole else "the workspace has so many folders that not all of them were looked into"
        return reply({**machine.facts(workspace.root), "workspace": workspace.name, "cut": cut})

    @router.get("/api/doctor")
    def doctor(request: Request) -> Response:
        return reply(machine.doctor(again=asked.choice(request, "again", ("0", "1"), "0") == "1"))

    @router.get("/api/log")
    def log() -> Response:
        return reply(app.log.lines())

    return router
