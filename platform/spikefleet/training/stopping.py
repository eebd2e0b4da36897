"""Stopping a training on request: after a step on which all ranks agree, with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

STOP = "stop.json"
"""File name, in an attempt's directory, of the driver's request to stop, with the name of the signal."""

StopRequested = Callable[[], bool]
"""Whether the training was asked to stop; called on each rank."""


class TrainingStopped(Exception):  # noqa: N818  # no error
    """The training stopped as requested; all ranks raise it, after rank 0 has committed a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


def never() -> bool:
    """Nobody asks to stop."""
    return False
