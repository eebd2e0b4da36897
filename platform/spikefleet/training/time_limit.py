"""`train.max_minutes`: a training ends before an epoch that would not fit, by a clock that checkpoints carry."""

from __future__ import annotations

import time
from collections.abc import Callable

from spikefleet.config.schema import Config


class TrainingClock:
    """Seconds of a training and of its longest epoch, over all processes that trained it.

    Args:
        now: seconds of a monotonic clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.restart()

    def restart(self, seconds: float = 0.0, longest_epoch: float = 0.0) -> None:
        """Counts on from what a checkpoint has; from zero by default.

        Args:
            seconds: of the training before.
            longest_epoch: seconds of its longest epoch.
        """
        self._before, self._longest = seconds, longest_epoch
        self._since = self._epoch_since = self._now()

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._before + self._now() - self._since

    @property
    def longest_epoch(self) -> float:
        """Seconds of the longest epoch, or of the current one where that is longer."""
        return max(self._longest, self._now() - self._epoch_since)

    def end_epoch(self) -> None:
        """Begins to measure the next epoch."""
        self._longest, self._epoch_since = self.longest_epoch, self._now()


def no_time_left(config: Config, epoch: int, clock: TrainingClock) -> str | None:
    """Whether no time is left for another epoch.

    Args:
        config: of the run.
        epoch: finished epochs.
        clock: of the training.

    Returns:
        Why the training ends, as a sentence; None if it continues.
    """
    limit = config.train.max_minutes
    if limit is None or epoch >= config.train.epochs or clock.seconds + clock.longest_epoch <= limit * 60:
        return None
    return (
        f"ending after epoch {epoch} of {config.train.epochs}: {clock.seconds / 60:.3g} of train.max_minutes={limit:g} "
        f"are used, and an epoch takes {clock.longest_epoch / 60:.3g}"
    )
