"""The models that one talks to in the app: each is loaded when it is first asked for, under its path in the workspace, and all share one thread that
computes. Nothing heavy is imported before: the app is there within a second, and whoever never talks to a model never waits for it.
"""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.runtime.errors import CheckpointError, DataError, UserError
from cllm.runtime.progress import compilation, say
from cllm.serve.errors import Refused

if TYPE_CHECKING:
    from fastapi import FastAPI

    from cllm.app.state import App
    from cllm.serve.replies import TokenShown
    from cllm.serve.served import Served
    from cllm.serve.service import Service

MOST_LOADED = 4  # models at a time; the one that was asked least recently makes room
_CACHE = 512 << 20  # bytes for keys and values of one model at most, so that four of them leave room for a training
_ROWS = 16  # answers at a time
_ALTERNATIVES = 8
_MOST_WINDOWS = 64  # of a text whose surprise is measured
_LOOK = 0.05  # seconds


class Talk:
    """For the whole app: `app.part(Talk)`."""

    def __init__(self, app: App) -> None:
        self._workspace, self._threads = app.workspace, app.threads
        app.closing.append(self.close)
        self._loading = threading.Lock()  # one model at a time: each takes all cores
        self._service: Service | None = None
        self._api: FastAPI | None = None
        self._faults: dict[str, tuple[Any, str]] = {}  # by path, the version of a model that could not be loaded, and why
        self._loaded: dict[str, dict[str, Any]] = {}  # by path, the one that was asked most recently last
        self._waiting: tuple[str, str, float] | None = None  # the model that is being loaded, what is done for it, and since when

    @property
    def api(self) -> FastAPI | None:
        """OpenAI's routes, once a model was loaded."""
        return self._api

    def loaded(self) -> list[dict[str, Any]]:
        """What is loaded: {"id", "context", "parameters", "has_chat", "seconds"}."""
        return [_told(each) for each in self._loaded.values()]

    def waiting(self) -> dict[str, Any]:
        """What people wait for who have asked something: {"path": the model that is being loaded or None, "words", "seconds"}; "" for nothing."""
        path, words, since = self._waiting or (None, "", time.monotonic())
        if compilation.is_going_on:
            words = "compiling kernels for this machine, which happens once"
        return {"path": path, "words": words, "seconds": int(max(time.monotonic() - since, compilation.seconds))}

    def fault(self, identity: str) -> str | None:
        """Why a model could not be loaded; None where it was not tried, or has changed since."""
        version, words = self._faults.get(identity, (None, ""))
        return words if words and _version(self._workspace.root / identity) == version else None

    def let_go(self, place: Path) -> bool:
        """Unloads the models that lie at `place` or below it. False where one of them is answering somebody, and then it stays."""
        if not self._below(place):
            return True  # without waiting for another one that is being loaded
        with self._loading:
            for identity in self._below(place):
                assert self._service is not None
                if self._service.is_busy(identity):
                    return False
                del self._loaded[identity]
                self._service.remove(identity)
        gc.collect()
        return True

    def _below(self, place: Path) -> list[str]:
        return [identity for identity in list(self._loaded) if (self._workspace.root / identity).is_relative_to(place)]

    def load(self, text: str, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
        """Makes a model ready that is not, or has changed since. loop: where answers go. Raises Refused and the errors of loading a model."""
        place = self._workspace.resolve(text, exists=True)
        identity = self._workspace.relative(place)
        with self._loading:
            version = _version(place)
            known = self._loaded.pop(identity, None)
            if known is None or known["version"] != version:
                self._waiting = (identity, "reading its weights", time.monotonic())
                try:
                    known = self._load(identity, place, loop) | {"version": version}
                except (CheckpointError, DataError, UserError) as error:
                    self._faults[identity] = version, str(error).replace(f"{self._workspace.root}/", "")
                    raise
                finally:
                    self._waiting = None
            self._loaded[identity] = known
            self._make_room()
            return _told(known)

    def unload(self, text: str) -> None:
        """Lets go of a model; answers that are being written are finished. Raises Refused where it is not loaded."""
        with self._loading:
            if self._loaded.pop(text, None) is None or self._service is None:
                raise Refused(404, "this model is not loaded.", param="path", code="not_found")
            self._service.remove(text)
        gc.collect()

    async def surprise(self, identity: str, text: str) -> dict[str, Any]:
        """How surprising each token of a text is to a loaded model. A text longer than the context is read in windows that overlap by half, so that
        every token has at least half of the context before it. Raises Refused."""
        from cllm.serve.openai import CompletionRequest, completion_request

        if not text:
            raise Refused(400, "there is no text. Give at least one character.", param="text", code="invalid_value")
        service, served = self._find(identity)
        tokens = await asyncio.to_thread(served.tokenize, text)
        start = [] if served.tokenizer.eot_id is None else [served.tokenizer.eot_id]  # a document begins behind the end of another
        windows, taken = _windows([*start, *tokens], served.context)
        if len(windows) > _MOST_WINDOWS:
            most = served.context * _MOST_WINDOWS // 2
            raise Refused(400, f"the text has {len(tokens):,} tokens; at most about {most:,} are measured at once. Shorten it.", param="text")
        body = {"model": identity, "prompt": windows, "max_tokens": 0, "echo": True, "logprobs": _ALTERNATIVES}
        asked: CompletionRequest = completion_request(body)
        job = await asyncio.to_thread(service.complete, asked, "surprise")
        try:
            while not job.is_finished:
                await asyncio.sleep(_LOOK)
                if not service.is_alive:
                    raise Refused(503, "the app is about to end.", code="unavailable")
        finally:
            if not job.is_finished:
                service.cancel(job)
        scores = [score for each, first in zip(job.prompt_scores, taken, strict=True) for score in each[first:]][len(start) :]
        return _measured(scores)

    def close(self) -> None:
        """Ends the thread that computes."""
        if self._service is not None:
            self._service.stop()

    def _find(self, identity: str) -> tuple[Service, Served]:
        if self._service is None:
            raise Refused(404, "no model is loaded yet. Load one first.", param="model", code="model_not_found")
        return self._service, self._service.find(identity)

    def _load(self, identity: str, place: Path, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
        began = time.monotonic()
        from cllm import runtime
        from cllm.checkpoint.model_file import load_on
        from cllm.generate.engine import Engine
        from cllm.serve.served import Served
        from cllm.serve.server import api
        from cllm.serve.service import Service

        with runtime.use(threads=self._threads):
            model, tokenizer = load_on(place, "auto", report=say)
            if tokenizer is None:
                raise Refused(400, f"{identity} has no tokenizer, so nobody can talk to it. Put its tokenizer.json beside it.", param="path")
            self._waiting = (identity, "computing its first tokens", began)
            served = Served(identity, model, tokenizer, Engine(model, vocab_size=tokenizer.vocab_size, memory=_CACHE, most_rows=_ROWS))
            served.warm_up()
        if self._service is None:
            self._service = Service([], threads=self._threads)
            self._service.start(loop)
            self._api = api(self._service)
        self._service.replace(served)
        parameters = sum(each.numel() for each in model.parameters())
        found = {"id": identity, "context": served.context, "parameters": parameters, "has_chat": served.has_template}
        return found | {"seconds": time.monotonic() - began}

    def _make_room(self) -> None:
        assert self._service is not None
        for identity in list(self._loaded):
            if len(self._loaded) <= MOST_LOADED:
                return
            if not self._service.is_busy(identity):
                del self._loaded[identity]
                self._service.remove(identity)


def _told(known: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in known.items() if name != "version"}


def _version(place: Path) -> Any:
    """What differs when a model has changed: the checkpoint that a run would give, or the time of a file."""
    from cllm.checkpoint.place import CHECKPOINTS
    from cllm.checkpoint.store import CheckpointStore

    if (place / CHECKPOINTS).is_dir():
        store = CheckpointStore(place / CHECKPOINTS)
        return store.best(), store.latest()
    found = place.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _windows(tokens: Sequence[int], context: int) -> tuple[list[list[int]], list[int]]:
    """(windows, how many tokens at the beginning of each were in the one before)."""
    windows, taken = [list(tokens[:context])], [0]
    overlap = context // 2
    at = context - overlap
    while at + overlap < len(tokens):
        windows.append(list(tokens[at : at + context]))
        taken.append(overlap)
        at += context - overlap
    return windows, taken


def _measured(scores: Sequence[TokenShown]) -> dict[str, Any]:
    from cllm.serve.replies import token_name

    tokens = []
    total, counted, num_bytes = 0.0, 0, 0
    for content, logprob, top in scores:
        rank = next((number for number, (other, _) in enumerate(top, 1) if other == content), None)
        shown = [{"text": token_name(other), "logprob": value} for other, value in top]
        tokens.append({"text": token_name(content), "logprob": logprob, "rank": rank, "top": shown})
        if logprob is not None:
            total, counted, num_bytes = total - logprob, counted + 1, num_bytes + len(content)
    known = counted > 0 and math.isfinite(total)
    return {
        "tokens": tokens,
        "perplexity": math.exp(total / counted) if known and total / counted < 700 else None,
        "bits_per_byte": total / math.log(2) / num_bytes if known and num_bytes else None,
    }
