"""Shows where a program stands still: the stacks of all threads, when nothing has moved for a while."""

import faulthandler
import sys
import time
from collections.abc import Callable
from typing import TextIO

from cllm.runtime.progress import Ticker, say


class Watchdog:
    """Dumps the stacks of all threads when `beat` was not called for `seconds`, and calls `on_stall(seconds_without_beat)`; again after each pause.

    seconds 0: never. Nothing is ended: a slow disk may come back. A call into C that holds the interpreter's lock stops the watchdog's own thread
    as well; the interpreter's timer, wound up again at each look, then dumps the stacks (without a call of `on_stall`).
    """

    def __init__(self, seconds: float, on_stall: Callable[[float], None] | None = None, stream: TextIO | None = None) -> None:
        self.seconds, self._on_stall, self._stream = seconds, on_stall, stream
        self._last = time.monotonic()
        self._reported = 0.0
        self._ticker: Ticker | None = None

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self.seconds > 0:
            self._wind_up()
            self._ticker = Ticker(min(1.0, self.seconds / 4), self._look)
        return self

    def beat(self) -> None:
        self._last, self._reported = time.monotonic(), 0.0

    def _wind_up(self) -> None:
        try:
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=self._stream or sys.stderr)
        except (ValueError, OSError, AttributeError):  # a stream without a file behind it
            return

    def _look(self) -> None:
        self._wind_up()
        silent = time.monotonic() - self._last
        if silent < self.seconds + self._reported:
            return
        self._reported = silent
        stream = self._stream or sys.stderr
        say(f"Nothing has moved for {silent:.0f} s. The stacks of all threads follow; the run goes on waiting.")
        try:
            faulthandler.dump_traceback(file=stream, all_threads=True)
        except (ValueError, OSError, AttributeError):  # a stream without a file behind it
            import traceback

            for ident, frame in sys._current_frames().items():
                stream.write(f"Thread {ident}\n{''.join(traceback.format_stack(frame))}\n")
        stream.flush()
        if self._on_stall is not None:
            self._on_stall(silent)

    def __exit__(self, *exc: object) -> None:
        if self._ticker is not None:
            self._ticker.stop()
            faulthandler.cancel_dump_traceback_later()
