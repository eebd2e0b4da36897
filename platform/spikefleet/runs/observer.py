"""Shows the events of a training as progress and logs them to MLflow; runs in the driver of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikefleet.config.schema import Config, leaves
from spikefleet.plugins import loaded_plugins
from spikefleet.runs.progress import Display
from spikefleet.runs.run_dir import Run
from spikefleet.tracking.tracker import Tracker
from spikefleet.training.events import (
    CheckpointSaved,
    EpochDone,
    Event,
    Note,
    Phase,
    Recovered,
    Started,
    StepDone,
    WorkerFailed,
)
from spikefleet.versions import code_version

log = logging.getLogger(__name__)


class RunObserver:
    """The event sink of a run: shows and tracks each event, and counts restarts."""

    def __init__(self, run: Run, tracker: Tracker, display: Display) -> None:
        self._run, self._tracker, self._display = run, tracker, display
        self._started = False

    def begin(self, config: Config, data: Mapping[str, Any]) -> None:
        """Logs the configuration, the code version and tags of the data, before the first step."""
        dump = config.dump()
        self._tracker.log_params(dict(leaves(dump)))
        self._tracker.log_dict(dump, "config.json")
        self._tracker.set_tags({"recipe": config.recipe, "task": config.task, "code_version": code_version(), **data})
        if plugins := loaded_plugins():
            self._tracker.set_tags({"plugins": ",".join(plugins)})
        self._tracker.set_tags({"restarts": self._run.record().get("restarts", 0), "failure": ""})

    def emit(self, event: Event) -> None:
        """Shows and tracks an event; a full disk is logged, not raised, so that training continues."""
        self._display.show(event)
        try:
            self._track(event)
        except OSError as error:
            log.warning("event %s was not tracked: %s", type(event).__name__, error)

    def _track(self, event: Event) -> None:
        match event:
            case Started():
                self._tracker.set_tags({f"fact.{name}": _as_tag(value) for name, value in event.metadata.items()})
                if "threads" in event.metadata:
                    self._run.note(threads=event.metadata["threads"])
                if self._started:
                    restarts = self._run.record().get("restarts", 0) + 1
                    self._run.note(restarts=restarts)
                    self._tracker.set_tags({"restarts": restarts})
                self._started = True
            case StepDone():
                self._tracker.log_metrics(event.metrics, step=event.step)
            case EpochDone():
                self._epoch(event)
            case Recovered():
                for earlier in event.events:
                    if isinstance(earlier, StepDone | EpochDone):
                        self._track(earlier)
            case CheckpointSaved() | Note() | Phase() | WorkerFailed():
                pass

    def _epoch(self, event: EpochDone) -> None:
        metrics = {f"epoch/{name}": value for name, value in event.metrics.items() if name != "epoch"}
        self._tracker.log_metrics(metrics, step=event.step)
        if event.best:
            best = {f"best/{name}": value for name, value in event.metrics.items() if name.startswith("val/")}
            self._tracker.log_metrics({**best, "best/epoch": event.epoch}, step=event.step)
        for table, rows in (("layers", event.layers), ("gradients", event.gradients)):
            if rows:
                self._tracker.log_table(rows, f"{table}/epoch-{event.epoch:04d}.parquet")

    def finish(self, metrics: Mapping[str, float], step: int, report: Path) -> None:
        """Logs the final metrics, and the files of the run's report."""
        self._tracker.log_metrics(metrics, step=step)
        for path in sorted(report.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self._tracker.log_artifact(path, "report")


def _as_tag(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list) else value
