"""Signs of life: what a command waits for, with seconds; how far it is, with rate and remaining time.

On a terminal a line that is drawn anew; elsewhere plain lines, at most one every 15 s.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.status import Status

PLAIN_LINE_EVERY_S = 15.0
_LIVE_AFTER_S = 0.7
_LOOK_EVERY_S = 0.25
_PLAIN_AFTER_S = 2.0

Count = Callable[[int, int], None]
"""Called with (done, in all)."""

Announce = Callable[[str], None]
"""Called with the name of what begins now, such as "testing"."""


class PlainLines:
    """Plain lines for a log: one every 15 s, whoever writes them."""

    def __init__(self, every_s: float = PLAIN_LINE_EVERY_S) -> None:
        self._every_s = every_s
        self._printed: float | None = None
        self._lock = threading.Lock()

    def say(self, console: Console, text: str) -> bool:
        """Prints a line unless one was printed less than 15 s ago. Returns whether it did."""
        with self._lock:
            now = time.monotonic()
            if self._printed is not None and now - self._printed < self._every_s:
                return False
            self._printed = now
        print_line(console, text)
        return True

    def printed(self) -> None:
        """Another line was printed, which counts."""
        self._printed = time.monotonic()


PLAIN_LINES = PlainLines()
"""Those of this process."""


def printable(text: str) -> str:
    """Text from elsewhere as a terminal may show it: what steers a terminal, or is no Unicode, is escaped.

    That is control characters but line ends and tabs, overrides of the writing direction, and halves of surrogates.
    """
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """A name from elsewhere as a part of a line: as `printable`, with line ends and tabs escaped too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal, or are no Unicode."""


def print_line(console: Console, text: str) -> None:
    """Prints a line as it is, but escaped for terminals: neither wrapped nor read as markup."""
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True, emoji=False)


def silent(what: str) -> None:
    """Announces nothing."""


def uncounted(done: int, total: int) -> None:
    """Shows nothing."""


class Waiting:
    """Says what is waited for, from when it has taken a moment; a thread draws, so the work may block.

    Args:
        console: where it is said.
        lines: shared with whatever else writes plain lines there; those of this process if not given.
    """

    def __init__(self, console: Console, lines: PlainLines | None = None) -> None:
        self._console, self._lines = console, lines or PLAIN_LINES
        self._state = ("", 0.0)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def announce(self, what: str) -> None:
        """What begins now, and ends what was waited for before; an empty string: nothing."""
        self._state = (what, time.monotonic())
        if self._thread is None:
            self._thread = threading.Thread(target=self._draw, name="waiting", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Nothing is waited for any longer; what was drawn is removed."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _draw(self) -> None:
        with ExitStack() as stack:
            live: Status | None = None
            while not self._over.wait(_LOOK_EVERY_S):
                what, since = self._state
                seconds = time.monotonic() - since
                if not what:
                    continue
                if not self._console.is_terminal:
                    if seconds >= _PLAIN_AFTER_S:
                        self._lines.say(self._console, f"{what}: {seconds:.0f} s so far")
                elif live is not None:
                    live.update(escape(printable(f"{what}  {seconds:.0f} s")))
                elif seconds >= _LIVE_AFTER_S:
                    live = stack.enter_context(self._console.status(escape(printable(f"{what}  {seconds:.0f} s"))))


@contextmanager
def waiting(console: Console, what: str) -> Iterator[Announce]:
    """Names what the block waits for, with seconds; the value announces the next thing.

    Args:
        console: where it is shown: a spinner on a terminal, a plain line elsewhere.
        what: such as "starting Ray".
    """
    shown = Waiting(console)
    shown.announce(what)
    try:
        yield shown.announce
    finally:
        shown.close()


@contextmanager
def counting(console: Console, title: str, unit: str = "images") -> Iterator[Count]:
    """A bar with rate and remaining time, which appears with the first call; plain lines where there is no terminal.

    Until the first call, `title` is what is waited for.
    """
    shown = Waiting(console)
    shown.announce(title)
    bar = _LiveCount(console, title, unit) if console.is_terminal else _PlainCount(console, title, unit)

    def count(done: int, total: int) -> None:
        shown.close()
        bar.update(done, total)

    try:
        yield count
    finally:
        shown.close()
        bar.close()


class _LiveCount:
    """A bar on a terminal."""

    def __init__(self, console: Console, title: str, unit: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn(printable(title), markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(unit + " {task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._began = time.monotonic()
        self._task = self._bar.add_task(title, total=None, rate="")
        self._started = False

    def update(self, done: int, total: int) -> None:
        if not self._started:
            self._bar.start()
            self._started = True
        rate = _rate(done, time.monotonic() - self._began)
        self._bar.update(self._task, completed=done, total=total, rate=f"{rate}/s" if rate else "")

    def close(self) -> None:
        self._bar.stop()


class _PlainCount:
    """Lines in a log."""

    def __init__(self, console: Console, title: str, unit: str) -> None:
        self._console, self._title, self._unit = console, title, unit
        self._began = time.monotonic()

    def update(self, done: int, total: int) -> None:
        seconds = time.monotonic() - self._began
        if seconds < _PLAIN_AFTER_S or not done:
            return
        left = seconds / done * (total - done)
        rate = f"{_rate(done, seconds)} {self._unit}/s, {left:.0f} s left"
        PLAIN_LINES.say(self._console, f"{self._title}: {done:,} of {total:,} {self._unit}, {rate}")

    def close(self) -> None:
        return None


def _rate(done: int, seconds: float) -> str:
    if not done or seconds <= 0:
        return ""
    rate = done / seconds
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
