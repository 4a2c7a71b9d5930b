"""Nothing is silent: work that takes long says on standard error what it is, how far it is and how much time is left.

Work may lie inside other work. The innermost owns the line; what is around it waits until it has ended. On a terminal the line is drawn in its
place, four times a second. In a log it is a line of its own, after 5 seconds, 10 more, 20 more, 40 more and then once a minute, and never one that
says what the one before has said.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from os import environ
from typing import Any, Self, TextIO

from cllm.runtime import progress_file
from cllm.runtime.printable import printable, printable_text

SHOWN_AFTER = 2.0  # seconds after which a stage is worth a line on a terminal
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds before a line in a log: before the first one, and at most; each pause is twice the one before
WIDE = 120  # columns of a terminal that has room for a bar beside the figures

_lock = threading.RLock()
_going_on: list["Progress"] = []  # the innermost is the last
_screen: "_Screen | None" = None  # while a line is drawn in its place


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
    with _lock:
        _write(printable_text(text), _going_on[-1].stream if _going_on else sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    if _screen is not None:
        _screen.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        stream.write(text + "\n")
        stream.flush()


def abandon() -> None:
    """For a process that ends where it is: the terminal gets back its cursor, and the line is gone. May be called in any thread."""
    screen = _screen
    if screen is not None:
        screen.abandon()


class Ticker:
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
    """Work that shows how far it is, the caller's own figures and the time left, and ends with a line of what it came to. A context manager.

    total: of what `update` counts, which is so many `unit`; None where it is unknown, and then no time left is told. initial: what was done before,
    in another run. log_seconds: the first pause between lines in a log. stream: standard error, or that of the work around this.

    The time left is the mean pace of the work since its first advance, which warms up; neither the compilation of kernels nor work inside this one
    counts. `later_seconds` is added to it: of such work that is still to come.
    """

    shown_after = 0.0  # seconds before the line is shown on a terminal

    def __init__(
        self,
        total: float | None,
        label: str,
        *,
        initial: float = 0,
        log_seconds: float = FIRST_PAUSE,
        stream: TextIO | None = None,
        unit: str = "",
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.later_seconds = 0.0
        self._given_stream, self.stream = stream, stream or sys.stderr
        self._done, self._text = float(initial), ""
        self._waits_for = ""  # what happens before the next advance, shown instead of the caller's figures
        self._first = self._newest = (0.0, 0.0)  # seconds of own work at the first and at the newest advance, and what was done then
        self._advances = 0
        self._pause = self._due = log_seconds
        self._last = ("", (0.0, ""))  # the last line of the log, and its figures
        self._seconds_before = 0.0  # when it is entered again
        self._started = self._began = self._beside = 0.0
        self._around: Progress | None = None
        self._inside: Progress | None = None

    def __enter__(self) -> Self:
        with _lock:
            self._around = _going_on[-1] if _going_on else None
            self.stream = self._given_stream or (self._around.stream if self._around else sys.stderr)
            self._terminal = self.stream.isatty() and environ.get("TERM") != "dumb"
            self._started, self._began, self._beside = time.monotonic(), compilation.clock(), 0.0
            if self._around is not None:
                self._around._inside = self
            _going_on.append(self)
            self._beat()
        self._ticker = Ticker(min(max(0.05, self._pause), 0.5), self._beat)
        return self

    def __exit__(self, *exc: object) -> None:
        global _screen
        with _lock:
            if self._around is not None:
                self._around._beside += compilation.clock() - self._began
                self._around._inside = None
            closed = _screen if not any(each.is_shown for each in _going_on if each is not self) else None
            if closed is not None:
                closed.stop()
                _screen = None
            self._last_word()
            self._seconds_before = self.seconds
            _going_on.remove(self)
        self._ticker.stop()

    @property
    def seconds(self) -> float:
        """Seconds since it was entered."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def is_shown(self) -> bool:
        """Whether it takes long enough to be shown on a terminal."""
        return self.seconds >= self.shown_after

    def update(self, done: float, text: str = "") -> None:
        """`done` of `total`, with the caller's figures as text."""
        done = float(done)
        if done < self._done:  # begun again
            self._advances = 0
        elif done > self._done:
            self._newest = self._own_seconds(), done
            self._first = self._newest if not self._advances else self._first
            self._advances += 1
            if not compilation.is_going_on:
                self._waits_for = ""
        self._done, self._text = done, text or self._text
        self._beat()

    def wait_for(self, what: str) -> None:
        """Shows what happens until the next advance."""
        self._waits_for = what

    def seconds_left(self) -> float | None:
        """Until `total` is done; None where that is not known yet."""
        if self.total is None or self._advances < 2:
            return None
        seconds, gained = (newest - first for newest, first in zip(self._newest, self._first))
        if gained <= 0:  # begun again at this very moment
            return None
        to_come = max(0.0, self.total - self._done)
        step = min(gained / (self._advances - 1), to_come)
        since = self._own_seconds() - self._newest[0]
        pending = max(since, seconds / gained * step)  # of the advance that is being made: it takes as long as the others, or longer if it is late
        return (seconds + pending) / (gained + step) * (to_come - step) + pending - since + self.later_seconds

    def line(self, ended: bool = False) -> str:
        """What a log gets: "training  25%  loss 2.31  ETA 1:05"; at the end the time that it took."""
        figures = (not ended and self._waits_for) or self._text
        between = "" if not figures else "  " if self.total or self._text else ": "
        share = f" {100 * self._done / self.total:3.0f}%" if self.total else ""
        left = self.seconds_left()
        if ended:
            tail = f"  {'in' if self.total is None or self._done >= self.total else 'after'} {duration(self.seconds)}"
        else:
            tail = f" ... {self.seconds:,.0f} s" if left is None else f"  ETA {duration(left)}"
        return printable(f"{self.label}{share}{between}{figures}{tail}")

    def figures(self) -> tuple[str, str, str]:
        """What a terminal gets beside the label: the share that is done, the time left, and the caller's figures."""
        left = self.seconds_left()
        share = f"{100 * self._done / self.total:.0f}%" if self.total else ""
        return share, duration(self.seconds) if left is None else f"ETA {duration(left)}", printable(self._waits_for or self._text)

    @property
    def share(self) -> float:
        """Of `total`, from 0 to 1."""
        return min(1.0, self._done / self.total) if self.total else 0.0

    def _own_seconds(self) -> float:
        """Seconds of this work so far, without those of the work inside and of compiling."""
        inside = self._inside
        return (compilation.clock() if inside is None else inside._began) - self._began - self._beside

    def _beat(self) -> None:
        global _screen
        with _lock:
            if not _going_on or _going_on[-1] is not self:
                return
            progress_file.tell(_values)
            if self._terminal:
                if _screen is None and self.is_shown:
                    _screen = _Screen(self.stream)
                return
            complete = self.total is not None and self._done >= self.total  # which the last word will say
            if complete or self.seconds < self._due:
                return
            line = self.line()
            if line != self._last[0]:
                self._last = line, (self._done, self._text)
                _write(line, self.stream)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._due = self.seconds + self._pause

    def _last_word(self) -> None:
        if self._terminal or self._last[1] != (self._done, self._text):
            _write(self.line(ended=True), self.stream)


def _values() -> dict[str, Any]:
    """What programs are told of the work that goes on: how far the outermost is, in the words of the innermost."""
    outer, inner = _going_on[0], _going_on[-1]
    words = inner.line() if inner is not outer else printable(outer._waits_for or outer._text)
    left = outer.seconds_left()
    figures = {"done": outer._done, "total": outer.total, "unit": outer.unit}
    return {"label": printable(outer.label), "text": words, **figures, "eta_seconds": left}


def track(items: Iterable[Any], total: float | None, label: str) -> Iterator[Any]:
    """The items one by one, with a progress line."""
    with Progress(total, label) as line:
        for count, item in enumerate(items, 1):
            yield item
            line.update(count)


class Stage(Progress):
    """Work that is mostly too short to be shown: it says what goes on when it takes longer, and leaves no line behind on a terminal.

    Work that can tell how far it is calls `advance`; its share, figures and time left are then shown as well.
    """

    shown_after = SHOWN_AFTER

    def __init__(self, label: str, *, log_seconds: float = FIRST_PAUSE) -> None:
        super().__init__(None, label, log_seconds=log_seconds)

    def advance(self, done: float, total: float, unit: str = "") -> None:
        """`done` of `total`, which are numbers of `unit`."""
        self.total, self.unit = total, unit
        self.update(done, f"{done:,.0f} of {total:,.0f} {unit}".rstrip())

    def _last_word(self) -> None:
        return


stage = Stage


class _Screen:
    """The last line of a terminal, drawn in its place. What is printed meanwhile stands above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=stream)
        # Standard output that goes into a file is not redirected to the terminal.
        outputs = {f"redirect_{name}": getattr(sys, name).isatty() for name in ("stdout", "stderr")}
        self._live = Live(console=self.console, get_renderable=self._draw, refresh_per_second=4, transient=True, **outputs)
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def abandon(self) -> None:
        self.console.file.write("\r\x1b[2K\x1b[?25h")

    def _draw(self) -> Any:
        """The outermost work with its bar, and beside it the innermost. Called in a thread of its own, and without the lock, which whoever stops
        that thread may hold."""
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        shown = [each for each in tuple(_going_on) if each.is_shown]
        if not shown:
            return Text("")
        outer, inner = shown[0], shown[-1]
        if outer.total is None:
            return Text(inner.line(), no_wrap=True, overflow="ellipsis")
        label = printable(outer.label)
        share, left, text = outer.figures()
        # On a narrow terminal the figures matter more than the bar, and the time left more than the last figures, which are cut.
        bar = [ProgressBar(total=1.0, completed=outer.share, width=16)] if self.console.width >= WIDE else []
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, min_width=cell_len(label))
        for _ in bar:
            grid.add_column()
        grid.add_column(no_wrap=True, min_width=4, justify="right")
        grid.add_column(no_wrap=True, min_width=8)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        grid.add_row(Text(label), *bar, Text(share), Text(left), Text(text if inner is outer else inner.line()))
        return grid


class _Compilation:
    """The compilation of kernels, which may be asked for in the middle of any work. The work that waits for it says so in its line, and does not
    count the time; where nothing is shown, the compilation has a line of its own."""

    def __init__(self) -> None:
        self._depth = 0  # a kernel may be compiled while another one is
        self._since = self._seconds = 0.0
        self._stage: Stage | None = None  # kept, because many short compilations are one long wait
        self._what = self._far = ""

    @property
    def is_going_on(self) -> bool:
        return self._depth > 0

    @property
    def seconds(self) -> float:
        """For how long it has been going on; 0 where it is not."""
        return time.monotonic() - self._since if self._depth else 0.0

    def clock(self) -> float:
        """Seconds of a clock that stands still while kernels are compiled."""
        return (self._since if self._depth else time.monotonic()) - self._seconds

    def begin(self, what: str) -> None:
        """Compilation begins; `what` says so."""
        with _lock:
            if not self._depth:
                self._since = time.monotonic()
            self._depth += 1
            if self._depth > 1:
                return
            self._what = what
            if _going_on:
                _going_on[-1].wait_for(self._text())
            else:
                self._stage = self._stage or Stage(what)
                self._stage.__enter__()

    def tell(self, far: str) -> None:
        """How far it is, where several processes compile for this one: "7 of 21 done, ETA 0:09". Empty: nobody knows any more."""
        with _lock:
            self._far = far
            if self._depth and _going_on:
                _going_on[-1].wait_for(self._text())

    def _text(self) -> str:
        return f"{self._what}: {self._far}" if self._far else self._what

    def end(self) -> None:
        """To be called as often as `begin`."""
        with _lock:
            self._depth -= 1
            if self._depth:
                return
            self._seconds += time.monotonic() - self._since
        if self._stage is not None and self._stage in _going_on:
            self._stage.__exit__()


compilation = _Compilation()


class ByteProgress:
    """Progress of work that is counted in bytes, step after step: a line for each step that takes longer than a second, or the caller's own function.

    function: called with (label of the step, bytes done, bytes in all); then nothing is printed.
    """

    def __init__(self, function: Callable[[str, int, int], None] | None = None) -> None:
        self._function = function
        self._label = ""
        self._started = 0.0
        self._shown: Progress | None = None  # of the step that is running

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
            self._shown = Progress(total, label, unit="bytes")
            self._shown.__enter__()
        if self._shown is not None:
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
