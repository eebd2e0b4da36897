"""A run as Ray metrics: what Prometheus scrapes from the nodes, with `ray_` before the names, and the label `run`."""

from __future__ import annotations

from ray.util.metrics import Gauge

from spikefleet.training.events import EpochDone, Event, StepDone

GAUGES = {
    "spikefleet_epoch": "Epochs that are done",
    "spikefleet_step": "Optimizer steps that are done",
    "spikefleet_images_per_second": "Training images per second, over all workers",
    "spikefleet_firing_rate": "Mean firing rate on the validation split, of the spikes that are possible",
    "spikefleet_waiting_seconds": "Seconds for which the run has been waiting for hosts; 0 while it trains",
}
"""Names and descriptions; none for each layer."""


class RunGauges:
    """The gauges of one run, set by its driver.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges = {name: Gauge(name, description=text, tag_keys=("run",)) for name, text in GAUGES.items()}

    def show(self, event: Event) -> None:
        """Sets what an event says."""
        if isinstance(event, StepDone):
            self._set("spikefleet_step", event.step)
            if "images_per_second" in event.metrics:
                self._set("spikefleet_images_per_second", event.metrics["images_per_second"])
        elif isinstance(event, EpochDone):
            self._set("spikefleet_epoch", event.epoch)
            if "spikes/firing_rate" in event.metrics:
                self._set("spikefleet_firing_rate", event.metrics["spikes/firing_rate"])

    def waits(self, seconds: float) -> None:
        """Sets for how long the run has been waiting."""
        self._set("spikefleet_waiting_seconds", seconds)

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(float(value), self._tags)
