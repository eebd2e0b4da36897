"""Shows the events of a training as progress and logs them to MLflow; runs in the driver of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from spikefleet.certificates.certify import Certificates
from spikefleet.certificates.energy_card import ENERGY, read_card
from spikefleet.certificates.latency import LATENCY_MS
from spikefleet.config.schema import Config, leaves
from spikefleet.plugins import loaded_plugins
from spikefleet.registry.version import SPIKE_DRIVEN
from spikefleet.runs.initial_weights import lineage
from spikefleet.runs.progress import Display
from spikefleet.runs.run_dir import Run
from spikefleet.runs.run_page import Results, run_description, shown_params, source_tags, training_experiment
from spikefleet.runs.segments import segments_of
from spikefleet.tracking.tracker import TrackedDataset, Tracker
from spikefleet.training.events import (
    CheckpointSaved,
    EpochDone,
    Event,
    Note,
    Phase,
    Recovered,
    Started,
    StepDone,
    Waiting,
    WorkerFailed,
)
from spikefleet.training.loop import Outcome
from spikefleet.versions import code_version

ENVIRONMENT = "environment.json"
"""Artifact of a run with what its workers ran on: device, form of the spiking unit, threads, library versions."""

LAYERS = "layers.json"
"""Artifact: firing rates and silent channels of each layer after the last epoch, as a table."""

ENDED = "ended"
"""Tag of a run that ended before its last epoch: why."""

SEGMENTS = "segments"
"""Tag of a run that was trained further after an end: the schedule of each segment."""

LAYER_ENERGY = "layer_energy.json"
"""Artifact: energy and operations of each layer, as a table."""

_NOTE_EVERY_S = 15.0

log = logging.getLogger(__name__)


class RunObserver:
    """The event sink of a run: shows and tracks each event, and counts restarts."""

    def __init__(self, run: Run, tracker: Tracker, display: Display) -> None:
        self._run, self._tracker, self._display = run, tracker, display
        self._started = False
        self._epochs = 0
        self._start = (0, 0.0)
        self._total_steps = 0
        self._noted = 0.0
        self._unshown: tuple[Mapping[str, Any], ...] = ()
        """Spike health of the latest epoch, by layer, where it was not the last one of the configuration."""

    def begin(self, config: Config, data: TrackedDataset) -> None:
        """Logs the configuration, the code version and the data, before the first step."""
        dump = config.dump()
        self._tracker.describe_experiment(training_experiment(config))
        self._tracker.log_dataset(data)
        self._tracker.log_params({**shown_params(config.model), **dict(leaves(dump))})
        self._tracker.log_dict(dump, "config.json")
        code = code_version()
        tags = {"recipe": config.recipe, "task": config.task, "dataset": data.name, "code_version": code}
        self._tracker.set_tags({**tags, "plugins": ",".join(loaded_plugins()), "failure": ""})
        self._tracker.set_tags({**source_tags(f"spikefleet train {config.recipe}", code), **lineage(self._run)})
        self._tracker.set_tags({SEGMENTS: segments_of(self._run)})
        self._note_restarts(self._run.record().get("restarts", 0))
        self._tracker.describe(run_description(config, self._run.data()))

    def _note_restarts(self, restarts: int) -> None:
        self._tracker.set_tags({"restarts": restarts or ""})

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
                self._epochs, self._total_steps = event.epochs, event.total_steps
                self._start = (event.step, time.time())
                if event.metadata:
                    self._tracker.log_dict(dict(event.metadata), ENVIRONMENT)
                if "parameters" in event.metadata:
                    self._tracker.log_params({"parameters": event.metadata["parameters"]})
                if "threads" in event.metadata:
                    self._run.note(threads=event.metadata["threads"])
                if self._started:
                    restarts = self._run.record().get("restarts", 0) + 1
                    self._run.note(restarts=restarts)
                    self._note_restarts(restarts)
                self._started = True
                self._run.note(status="running", waiting=None)
            case StepDone():
                self._tracker.log_metrics(event.metrics, step=event.step)
                if time.time() - self._noted > _NOTE_EVERY_S:
                    self._note_progress(event)
            case EpochDone():
                self._note_progress(event)
                self._epoch(event)
            case Recovered():
                for earlier in event.events:
                    if isinstance(earlier, StepDone | EpochDone):
                        self._track(earlier)
            case Phase():
                if self._run.record()["status"] == "waiting":
                    self._run.note(status="running", waiting=None)
            case Waiting():
                self._run.note(status="waiting", waiting={"for": event.what, "since": event.since})
            case CheckpointSaved() | Note() | WorkerFailed():
                pass

    def _note_progress(self, event: StepDone | EpochDone) -> None:
        """How far the run is, for `spikefleet status`: in run.json, with what the remaining time follows from."""
        self._noted = time.time()
        before = self._run.record().get("progress") or {}
        measured = {key: value for key, value in event.metrics.items() if key.startswith("val/")}
        self._run.note(
            progress={
                "epoch": event.epoch if isinstance(event, EpochDone) else event.epoch + 1,
                "epochs": self._epochs,
                "step": event.step,
                "steps": self._total_steps,
                "from_step": self._start[0],
                "since": self._start[1],
                "at": self._noted,
                "metrics": measured or before.get("metrics", {}),
            }
        )

    def _epoch(self, event: EpochDone) -> None:
        metrics = {f"epoch/{name}": value for name, value in event.metrics.items() if name != "epoch"}
        self._tracker.log_metrics(metrics, step=event.step)
        if event.best:
            best = {f"best/{name}": value for name, value in event.metrics.items() if name.startswith("val/")}
            self._tracker.log_metrics({**best, "best/epoch": event.epoch}, step=event.step)
        for table, rows in (("layers", event.layers), ("gradients", event.gradients)):
            if rows:
                self._tracker.log_table(rows, f"{table}/epoch-{event.epoch:04d}.parquet")
        if event.layers and event.epoch == self._epochs:
            self._tracker.show_table(event.layers, LAYERS)
        self._unshown = event.layers if event.epoch < self._epochs else ()

    def finish(self, outcome: Outcome, certificates: Certificates, config: Config) -> None:
        """Logs the final metrics, the files of the run's report, and the description with the results."""
        costs = {"energy_mj": certificates.energy_mj, LATENCY_MS: certificates.latency.median_ms}
        self._tracker.log_metrics({**outcome.reported, **costs}, step=outcome.steps)
        if self._unshown:
            self._tracker.show_table(self._unshown, LAYERS)
        self._tracker.set_tags({ENDED: outcome.ended.why if outcome.ended else ""})
        report = self._run.path / "report"
        for path in sorted(report.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self._tracker.log_artifact(path, "report")
        if rows := read_card(report / ENERGY).rows():
            first = [{key: row[key] for key in ("layer", "energy_mj")} for row in rows]
            self._tracker.show_table([{**shown, **row} for shown, row in zip(first, rows, strict=True)], LAYER_ENERGY)
        self._tracker.set_tags({SPIKE_DRIVEN: certificates.verdict})
        self._tracker.describe(finished_description(config, self._run, certificates, outcome.validation, outcome.test))


def finished_description(
    config: Config,
    run: Run,
    certificates: Certificates,
    validation: Mapping[str, float],
    test: Mapping[str, float],
    registered: str = "",
) -> str:
    """The description of a finished run.

    Args:
        config: of the run.
        run: its directory.
        certificates: of its best checkpoint.
        validation: metrics of the best checkpoint on the validation split; empty without one.
        test: its metrics on the test split; empty without one.
        registered: what became of it in the registry.
    """
    state = run.checkpoints.newest_state()
    best = None if state is None or not validation else state.best
    results = Results(
        {
            **{f"val/{name}": value for name, value in validation.items()},
            **{f"test/{name}": value for name, value in test.items()},
        },
        None if best is None else best.epoch,
        certificates.energy_mj,
        certificates.verdict,
    )
    return run_description(config, run.data(), results, registered)
