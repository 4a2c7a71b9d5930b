"""HTTP/1.1 as uvicorn speaks it with h11, with two things added: a time in which a request's headers have to arrive, and errors as JSON.

h11 bounds the size of headers (64 KB); without a time a client could hold a connection open for ever with one byte now and then.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cllm.serve.errors import error_body
from cllm.serve.replies import encode

HEADER_SECONDS = 20.0


class Protocol(H11Protocol):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._is_refused = False
        self._arrival = asyncio.get_running_loop().call_later(HEADER_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._arrival.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._arrival.cancel()
            self._arrival = asyncio.get_running_loop().call_later(HEADER_SECONDS + self.timeout_keep_alive, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrival.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        content = encode(error_body(400, "this is no HTTP/1.1 request, or its headers are too long.", code="invalid_http"))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), (b"connection", b"close")]
        events = (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=content), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(each) or b"" for each in events))
        # Closing while the client still sends would reset the connection, and the answer could be lost on its way.
        self._is_refused = True
        self.transport.write_eof()
        asyncio.get_running_loop().call_later(1.0, self.transport.close)
