"""`cllm serve`: models behind OpenAI's API, for many clients at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm.cli.console import Console, open_console
from cllm.cli.options import (
    Device,
    Draft,
    Json,
    KvCache,
    Threads,
    Weights,
    argument,
    check_model,
    examples,
    load_draft,
    load_model,
    option,
    text_option,
)
from cllm.cli.until_told import until_told
from cllm.runtime.errors import CLLMError, UserError
from cllm.shell import quoted

if TYPE_CHECKING:
    from cllm.serve.served import Served

_ENDING = "no new requests are taken, and answers that are being written may end (Ctrl-C again to end at once)"

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm serve runs/demo",
        "cllm serve --follow runs/books                # beside a training: better checkpoints are taken as they come",
        "cllm serve runs/a books.cllm --host 0.0.0.0 --api-key KEY",
    )
)
def serve(
    models: Annotated[list[str] | None, argument("MODEL...", "Runs, checkpoint folders, .cllm files or Hugging Face folders.")] = None,
    port: Annotated[int, option("--port", int, "Port to listen on. 0: any that is free.", at_least=0, at_most=65535)] = 8000,
    host: Annotated[str, text_option("--host", "Address to listen on. Any but this machine's own needs --api-key.")] = "127.0.0.1",
    api_key: Annotated[str | None, text_option("--api-key", "Key that every request has to bear. CLLM_API_KEY hides it from other users.")] = None,
    allow_host: Annotated[
        list[str] | None, text_option("--allow-host", "A name by which the server is asked for. Can be given several times.")
    ] = None,
    follow: Annotated[list[str] | None, text_option("--follow", "A run whose better checkpoints are taken as it writes them.", "RUN")] = None,
    weights: Weights = None,
    kv_cache: KvCache = None,
    draft: Draft = None,
    device: Device = "auto",
    threads: Threads = None,
    cache_mb: Annotated[
        int | None, option("--cache-mb", int, "Most memory for keys and values of each model. [default: a quarter]", optional=True, at_least=1)
    ] = None,
    most_rows: Annotated[int, option("--most-rows", int, "Most answers of a model that are written at once.", at_least=1, at_most=1024)] = 64,
    most_waiting: Annotated[int, option("--most-waiting", int, "Most answers that wait. More requests are refused.", at_least=1)] = 256,
    deadline: Annotated[float, option("--deadline", float, "Seconds that one request may take.", above=0.0)] = 600.0,
    as_json: Json = False,
) -> None:
    """Serve models over HTTP, in the form of OpenAI's API."""
    console = open_console(as_json)
    _check_packages()
    from cllm.serve.safety import Policy

    policy = Policy.of(host, api_key or os.environ.get("CLLM_API_KEY") or None, allow_host or ())
    places = _places(models or [], follow or [])
    for path in places.values():
        check_model(path)
    from cllm import runtime
    from cllm.generate.engine import Engine
    from cllm.serve.follow import Follower, newest
    from cllm.serve.listening import listen
    from cllm.serve.served import Served
    from cllm.serve.server import application
    from cllm.serve.server import serve as run
    from cllm.serve.service import Service

    def load(identity: str, path: str) -> Served:
        with runtime.use(threads=threads):
            model, tokenizer = load_model(path, weights=weights, device=device, kv_cache=kv_cache)
            memory = None if cache_mb is None else cache_mb << 20
            guesser = load_draft(draft, tokenizer, weights, device, kv_cache)
            engine = Engine(
                model, vocab_size=tokenizer.vocab_size, memory=memory, most_rows=most_rows, most_waiting=most_waiting, draft=guesser
            )  # fmt: skip
            served = Served(identity, model, tokenizer, engine)
            served.warm_up()
        return served

    followed = {_identity(path): path for path in follow or ()}
    begun = {identity: newest(path) for identity, path in followed.items()}
    served = [load(identity, str(begun.get(identity) or path)) for identity, path in places.items()]
    where = listen(host, port)
    service = Service(served, threads=threads, deadline=deadline)
    followers = [Follower(Path(path), identity, begun[identity], load, service, console.print) for identity, path in followed.items()]
    address = f"http://{f'[{host}]' if ':' in host else host}:{where.getsockname()[1]}"
    application_ = application(service, policy)

    def ready() -> None:
        _tell(console, address, served, policy.key is not None)
        for each in followers:
            each.start()

    try:
        until_told(lambda ends: run(service, application_, where, ready, ends), "cllm-serve", _ENDING)
    finally:
        for each in followers:
            each.stop()
    console.result({"address": address, "models": list(places), "requests": service.metrics.num_requests})


def _tell(console: Console, address: str, served: list[Served], has_key: bool) -> None:
    """The address, and how to try it."""
    first = served[0]
    for each in served:
        if not each.has_template:
            console.print(f"{each.identity} has no chat template; chats are written plainly, as User: ... Assistant: ...")
    console.event({"event": "serving", "address": address, "models": [each.identity for each in served]})
    key = ' -H "Authorization: Bearer $CLLM_API_KEY"' if has_key else ""
    body = f'{{"model": "{first.identity}", "prompt": "It was", "max_tokens": 50}}'
    console.print(f"Serving {', '.join(each.identity for each in served)} at {address} (Ctrl-C ends it). Try:")
    console.print(f"  curl {address}/v1/completions{key} -H 'Content-Type: application/json' -d {quoted(body)}")


def _places(models: list[str], follow: list[str]) -> dict[str, str]:
    """Where each model lies, by its id."""
    places: dict[str, str] = {}
    given = [*models, *(path for path in follow if Path(path).resolve() not in {Path(each).resolve() for each in models})]
    if not given:
        raise UserError("say which model to serve, as in: cllm serve runs/demo. A small one comes with CLLM: cllm serve sample")
    for path in given:
        identity = _identity(path)
        if identity in places:
            raise UserError(f"{places[identity]} and {path} are both named {identity!r}, which is how clients ask for them. Rename one.")
        places[identity] = path
    return places


def _identity(path: str) -> str:
    return Path(path).resolve().name


def _check_packages() -> None:
    import importlib.util

    missing = [name for name in ("fastapi", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise CLLMError(f'cllm serve needs {", ".join(missing)}, which the extra serve installs: pip install "cllm[serve]"')
