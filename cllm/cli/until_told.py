"""A server that a command runs until somebody ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from typing import Any


def until_told(run: Callable[[Callable[[], bool]], Coroutine[Any, Any, None]], name: str, ending: str) -> None:
    """Runs a server until Ctrl-C or SIGTERM. It has a thread of its own, because signals belong to the main one.

    run: gets the function that says whether to end. name: of the thread. ending: what a person is told at the first signal. Raises what `run` raised.
    """
    import asyncio

    from cllm.monitor.stop_signals import StopSignals

    failure: list[BaseException] = []
    ends = threading.Event()

    def body() -> None:
        try:
            asyncio.run(run(ends.is_set))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name=name)
    with StopSignals(lambda _: None, ending) as signals:
        thread.start()
        while thread.is_alive():
            if signals.asked is not None:
                ends.set()
            thread.join(0.1)
    if failure:
        raise failure[0]
