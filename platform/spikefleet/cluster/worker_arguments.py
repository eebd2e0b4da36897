"""What each worker of a group is told; Ray Train's controller reads it too, so it imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikefleet.training.loop import BeforeStep


@dataclass(frozen=True)
class WorkerArguments:
    """The arguments of a worker, readable on every node."""

    config: dict[str, Any]
    store: str
    run_dir: str
    attempt: str
    """The directory of this attempt, on storage that all nodes share."""
    before_step: BeforeStep | None
    lockstep: bool
    plugins: tuple[str, ...]
    """Modules of the driver's plugins."""
