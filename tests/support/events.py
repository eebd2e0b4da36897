"""An event sink that keeps what a training tells."""

from __future__ import annotations

from spikefleet.training.events import Event, Note, StepDone


class KeptEvents:
    """Keeps all events, in order."""

    def __init__(self) -> None:
        self.seen: list[Event] = []

    def emit(self, event: Event) -> None:
        """Keeps an event."""
        self.seen.append(event)

    @property
    def steps(self) -> list[StepDone]:
        """The steps, with their metrics."""
        return [event for event in self.seen if isinstance(event, StepDone)]

    @property
    def losses(self) -> dict[int, float]:
        """The loss of each step, as last reported."""
        return {event.step: event.metrics["train/loss"] for event in self.steps}

    @property
    def notes(self) -> list[str]:
        """What was said."""
        return [event.text for event in self.seen if isinstance(event, Note)]
