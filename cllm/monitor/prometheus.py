"""The newest numbers of a run, served in the text format of Prometheus at http://127.0.0.1:PORT/metrics, to this machine only."""

from __future__ import annotations

import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cllm.runtime.errors import UserError


class PrometheusEndpoint:
    """Serves the values that `update` was given last, from a thread of its own. Raises UserError when the port cannot be opened."""

    def __init__(self, port: int) -> None:
        self._values: dict[str, float] = {}
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                body = endpoint.text().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Requests leave no line in the run's log."""

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"prometheus_port {port} cannot be opened ({error.strerror or error}). Choose another, or 0 for none.") from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, name="cllm-prometheus")
        self._thread.start()

    def update(self, kind: str, values: dict[str, Any]) -> None:
        """Makes each number among the values a gauge named cllm_KIND_NAME."""
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        # A new mapping: the thread that serves may be reading the old one.
        self._values = self._values | {re.sub(r"\W", "_", f"cllm_{kind}_{key}"): value for key, value in numbers.items()}

    def text(self) -> str:
        rows = sorted(self._values.items())
        return "".join(f"# TYPE {name} gauge\n{name} {_number(value)}\n" for name, value in rows)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
