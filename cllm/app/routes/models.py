"""Models: the list, one in detail, downloads, deleting with an undo, importing."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.responses import FileResponse

from cllm.app.exchange import body, reply
from cllm.app.readers import folders
from cllm.app.readers.archive import zipped
from cllm.app.readers.library import Library
from cllm.app.readers.models import inspect
from cllm.app.readers.uploads import plain_name, receive_file
from cllm.app.routes import asked
from cllm.app.routes.data import announced_bytes
from cllm.app.state import App
from cllm.checkpoint.header import read_header
from cllm.checkpoint.place import NOT_A_CHECKPOINT, SAMPLE_FILE
from cllm.files import MODEL, reason, write_file
from cllm.runtime.errors import CheckpointError, OutputError
from cllm.serve.errors import Refused

IMPORTED = "models"
_ROUND = re.compile(r"(?:^|/)rounds/\d+/run$")


def routes(app: App) -> APIRouter:
    router = APIRouter()
    library, workspace = app.part(Library), app.workspace

    @router.get("/api/models")
    def models() -> Response:
        return reply(library.models())

    @router.get("/api/models/inspect")
    def one(request: Request) -> Response:
        place, entry = library.model(asked.text(request, "path"))
        return reply(inspect(entry, place, workspace.root))

    @router.post("/api/models/delete")
    async def delete(request: Request) -> Response:
        return reply({"trash": await asyncio.to_thread(put_away, (await body(request)).get("path"))})

    def put_away(path: object) -> str:
        place, entry = library.model(path)
        words = library.busy(place)
        if words:
            raise Refused(409, f"{entry['path']} {words}.", param="path", code="busy")
        if _ROUND.search(entry["path"]):
            raise Refused(
                409, f"{entry['path']} is a round of a training that goes on from it. Delete that training instead.", param="path", code="busy"
            )
        return library.trash.put(place, entry["kind"])

    @router.post("/api/models/restore")
    async def restore(request: Request) -> Response:
        identity = _identity(await body(request))
        entry = library.trash.entry(identity)
        library.trash.restore(identity, workspace.resolve(entry["path"], "trash"))
        return reply({"path": entry["path"]})

    @router.get("/api/trash")
    def trash() -> Response:
        return reply(library.trash.list())

    @router.post("/api/trash/forget")
    async def forget(request: Request) -> Response:
        return reply({"bytes": await asyncio.to_thread(library.trash.forget, _identity(await body(request)))})

    @router.post("/api/models/import")
    async def bring(request: Request) -> Response:
        into = workspace.resolve(IMPORTED, "path")
        if asked.choice(request, "kind", ("cllm", "hf"), "cllm") == "hf":
            name = plain_name(asked.text(request, "name", "")) or time.strftime("imported-%Y%m%d-%H%M%S")
            workplace = workspace.state / "uploads"
            sent, size = await receive_file(request.receive, workplace, "folder.sent", workplace, announced_bytes(request))
            place = await asyncio.to_thread(_unpacked, sent, into, name)
            return reply({"path": workspace.relative(place), "bytes": size}, 201)
        name = time.strftime("imported-%Y%m%d-%H%M%S.cllm")
        place, size = await receive_file(request.receive, into, name, workspace.state / "uploads", announced_bytes(request), _check_model)
        return reply({"path": workspace.relative(place), "bytes": size}, 201)

    @router.post("/api/models/sample")
    async def sample() -> Response:
        return reply({"path": await asyncio.to_thread(bring_sample)}, 201)

    def bring_sample() -> str:
        """The path of the model that comes with CLLM as a file of the workspace, which it becomes where it is none."""
        place = workspace.resolve(f"{IMPORTED}/{SAMPLE_FILE.name}")
        if not place.exists():
            write_file(place, SAMPLE_FILE.read_bytes(), MODEL)
        return workspace.relative(place)

    @router.get("/api/download")
    def download(request: Request) -> Response:
        place = workspace.resolve(asked.text(request, "path"), exists=True)
        if place == workspace.root or not (place.is_dir() or place.is_file()):
            raise Refused(400, "path must be a file or a folder inside the workspace.", param="path", code="invalid_path")
        name = place.name if place.is_file() else f"{place.name}.zip"
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
        if place.is_file():
            return FileResponse(place, headers=headers, media_type="application/octet-stream")
        return StreamingResponse(zipped(place), headers=headers, media_type="application/zip")

    return router


def _unpacked(sent: Path, into: Path, name: str) -> Path:
    """The folder that was sent, under its name or the next one that is free. Raises Refused, CheckpointError, OutputError."""
    beside = sent.with_name(f"{secrets.token_hex(8)}.folder")
    try:
        folders.unpack(sent, beside)
        into.mkdir(parents=True, exist_ok=True)
        number = 1
        while os.path.lexists(place := into / (name if number == 1 else f"{name}-{number}")):
            number += 1
        beside.rename(place)
        return place
    except OSError as error:
        raise OutputError(f"the folder could not be written ({reason(error)}).") from error
    finally:
        sent.unlink(missing_ok=True)
        folders.remove(beside)


def _check_model(file: Path) -> None:
    """Raises CheckpointError for what is no .cllm file. That its weights are those that were written is seen when it is loaded."""
    try:
        known = "cllm_format" in read_header(file).metadata
    except CheckpointError:
        known = False
    if not known:
        raise CheckpointError(f"this is no .cllm file. {NOT_A_CHECKPOINT}")


def _identity(given: dict[str, object]) -> str:
    found = given.get("trash")
    if not isinstance(found, str):
        raise Refused(400, "trash must be the id of something in the trash.", param="trash", code="invalid_type")
    return found
