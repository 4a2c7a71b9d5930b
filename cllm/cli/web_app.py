"""`cllm app`: what CLLM does, in a browser."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from cllm.cli.console import open_console
from cllm.cli.interrupt import leave_with
from cllm.cli.options import Json, Threads, examples, option, text_option
from cllm.cli.until_told import until_told
from cllm.runtime.errors import CLLMError

_ENDING = "the app ends; jobs go on without it, and it finds them when it is started again (Ctrl-C again to end at once)"

app = typer.Typer()


@app.command(
    name="app",
    epilog=examples("cllm app", "cllm app --port 0 --no-browser", "cllm app --host 0.0.0.0 --api-key KEY      # in reach of other machines"),
)
def web_app(
    context: typer.Context,
    port: Annotated[int, option("--port", int, "Port to listen on. 0: any that is free.", at_least=0, at_most=65535)] = 8421,
    host: Annotated[str, text_option("--host", "Address to listen on. Any but this machine's own needs --api-key.")] = "127.0.0.1",
    api_key: Annotated[
        str | None, text_option("--api-key", "Key for programs, beside the cookie of a browser. CLLM_API_KEY hides it from other users.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address only, and open no browser.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Open the app: what CLLM does, in a browser. The current folder is its workspace; nothing outside of it is read or written. Trainings
    and other jobs are processes of their own, which go on when the app ends."""
    console = open_console(as_json)
    _check_packages()
    from cllm.app.security import Access, read_secret
    from cllm.app.server import build, run
    from cllm.app.state import App
    from cllm.app.workspace import Workspace
    from cllm.cli.declared import declared_commands
    from cllm.serve.listening import listen
    from cllm.serve.safety import Policy

    policy = Policy.of(host, api_key or os.environ.get("CLLM_API_KEY") or None)
    workspace = Workspace(Path.cwd())
    where = listen(host, port)
    access = Access(read_secret(workspace.state / "secret"), where.getsockname()[1])
    state = App.begin(workspace, declared_commands(context.find_root().command), threads)
    gate = build(state, policy, access)
    shown = f"[{host.strip('[]')}]" if ":" in host else host
    address = f"http://{shown}:{where.getsockname()[1]}/?token={access.token}"

    def ready() -> None:
        console.print(address)
        console.event({"event": "serving", "address": address})
        if not no_browser:
            _open_browser(address, workspace.state / "open.html")

    until_told(lambda ends: run(state, gate, where, ready, ends), "cllm-app", _ENDING)
    console.result({"address": address.partition("?")[0]})
    leave_with(0)  # a person who ends it waits for it


def _open_browser(address: str, page: Path) -> None:
    """Opens the user's browser where there is a screen. It is sent to a page that only the user can read and that leads on: an address among the
    arguments of a process would show the token to every user of the machine."""
    if not (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    import webbrowser

    page.unlink(missing_ok=True)
    with open(os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f'<!doctype html><meta charset="utf-8"><title>CLLM</title><meta http-equiv="refresh" content="0; url={address}">\n')
    threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True, name="cllm-browser").start()


def _check_packages() -> None:
    import importlib.util

    missing = [name for name in ("fastapi", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise CLLMError(f'cllm app needs {", ".join(missing)}, which the extra serve installs: pip install "cllm[serve]"')
