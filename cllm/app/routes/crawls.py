"""Crawls: their figures, and what became of their pages."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cllm.app.exchange import reply
from cllm.app.readers.crawls import begun, detail
from cllm.app.readers.library import Library
from cllm.app.routes import asked
from cllm.app.state import App
from cllm.data.sources.settings import DATABASE
from cllm.runtime.errors import DataError
from cllm.serve.errors import Refused


def routes(app: App) -> APIRouter:
    router = APIRouter()
    library = app.part(Library)

    @router.get("/api/crawls")
    def crawls() -> Response:
        following = library.followers()
        return reply([each | {"following": following.get(each["path"])} for each in library.crawls()])

    @router.get("/api/crawls/detail")
    def crawl(request: Request) -> Response:
        text = asked.text(request, "path")
        place = app.workspace.resolve(text)
        path = app.workspace.relative(place)
        job = library.job_of(path, "crawl")
        try:
            app.workspace.resolve(text, exists=True)
            found = detail(path, place, app.workspace.root, job)
        except (DataError, Refused):
            if job is None or ((place / DATABASE).exists() and job["state"] != "running"):
                raise
            found = begun(path, place, job)  # a page is opened as soon as a job has been asked for
        return reply(found | {"following": library.followers().get(path)})

    return router
