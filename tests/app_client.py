"""The app in this process, without a socket: requests go to its ASGI application, all checks of its gate included."""

import asyncio
import json
import threading
from urllib.parse import urlencode

from cllm.app.security import Access
from cllm.app.server import build
from cllm.app.state import App
from cllm.app.workspace import Workspace
from cllm.cli.app import parser
from cllm.cli.declared import declared_commands
from cllm.serve.safety import Policy

KEY = "key-of-the-tests"
COMMANDS = declared_commands(parser())


class Answer:
    """status, headers by name in lower case, content; json: the object in it."""

    def __init__(self, status, headers, parts):
        self.status, self.headers, self.parts = status, headers, parts
        self.content = b"".join(parts)

    @property
    def json(self):
        assert self.headers["content-type"] == "application/json", self.headers
        return json.loads(self.content, parse_constant=lambda word: (_ for _ in ()).throw(AssertionError(f"{word} is no JSON")))

    @property
    def message(self):
        return self.json["error"]["message"]


class Client:
    """An app whose workspace is `root`, in a thread with an event loop of its own. A context manager."""

    def __init__(self, root):
        self.app = App.begin(Workspace(root), COMMANDS, threads=1)
        self.access = Access(b"s" * 32, 8421)
        self.gate = build(self.app, Policy.of("127.0.0.1", KEY), self.access)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.app.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def get(self, path, /, **query):
        return self.ask("GET", path, query)

    def post(self, path, body=None, /, **query):
        """body: an object is sent as JSON, bytes as the bytes of a file."""
        return self.ask("POST", path, query, body)

    def ask(self, method, path, query=None, body=None, headers=(), pieces=None, known=True):
        """pieces: the messages that bring the body, instead of one. known: bear the key. headers: more of them; a name given again replaces one."""
        return self.begin(method, path, query, body, headers, pieces, known).result(300)

    def begin(self, method, path, query=None, body=None, headers=(), pieces=None, known=True):
        """The same without waiting for the answer, which comes as a future."""
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        content = body if isinstance(body, bytes) else b"" if body is None and method == "GET" else json.dumps({} if body is None else body).encode()
        given = [("host", "127.0.0.1:8421"), *([("authorization", f"Bearer {KEY}")] if known else [])]
        if method != "GET":
            given += [("content-type", kind), *([] if pieces is not None else [("content-length", str(len(content)))])]
        replaced = {name for name, _ in headers}
        given = [*(each for each in given if each[0] not in replaced), *(each for each in headers if each[1] is not None)]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": urlencode(query or {}, doseq=True).encode(), "root_path": "", "scheme": "http",
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8421),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in given],
        }  # fmt: skip
        messages = [{"type": "http.request", "body": content, "more_body": False}] if pieces is None else list(pieces)
        return asyncio.run_coroutine_threadsafe(self._ask(scope, messages), self._loop)

    async def _ask(self, scope, messages):
        sent, ended = [], asyncio.Event()

        async def receive():
            if messages:
                return messages.pop(0)
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await self.gate(scope, receive, send)
        ended.set()
        start = sent[0] if sent else {"status": 0, "headers": []}
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
        return Answer(start["status"], headers, [each.get("body", b"") for each in sent[1:]])
