"""The socket of a server, and the program that reads HTTP from it. Nothing of models is imported here."""

from __future__ import annotations

import socket
from typing import Any

from cllm.runtime.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """The socket of an address, port 0: any that is free. Raises UserError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
        found.set_inheritable(False)
        return found
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be opened ({(error.strerror or str(error)).lower()}). Choose another port.") from error


def new_server(app: Any) -> Any:
    """A uvicorn server of an ASGI application that checks and logs by itself."""
    import uvicorn

    from cllm.serve.protocol import Protocol

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # the log is that of the application around all others
        access_log=False,
        proxy_headers=False,  # a client could give itself another address
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)
