"""The stream of what happens."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from cllm.app.state import App


def routes(app: App) -> APIRouter:
    router = APIRouter()

    @router.get("/api/events")
    async def events(
        request: Request, topics: str | None = None, topic: Annotated[tuple[str, ...], Query()] = (), last: str | None = None
    ) -> Response:
        """topics: names with commas in between, which is handy to type; topic: one name as it is, also with a comma in it, as often as needed."""
        listed = [each for each in (topics or "").split(",") if each] if topics is not None or topic else ["jobs"]
        names = list(dict.fromkeys([*listed, *topic]))
        app.live.check(names)
        stream = app.live.listen(names, request.headers.get("last-event-id") or last)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    return router
