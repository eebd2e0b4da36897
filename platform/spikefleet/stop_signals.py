"""The first SIGINT or SIGTERM stops a training after its step; the second one, or one at another time, aborts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from spikefleet.status import print_line
from spikefleet_tune.interruption import Interrupted, handling

STOPPING = "stopping after this step; again to abort"
"""What the first signal of a training or a search prints."""


class StopSignals:
    """The signals that a run has received.

    Args:
        console: for the sentence that the training is stopping.
    """

    def __init__(self, console: Console) -> None:
        self.received: int | None = None
        """Number of the first signal."""
        self._console = console
        self._steps = False
        self._arrived = threading.Event()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles the signals of this process while the block runs."""
        # A handler may run in the middle of any call, so that another thread writes to the terminal.
        threading.Thread(target=self._announce, name="signals", daemon=True).start()
        try:
            with handling(self._handle):
                yield
        finally:
            self._arrived.set()

    @contextmanager
    def after_a_step(self) -> Iterator[None]:
        """A block that looks at `requested` after each step; elsewhere the first signal already raises Interrupted."""
        self._steps = True
        try:
            yield
        finally:
            self._steps = False

    def requested(self) -> bool:
        """Whether the training should stop."""
        return self.received is not None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None or not self._steps:
            self.received = self.received or signum
            raise Interrupted(self.received)
        self.received = signum
        self._arrived.set()

    def _announce(self) -> None:
        self._arrived.wait()
        if self.received is not None and self._steps:
            print_line(self._console, STOPPING)
