"""Signs of life: what a command waits for, with seconds; how far it is, with rate and remaining time.

On a terminal a line that is drawn anew; elsewhere plain lines: one for each wait of over two seconds, then at most one
every 15 s.
"""

from __future__ import annotations

import re
import textwrap
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

    def say(self, console: Console, text: str, at_once: bool = False) -> bool:
        """Prints a line unless one was printed less than 15 s ago; at once in any case. Returns whether it did."""
        with self._lock:
            now = time.monotonic()
            if not at_once and self._printed is not None and now - self._printed < self._every_s:
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


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Prints a line that is not read as markup, and escaped for terminals.

    A terminal would break it inside of names and numbers, so there it is wrapped between words; a word that is wider
    stays whole. Elsewhere, and where it is a command to copy (`print_whole`), it is one line.
    """
    if console.is_terminal:
        lines = (wrapped_words(line, console.width) for line in text.split("\n"))
        text = "\n".join(part for parts in lines for part in parts)
    print_whole(console, text, style)


def wrapped_words(line: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken between words alone; at least one."""
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]


def print_whole(console: Console, text: str, style: str | None = None) -> None:
    """Prints a line as it is, such as a command to copy: neither wrapped nor read as markup, but escaped."""
    console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True, emoji=False)


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
        self._state = ("", 0.0, False)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def announce(self, what: str, often: bool = False) -> None:
        """What begins now, and ends what was waited for before.

        Args:
            what: its name; an empty string: nothing.
            often: it begins so often, like a step, that it is not named in a log whenever it takes over two seconds,
                but with the line that is due every 15 s.
        """
        self._state = (what, time.monotonic(), not often)
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
            named: tuple[str, float, bool] | None = None
            while not self._over.wait(_LOOK_EVERY_S):
                state = what, since, promptly = self._state
                seconds = time.monotonic() - since
                if not what:
                    continue
                if not self._console.is_terminal:
                    if seconds >= _PLAIN_AFTER_S:
                        line = f"{what}: {seconds:.0f} s so far"
                        self._lines.say(self._console, line, at_once=promptly and named != state)
                        named = state
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
def counting(console: Console, title: str, unit: str = "images", *, plain: bool = False) -> Iterator[Count]:
    """A bar with rate and remaining time, which appears with the first call; plain lines where there is no terminal.

    Until the first call, `title` is what is waited for.

    Args:
        console: where it is shown.
        title: what is counted.
        unit: of the numbers.
        plain: plain lines on a terminal too, between what else is printed there.
    """
    shown = Waiting(console)
    if not plain:
        shown.announce(title)
    live = console.is_terminal and not plain
    bar = _LiveCount(console, title, unit) if live else _PlainCount(console, title, unit)

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
