"""Data sets, the folders of the workspace, and files that arrive from a browser."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cllm.app.exchange import reply
from cllm.app.readers import datasets
from cllm.app.readers.browse import browse
from cllm.app.readers.library import Library
from cllm.app.readers.uploads import receive_file, safe_name
from cllm.app.routes import asked
from cllm.app.state import App
from cllm.serve.errors import Refused

_FARTHEST = 100_000_000  # documents that a page may begin after


def routes(app: App) -> APIRouter:
    router = APIRouter()
    library = app.part(Library)
    workspace = app.workspace

    @router.get("/api/datasets")
    def all_of_them() -> Response:
        following = library.followers()
        return reply([each | {"following": following.get(each["path"])} for each in library.datasets()])

    @router.get("/api/datasets/detail")
    def detail(request: Request) -> Response:
        place = workspace.resolve(asked.text(request, "path"), exists=True)
        path = workspace.relative(place)
        return reply(datasets.detail(path, place, workspace.root) | {"following": library.followers().get(path)})

    @router.get("/api/datasets/samples")
    def samples(request: Request) -> Response:
        place = workspace.resolve(asked.text(request, "path"), exists=True)
        kept = asked.choice(request, "kind", ("kept", "dropped"), "kept") == "kept"
        offset = asked.whole(request, "offset", 0, _FARTHEST, 0)
        return reply(datasets.samples(place, workspace.root, kept=kept, reason=asked.text(request, "reason", ""), offset=offset))

    @router.get("/api/browse")
    def folder(request: Request) -> Response:
        return reply(browse(workspace.resolve(asked.text(request, "path", ""), exists=True), workspace.root))

    @router.post("/api/uploads")
    async def upload(request: Request) -> Response:
        into = workspace.resolve(asked.text(request, "into"), "into")
        if into == workspace.root or (into.exists() and not into.is_dir()):
            raise Refused(400, "into must be a folder inside the workspace, such as uploads. It is made where there is none.", param="into")
        name = safe_name(asked.text(request, "name"))
        place, size = await receive_file(request.receive, into, name, workspace.state / "uploads", announced_bytes(request))
        return reply({"path": workspace.relative(place), "bytes": size}, 201)

    return router


def announced_bytes(request: Request) -> int | None:
    """The Content-Length of a request; None where it has none."""
    given = request.headers.get("content-length", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else None
