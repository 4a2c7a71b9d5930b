"""How an answer reaches its client: whole or as server-sent events, watched for a client that leaves or does not read."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response

from cllm.serve.errors import Refused
from cllm.serve.job import Job, Piece
from cllm.serve.replies import (
    DONE,
    Answer,
    TokenShown,
    Usage,
    chat_chunk,
    chat_reply,
    completion_chunk,
    completion_reply,
    encode,
    event,
    usage_chunk,
)
from cllm.serve.safety import ClientGone
from cllm.serve.service import Service
from cllm.serve.tools import CallForm, read_calls

SEND_SECONDS = 30.0  # in which a client has to take what is sent, or its answer ends
_LOOK = 1.0  # seconds between two looks at whether the thread that computes still does


class Reply:
    """The answers of a job in the form of one endpoint. calls: how the model calls a tool, where it may."""

    def __init__(self, job: Job, is_chat: bool, *, echo: bool = False, calls: CallForm | None = None) -> None:
        self.job, self.is_chat, self.echo, self.calls = job, is_chat, echo, calls
        self.created = int(time.time())
        self.identity = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._sent = [0] * len(job.samples)  # characters of each answer

    @property
    def usage(self) -> Usage:
        return Usage(self.job.prompt_tokens, self.job.completion_tokens, sum(each.reused for each in self.job.tickets))

    def whole(self) -> dict[str, Any]:
        """All answers, once they have ended."""
        job = self.job
        scored = job.is_scored
        answers = []
        for each in job.samples:
            text, tokens = each.text, each.tokens
            if self.echo:
                prompt = job.prompts[each.index // job.num_samples]
                text = prompt.text + text
                tokens = [*(job.prompt_scores[each.index // job.num_samples] if prompt.text else ()), *tokens]
            said, calls = self._calls(text)
            answers.append(Answer(each.index, said, "tool_calls" if calls else finish(each.reason), tokens if scored else None, calls))
        reply = chat_reply if self.is_chat else completion_reply
        return reply(self.identity, self.created, job.served.identity, answers, self.usage)

    def beginning(self) -> list[dict[str, Any]]:
        """What a stream begins with: the role of a chat, the prompt of an echo (when its scores are there)."""
        job = self.job
        if self.is_chat:
            return [self._chunk(each.index, "", role="assistant") for each in job.samples]
        if not self.echo:
            return []
        chunks = []
        for each in job.samples:
            number = each.index // job.num_samples
            text = job.prompts[number].text
            chunks.append(self._chunk(each.index, text, tokens=job.prompt_scores[number] if job.is_scored and text else []))
        return chunks

    def piece(self, piece: Piece) -> dict[str, Any]:
        if self.calls is not None:  # whether the answer is a call shows at its end
            if not piece.reason:
                return {}
            said, calls = self._calls(self.job.samples[piece.sample].text)
            reason = "tool_calls" if calls else finish(piece.reason)
            return self._chunk(piece.sample, said, reason, self.job.samples[piece.sample].tokens, calls=calls)
        return self._chunk(piece.sample, piece.text, finish(piece.reason) if piece.reason else None, piece.tokens)

    def last(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return usage_chunk(self.identity, kind, self.created, self.job.served.identity, self.usage)

    def _chunk(
        self,
        index: int,
        text: str,
        reason: str | None = None,
        tokens: list[TokenShown] | None = None,
        role: str | None = None,
        calls: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        shown = (tokens or None) if self.job.is_scored else None
        model = self.job.served.identity
        if not self.is_chat:
            offset = self._sent[index]
            self._sent[index] += len(text)
            return completion_chunk(self.identity, self.created, model, index, text, reason, shown, offset)
        delta: dict[str, Any] = {"role": role, "content": ""} if role else {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": number, **each} for number, each in enumerate(calls)]
        return chat_chunk(self.identity, self.created, model, index, delta, reason, shown)

    def _calls(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        if self.calls is None:
            return text, []
        said, calls = read_calls(text, self.calls)
        for name in self.job.served.tokenizer.special_tokens:
            said = said.replace(name, "")
        return said, calls


def finish(reason: str) -> str:
    """OpenAI's word for the engine's. Raises Refused for the reasons that are no end of an answer."""
    if reason in ("stop", "end"):
        return "stop"
    if reason == "length":
        return "length"
    if reason == "deadline":
        raise Refused(504, "the answer took longer than a request may. Ask for fewer tokens, or try again when less is going on.", code="timeout")
    if reason == "slow reader":
        raise Refused(408, "the client did not read its answer fast enough.", code="slow_reader")
    if reason.startswith("refused: "):
        raise Refused(400, f"the answer cannot be given: {reason.removeprefix('refused: ')}", code="invalid_value")
    if reason == "cancelled":
        raise Refused(503, "the answer was ended: the server is about to end.", code="unavailable")
    raise Refused(500, f"the answer could not be finished: {reason.removeprefix('error: ')}", code="internal_error")


class Answering(Response):
    """Sends the answers of a job as they are asked for; a client that leaves ends the job within a step."""

    def __init__(self, service: Service, reply: Reply, *, streamed: bool, include_usage: bool) -> None:
        self.service, self.reply, self.job = service, reply, reply.job
        self.streamed, self.include_usage = streamed, include_usage
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        noted, job = scope["noted"], self.job
        leaving = asyncio.create_task(_left(receive))
        sending = asyncio.create_task((self._stream if self.streamed else self._whole)(send))
        try:
            await asyncio.wait({leaving, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except ClientGone:  # what was not sent is never sent: the connection is closed
            pass
        finally:
            for task in (leaving, sending):
                task.cancel()
            if not job.is_finished:
                self.service.cancel(job)
            noted |= {"model": job.served.identity, "prompt_tokens": job.prompt_tokens, "completion_tokens": job.completion_tokens}
            if job.first_token is not None:
                self.service.metrics.first_token(job.first_token - job.started)
                noted["first_token_ms"] = round((job.first_token - job.started) * 1000, 1)
            noted["finish"] = ",".join(sorted({each.reason for each in job.samples if each.reason})) if job.is_finished else "client left"

    async def _whole(self, send: Any) -> None:
        while not self.job.is_finished:
            await self._news()
        content = encode(self.reply.whole())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await _in_time(send, {"type": "http.response.start", "status": 200, "headers": headers})
        await _in_time(send, {"type": "http.response.body", "body": content})

    async def _stream(self, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await _in_time(send, {"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for content in self._events():
                await _in_time(send, {"type": "http.response.body", "body": content, "more_body": True})
        except Refused as error:  # the status is sent already
            await _in_time(send, {"type": "http.response.body", "body": event(error.body()), "more_body": True})
        await _in_time(send, {"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        job, reply = self.job, self.reply
        has_begun = False
        while True:
            ended = job.is_finished  # before the pieces are taken: none comes after the last end
            pieces = [job.pieces.popleft() for _ in range(len(job.pieces))]
            chunks = []
            if not has_begun and (pieces or not reply.echo):
                chunks, has_begun = reply.beginning(), True
            content = b"".join(map(event, chunks))
            for piece in pieces:
                chunk = reply.piece(piece)
                content += event(chunk) if chunk else b""
            if content:
                yield content
            if ended:
                break
            await self._news()
        yield (event(reply.last()) if self.include_usage else b"") + DONE

    async def _news(self) -> None:
        try:
            async with asyncio.timeout(_LOOK):
                await self.job.changed.wait()
            self.job.changed.clear()
        except TimeoutError:
            if not self.service.is_alive:
                raise Refused(503, "the server is about to end.", code="unavailable") from None


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _in_time(send: Callable[[Any], Awaitable[None]], message: Any) -> None:
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await send(message)
    except TimeoutError:
        raise ClientGone from None
