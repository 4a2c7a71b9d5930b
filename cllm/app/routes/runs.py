"""Runs: the list, their curves, layers, samples and faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from cllm.app.exchange import reply
from cllm.app.readers import run_detail
from cllm.app.readers.library import Library
from cllm.app.readers.series import AXES, KEYS, MOST_POINTS, layers, series
from cllm.app.routes import asked
from cllm.app.state import App
from cllm.serve.errors import Refused

Read = Callable[[Request, Path, dict[str, Any]], Any]
"""Answers a request about a run, given its folder and its entry of the list."""


def routes(app: App) -> APIRouter:
    router = APIRouter()
    library = app.part(Library)
    turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def about(path: str) -> Callable[[Read], Read]:
        """A route about one run, in a thread, so that a long file keeps nobody else waiting. Of several requests about the same run one is answered
        after the other, and those that wait hold no thread: there are 40 for all routes."""

        def add(read: Read) -> Read:
            def answer(request: Request, name: str) -> Response:
                run, entry = library.run(name)
                run_detail.check_run(run, library.root)
                return reply(read(request, run, entry))

            @router.get(path)
            async def in_turn(request: Request) -> Response:
                name = asked.text(request, "run")
                async with turns.setdefault(name, asyncio.Lock()):
                    if await request.is_disconnected():
                        raise Refused(408, "nobody waits for this any more.", code="client_left")
                    return await run_in_threadpool(answer, request, name)

            return read

        return add

    @router.get("/api/runs")
    def runs() -> Response:
        return reply(library.runs())

    @about("/api/runs/detail")
    def detail(request: Request, run: Path, entry: dict[str, Any]) -> Any:
        with library.shelf.rows(run) as rows:
            return {**entry, **run_detail.detail(run, library.root, rows)}

    @about("/api/runs/series")
    def curves(request: Request, run: Path, entry: dict[str, Any]) -> Any:
        axis = asked.choice(request, "x", tuple(AXES), "step")
        begin, end = asked.number(request, "from"), asked.number(request, "to")
        points = asked.whole(request, "points", 1, MOST_POINTS, 1_500)
        keys = _keys(asked.text(request, "keys", "loss"))
        with library.shelf.rows(run) as rows:
            return series(rows, axis, keys, begin, end, points)

    @about("/api/runs/layers")
    def of_layers(request: Request, run: Path, entry: dict[str, Any]) -> Any:
        points = asked.whole(request, "points", 1, 2_000, 200)
        with library.shelf.rows(run) as rows:
            return layers(rows, points)

    @about("/api/runs/samples")
    def samples(request: Request, run: Path, entry: dict[str, Any]) -> Any:
        return run_detail.samples(run)

    @about("/api/runs/faults")
    def faults(request: Request, run: Path, entry: dict[str, Any]) -> Any:
        with library.shelf.rows(run) as rows:
            return run_detail.faults(run, rows)

    @about("/api/runs/tree")
    def work_tree(request: Request, run: Path, entry: dict[str, Any]) -> Any:
        with library.shelf.rows(run) as rows:
            return run_detail.work_tree(run, library.root, rows)

    @about("/api/runs/rounds")
    def rounds(request: Request, run: Path, entry: dict[str, Any]) -> Any:
        return run_detail.rounds(run)

    return router


def _keys(given: str) -> list[str]:
    keys = list(dict.fromkeys(each for each in given.split(",") if each))
    for key in keys:
        if key not in KEYS:
            raise Refused(
                400, f"keys holds {key[:80]!r}, which no training row has. There are {', '.join(KEYS)}.", param="keys", code="invalid_value"
            )
    return keys
