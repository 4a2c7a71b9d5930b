"""A tiny model with a chat template, and a server of it in this process, for the tests of this folder."""

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

from cllm import save
from cllm.config.model import ModelConfig
from cllm.data.tokens.chat_template import with_template
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.generate.engine import Engine
from cllm.model.model import Model
from cllm.serve.listening import listen
from cllm.serve.safety import Policy
from cllm.serve.served import Served
from cllm.serve.server import application, serve
from cllm.serve.service import Service

TEXT = "What is two plus two? It is four. Be brief. "


def make_model(context=256):
    tokenizer = with_template(Tokenizer.train([TEXT * 20], vocab_size=320))
    # Tied embeddings of random weights would repeat the last token for ever.
    config = ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=context, tie_embeddings=False)
    return Model(config), tokenizer


def write_model(path, context=256):
    model, tokenizer = make_model(context)
    save(model, path, tokenizer=tokenizer)
    return model, tokenizer


def served_as(identity, model, tokenizer, **engine):
    return Served(identity, model, tokenizer, Engine(model, vocab_size=tokenizer.vocab_size, **engine))


class Running:
    """A server while it runs: its port, its service, its log."""

    def __init__(self, models, policy=None, **options):
        self.service = Service(models, threads=1, **options)
        self.log: list[dict] = []
        self.lines: list[str] = []
        self._where = listen("127.0.0.1", 0)
        self.port = self._where.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.app = application(self.service, policy or Policy.of("127.0.0.1", None), self._note)
        self._ready, self._ends = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(60)

    def _note(self, line):
        self.lines.append(line)
        self.log.append(json.loads(line))

    def _run(self):
        asyncio.run(serve(self.service, self.app, self._where, self._ready.set, self._ends.is_set))

    def close(self):
        self._ends.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def ask(self, path, body=None, method=None, **headers):
        """(status, object or text, headers) of a request; a dict is sent as JSON."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if data is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, _read(answer), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, _read(error), error.headers

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=300)

    def send(self, connection, path, body):
        """A request over a connection of the test's own."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)

    def metric(self, name):
        text = self.ask("/metrics")[1]
        return float(next(line.split()[1] for line in text.splitlines() if line.split()[0].endswith(name)))


def _read(answer):
    content = answer.read()
    return json.loads(content) if answer.headers.get_content_type() == "application/json" else content.decode()


@contextmanager
def running(models, **options):
    server = Running(models, **options)
    try:
        yield server
    finally:
        server.close()
