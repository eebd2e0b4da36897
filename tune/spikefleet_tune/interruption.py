"""SIGINT (Ctrl-C) and SIGTERM (Slurm, Kubernetes) stop a command in the same way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask a command to stop."""

Handler = Callable[[int, FrameType | None], object]


class Interrupted(KeyboardInterrupt):
    """A signal ended what the command did. It is a KeyboardInterrupt, so that no handler of errors catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def name(self) -> str:
        """Name of the signal, such as SIGTERM."""
        return signal.Signals(self.signum).name

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.signum


def interruption(error: KeyboardInterrupt) -> Interrupted:
    """The interruption that a KeyboardInterrupt stands for; one without a signal is Ctrl-C."""
    return error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)


def raise_interrupted(signum: int, frame: FrameType | None) -> None:
    """A signal handler. Raises Interrupted."""
    raise Interrupted(signum)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Handles both signals while the block runs; only the main thread can, in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        for signum in SIGNALS:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, signal.SIG_DFL if earlier is None else earlier)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restores the handlers of both signals after a block that calls a library that replaces them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            if earlier is not None:
                signal.signal(signum, earlier)
