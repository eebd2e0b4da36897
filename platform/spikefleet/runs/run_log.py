"""The log of a run: what its terminal shows, as lines with their times in its directory, for `spikefleet logs`."""

from __future__ import annotations

import logging
import time
from io import StringIO
from pathlib import Path

from rich.console import Console

from spikefleet.runs.progress import Display, PlainDisplay
from spikefleet.status import PlainLines, print_line
from spikefleet.training.events import Event

LOG = "log.txt"
"""File name in a run's directory."""

log = logging.getLogger(__name__)


class LoggedDisplay:
    """Shows what another display shows, and appends it to the log of a run.

    Args:
        display: of the terminal.
        run_dir: of the run.
    """

    def __init__(self, display: Display, run_dir: Path) -> None:
        self._display = display
        self._console = Console(
            file=_TimedLines(run_dir / LOG), force_terminal=False, no_color=True, width=200, legacy_windows=False
        )
        self._lines = PlainDisplay(self._console, PlainLines())

    def show(self, event: Event) -> None:
        """Shows an event."""
        self._lines.show(event)
        self._display.show(event)

    def announce(self, what: str) -> None:
        """Names what begins now."""
        self._lines.announce(what)
        self._display.announce(what)

    def say(self, line: str) -> None:
        """Appends a line to the log alone: the terminal learns it elsewhere."""
        print_line(self._console, line)

    def close(self) -> None:
        """Ends what is drawn."""
        self._lines.close()
        self._display.close()


class _TimedLines(StringIO):
    """Appends lines to a file, each with its time. A full disk loses them, and says so once."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._lost = False

    def write(self, text: str) -> int:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{stamp}  {line}\n" for line in text.splitlines() if line.strip())
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(lines)
        except OSError as error:
            if not self._lost:
                log.warning("%s cannot be written, and lines are lost: %s", self._path, error)
            self._lost = True
        return len(text)
