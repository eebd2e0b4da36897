"""Events of a training: small immutable records that rank 0 sends to the display and the tracker of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Started:
    """Training starts, or resumes from `step`."""

    step: int
    total_steps: int
    steps_per_epoch: int
    epochs: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What only a worker knows: number of parameters, device, form of the spiking unit, threads, library versions."""
    headline: tuple[str, ...] = ()
    """The task's metrics to show during training."""


@dataclass(frozen=True)
class StepDone:
    """Metrics of one step; `images_per_second` is the mean since the last such event."""

    epoch: int
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class EpochDone:
    """The end of an epoch, with metrics of training and, if it was evaluated, of the validation split."""

    epoch: int
    step: int
    metrics: Mapping[str, float]
    best: bool
    """Whether it is the best epoch so far."""
    layers: tuple[Mapping[str, Any], ...] = ()
    """Spike health by layer."""
    gradients: tuple[Mapping[str, Any], ...] = ()
    """L2 norm of each parameter's gradient in the last step, after clipping."""


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was committed."""

    step: int
    path: str


@dataclass(frozen=True)
class Note:
    """A line of text for the user."""

    text: str


@dataclass(frozen=True)
class Phase:
    """Something other than training steps begins, such as "testing"; the next event of another kind ends it."""

    what: str


@dataclass(frozen=True)
class WorkerFailed:
    """A worker died or raised; the group restarts from the latest checkpoint, up to `cluster.max_failures` times."""

    reason: str


@dataclass(frozen=True)
class Waiting:
    """The workers wait for something that the cluster does not have now; the next `Phase` or `Started` ends it."""

    what: str
    """As a sentence, such as "host 10.0.0.3 is gone; the run waits for 1 more CPU (1 of 2 there)"."""
    since: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Recovered:
    """Events of an earlier attempt that its killed driver did not receive, oldest first."""

    events: tuple[Event, ...]


Event = Started | StepDone | EpochDone | CheckpointSaved | Note | Phase | WorkerFailed | Waiting | Recovered


class EventSink(Protocol):
    """Receives the events of a training.

    A sink neither blocks nor raises, with two exceptions: that of a trial raises where its search stops the trial, and
    with `checkpoint.mirror` rank 0 waits at each checkpoint until it is copied.
    """

    def emit(self, event: Event) -> None:
        """Receives an event."""


class NullSink:
    """Ignores all events; the sink of all ranks but 0."""

    def emit(self, event: Event) -> None:
        """Ignores an event."""
