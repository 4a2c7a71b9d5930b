"""Nothing is silent: progress lines with an ETA, a heartbeat for long stages, and a watchdog that shows where a stall is.

All of it goes to stderr: drawn in place on a terminal, as plain lines in a log.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from cllm.runtime.printable import printable, printable_text

HEARTBEAT_SECONDS = 2.0
WIDE = 120  # columns of a terminal that has room for a bar beside the figures

_lock = threading.RLock()
_active: "Progress | None" = None
_stages = 0  # that are going on and speak for themselves


def duration(seconds: float) -> str:
    """1:05, 2:03:04, 3d 4h: short, for people."""
    whole = int(max(0.0, seconds) + 0.5)
    if whole >= 86400:
        return f"{whole // 86400}d {whole % 86400 // 3600}h"
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
    return f"{whole // 60}:{whole % 60:02}"


def say(text: str) -> None:
    """One line on stderr, above the progress line where there is one, without what would act on a terminal (escape codes of a file's name)."""
    text = printable_text(text)
    with _lock:
        if _active is not None:
            _active._write(text)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


class _Ticker:
    """Calls a function every so many seconds in a thread of its own until stopped."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(seconds, call), daemon=True, name="cllm-heartbeat")
        self._thread.start()

    def _run(self, seconds: float, call: Callable[[], None]) -> None:
        while not self._stop.wait(seconds):
            call()

    def stop(self) -> None:
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)


class Progress:
    """One line: how far, the caller's own figures, and the time left. A heartbeat renews it even while the caller is busy.

    total None: unknown, then no ETA. `log_seconds` is the pause between lines where stderr is not a terminal.
    """

    def __init__(
        self, total: float | None, label: str, *, initial: float = 0, log_seconds: float = HEARTBEAT_SECONDS, stream: TextIO | None = None
    ) -> None:
        self.total, self.label, self.initial = total, label, initial
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._pause = 0.25 if self._terminal else log_seconds
        self._done, self._text, self._note = float(initial), "", ""
        self._written: tuple[float, str] | None = None
        self._started = self._drawn = time.monotonic()
        self._rich: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        global _active
        self._started = self._drawn = time.monotonic()
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Rich
            from rich.table import Column

            console = Console(file=self._stream)
            # On a narrow terminal the figures matter more than the bar, and the time left more than the last figures, which are cut.
            bar = (BarColumn(bar_width=16),) if console.width >= WIDE else ()
            fixed = [
                TextColumn(field, table_column=Column(no_wrap=True, min_width=width), markup=False)
                for field, width in (("{task.description}", len(self.label)), ("{task.fields[left]}", 8))
            ]
            text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1), markup=False)
            columns = (fixed[0], *bar, TaskProgressColumn(table_column=Column(min_width=4)), fixed[1], text)
            self._rich = Rich(*columns, console=console, refresh_per_second=4, transient=True, expand=True)
            self._task = self._rich.add_task(printable(self.label), total=self.total, completed=self.initial, text="", left="")
            self._rich.start()
        with _lock:
            self._before, _active = _active, self
        self._ticker = _Ticker(max(0.05, min(self._pause, HEARTBEAT_SECONDS)), self._beat)
        return self

    def __exit__(self, *exc: object) -> None:
        global _active
        self._ticker.stop()
        with _lock:
            _active = self._before
        if self._rich is not None:
            self._rich.stop()
        self._stream.write(self.line() + "\n")
        self._stream.flush()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def eta_seconds(self) -> float | None:
        """Time left at the mean speed so far; None before the first advance or without a total."""
        gained = self._done - self.initial
        if self.total is None or gained <= 0:
            return None
        return max(0.0, self.seconds * (self.total - self._done) / gained)

    def update(self, done: float, text: str = "") -> None:
        """`done` of `total`, with the caller's figures as text."""
        self._done = float(done)
        self._text = text or self._text
        self._beat()

    @property
    def in_place(self) -> bool:
        """Whether the line is drawn anew in its place, as on a terminal."""
        return self._rich is not None

    def note(self, text: str) -> None:
        """Shown instead of the caller's figures until it is empty again: what is waited for between two updates."""
        self._note = text

    def line(self) -> str:
        eta = self.eta_seconds()
        share = f" {100 * self._done / self.total:3.0f}%" if self.total else ""
        running = eta is not None and self.total is not None and self._done < self.total
        left = f"  ETA {duration(eta or 0)}" if running else f"  in {duration(self.seconds)}"
        return printable(f"{self.label}{share}{'  ' + self._text if self._text else ''}{left}")

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._drawn < self._pause * 0.99:
            return
        self._drawn = now
        if self._rich is not None:
            eta = self.eta_seconds()
            left = f"ETA {duration(eta)}" if eta is not None else duration(self.seconds)
            self._rich.update(self._task, completed=self._done, text=printable(self._note or self._text), left=left)
        else:
            if _stages and self._written == (self._done, self._text):
                return  # a log needs no second line that says the same while a stage tells what goes on
            self._written = self._done, self._text
            with _lock:
                self._stream.write(self.line() + "\n")
                self._stream.flush()

    def _write(self, text: str) -> None:
        if self._rich is not None:
            self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()


def track(items: Iterable[Any], total: float | None, label: str) -> Iterator[Any]:
    """The items one by one, with a progress line."""
    with Progress(total, label) as line:
        for count, item in enumerate(items, 1):
            yield item
            line.update(count)


class Stage:
    """Work beside the progress line: says what goes on after two seconds, and again every two seconds until it ends.

    Work that can tell how far it is calls `update`; its share, figures and time left are then shown as well.
    """

    def __init__(self, label: str, seconds_before: float = 0.0, after: float = HEARTBEAT_SECONDS) -> None:
        self.label, self._seconds_before, self._after = label, seconds_before, after
        self.seconds = 0.0
        self._done = self._total = 0.0
        self._unit = ""

    def update(self, done: float, total: float, unit: str = "") -> None:
        """`done` of `total`, which are numbers of `unit`."""
        self._done, self._total, self._unit = done, total, unit

    def line(self) -> str:
        seconds = time.monotonic() - self._started
        if not self._total or not self._done:
            return f"{self.label} ... {self._seconds_before + seconds:.0f} s"
        left = duration(seconds * (self._total - self._done) / self._done)
        return f"{self.label} {100 * self._done / self._total:3.0f}%  {self._done:,.0f} of {self._total:,.0f} {self._unit}  ETA {left}"

    def __enter__(self) -> "Stage":
        global _stages
        _stages += 1
        self._started = time.monotonic()
        self._ticker = _Ticker(self._after, self._beat)
        return self

    def _beat(self) -> None:
        with _lock:
            if _active is not None and _active.in_place:
                _active.note(self.line())
            else:
                say(self.line())

    def __exit__(self, *exc: object) -> None:
        global _stages
        _stages -= 1
        with _lock:
            if _active is not None:
                _active.note("")
        self.seconds = time.monotonic() - self._started
        self._ticker.stop()


stage = Stage


class ByteProgress:
    """Progress of work that is counted in bytes, step after step: a line for each step that takes longer than a second, or the caller's own function.

    function: called with (label of the step, bytes done, bytes in all); then nothing is printed.
    """

    def __init__(self, function: Callable[[str, int, int], None] | None = None) -> None:
        self._function = function
        self._label = ""
        self._started = 0.0
        self._shown: Progress | Stage | None = None  # of the step that is running

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def __call__(self, label: str, done: int, total: int) -> None:
        """The step of this name has done so many bytes; another name than before begins the next step."""
        if self._function is not None:
            self._function(label, done, total)
            return
        if label != self._label:
            self.end()
            self._label, self._started = label, time.monotonic()
        if self._shown is None and time.monotonic() - self._started > 1.0:
            self._shown = Progress(total, label)
            self._shown.__enter__()
        if isinstance(self._shown, Progress):
            self._shown.update(done, f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

    def step(self, label: str, total: int) -> Callable[[int], None]:
        """Begins a step of `total` bytes; the function returned is called with each number of bytes that were dealt with."""
        done = 0

        def report(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self(label, min(done, total), total)

        return report

    def heartbeat(self, label: str) -> None:
        """Begins a step that cannot tell how far it is."""
        self.end()
        if self._function is None:
            self._shown = Stage(label)
            self._shown.__enter__()

    def end(self) -> None:
        """The step is over."""
        shown, self._shown, self._label = self._shown, None, ""
        if shown is not None:
            shown.__exit__(None, None, None)


class Watchdog:
    """Dumps the stacks of all threads when `beat` was not called for `seconds`, and calls `on_stall(seconds_without_beat)`; again after each pause.

    seconds 0: never. Nothing is ended: a slow disk may come back. A call into C that holds the interpreter's lock stops the watchdog's own thread
    as well; the interpreter's timer, wound up again at each look, then dumps the stacks (without a call of `on_stall`).
    """

    def __init__(self, seconds: float, on_stall: Callable[[float], None] | None = None, stream: TextIO | None = None) -> None:
        self.seconds, self._on_stall, self._stream = seconds, on_stall, stream
        self._last = time.monotonic()
        self._reported = 0.0
        self._ticker: _Ticker | None = None

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self.seconds > 0:
            self._wind_up()
            self._ticker = _Ticker(min(1.0, self.seconds / 4), self._look)
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
