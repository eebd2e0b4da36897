"""What Ray Train's controller tells of workers that fail; it imports neither torch nor the training core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.train import UserCallback

from spikefleet.cluster.failures import headline
from spikefleet.training.event_log import EventWriter
from spikefleet.training.events import WorkerFailed


class FailureNotes(UserCallback):
    """Sends the errors of workers as events. Runs in Ray Train's controller, where an exception would end the run."""

    def __init__(self, attempt: Path) -> None:
        self._attempt = attempt

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Sends the errors of all ranks that failed."""
        reasons = {f"rank {rank}: {headline(error)}" for rank, error in worker_exceptions.items()}
        EventWriter(self._attempt).emit(WorkerFailed("; ".join(sorted(reasons))))
