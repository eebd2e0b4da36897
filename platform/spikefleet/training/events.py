"""What a training tells the outside: small immutable records, sent by rank 0 to whoever draws and tracks the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Started:
    """Training begins, or goes on from `step`."""

    step: int
    total_steps: int
    steps_per_epoch: int
    epochs: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the run that are known only to a worker: parameters, device, versions."""
    headline: tuple[str, ...] = ()
    """The task's metrics that are worth showing while it trains."""


@dataclass(frozen=True)
class StepDone:
    """Figures of one step; `images_per_second` is since the last such event."""

    epoch: int
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class EpochDone:
    """An evaluation on the validation split, with spike health by layer."""

    epoch: int
    step: int
    metrics: Mapping[str, float]
    best: bool
    layers: tuple[Mapping[str, Any], ...] = ()
    gradients: tuple[Mapping[str, Any], ...] = ()
    """Norms of each parameter's gradient in the last step, after clipping."""


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    path: str


@dataclass(frozen=True)
class Note:
    """A line for the person who watches."""

    text: str


@dataclass(frozen=True)
class Phase:
    """Something other than training steps begins, such as "testing"; the next event of another kind ends it."""

    what: str


@dataclass(frozen=True)
class WorkerFailed:
    """A worker died or raised; unless that was once too often, the group starts again from the latest checkpoint."""

    reason: str


@dataclass(frozen=True)
class Recovered:
    """What an earlier attempt of the run sent and its driver did not live to hear; oldest first."""

    events: tuple[Event, ...]


Event = Started | StepDone | EpochDone | CheckpointSaved | Note | Phase | WorkerFailed | Recovered


class EventSink(Protocol):
    """Takes events; blocks no training and never raises, but for that of a trial, whose search decides on it."""

    def emit(self, event: Event) -> None: ...


class NullSink:
    """The sink of every rank but 0."""

    def emit(self, event: Event) -> None:
        return None
