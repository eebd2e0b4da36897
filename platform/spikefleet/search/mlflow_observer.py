"""How a search is started, and how MLflow hears of it: a parent run, and one nested run for each trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikefleet.config.schema import Config, leaves
from spikefleet.errors import UserError
from spikefleet.files import read_json, write_json
from spikefleet.search.display import SearchDisplay
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.tracker import Tracker
from spikefleet.versions import code_version, library_versions
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.ledger import Counts, TrialStart
from spikefleet_tune.result import SearchResult
from spikefleet_tune.search_file import Search

FLUSH_S = 30.0


@dataclass(frozen=True)
class SearchLaunch:
    """How a search is started: nothing here decides what it finds."""

    name: str
    runs_dir: Path = Path("runs")
    stores_dir: Path = Path("stores")
    address: str | None = None
    verbose: bool = False
    extend: int = 0
    warm_start: str | None = None
    retry_failed: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides that say where the data lie and how they are loaded, such as `{"data.root": "/data/cifar"}`."""

    @property
    def folder(self) -> Path:
        return self.runs_dir.resolve() / "searches"

    @property
    def trials_dir(self) -> Path:
        """Runs of the trials."""
        return self.folder / self.name / "trials"


@dataclass(frozen=True)
class DataFacts:
    """Which data a search is about: written with its first trial, and compared at each later launch."""

    path: Path
    content_hash: str

    def check(self) -> None:
        """Raises UserError when the search was begun on other data."""
        held = read_json(self.path)["content_hash"] if self.path.is_file() else self.content_hash
        if held != self.content_hash:
            raise UserError(
                f"search {self.path.parent.name} was begun on data with content hash {held[:12]}, and the store now "
                f"has {self.content_hash[:12]}; give the same data, or another --name"
            )

    def write(self) -> None:
        write_json(self.path, {"content_hash": self.content_hash})


class SearchTracker:
    """Tells MLflow of the search and its trials: a parent run, and one nested run for each trial."""

    def __init__(
        self,
        launch: SearchLaunch,
        search: Search,
        display: SearchDisplay,
        facts: DataFacts,
        resolve: Callable[[Mapping[str, Any]], Config],
    ) -> None:
        """`resolve` gives the whole configuration of a trial's overrides."""
        self._launch, self._search, self._display, self._facts = launch, search, display, facts
        self._resolve = resolve
        self._uri = resolve_tracking_uri(launch.runs_dir)
        self._experiment = f"search-{launch.name}"
        self._parent: Tracker | None = None
        self._trials: dict[str, Tracker] = {}

    def _begun(self) -> Tracker:
        """The search's own run; opened with the first trial, so that a refused launch changes nothing."""
        if self._parent is None:
            self._facts.write()
            self._parent = Tracker.open(
                self._launch.folder / self._launch.name, self._launch.name, self._experiment, self._uri
            )
            self._parent.log_params(dict(leaves(self._search.dump())))
            self._parent.set_tags({"recipe": self._search.recipe, "code_version": code_version(), "kind": "search"})
            self._parent.flush(FLUSH_S)  # trials name it as their parent
        return self._parent

    def on_trial_started(self, trial: TrialStart, counts: Counts) -> None:
        self._display.on_trial_started(trial, counts)
        tracker = self._trials.get(trial.name)
        if tracker is None:
            run_dir = self._launch.trials_dir / trial.name
            tracker = Tracker.open(run_dir, trial.name, self._experiment, self._uri, self._begun().run_id)
            self._trials[trial.name] = tracker
        config = self._resolve(trial.overrides)
        tracker.log_params(dict(leaves(config.dump())))  # what pbt changes later becomes a tag
        tracker.set_tags({"trial": trial.number, "attempt": trial.attempt, "search": self._launch.name})
        tracker.set_tags({"recipe": config.recipe, "task": config.task, "code_version": code_version()})
        tracker.set_tags({"dataset": config.data.source, "data_hash": self._facts.content_hash})
        tracker.set_tags({f"fact.{name}": version for name, version in library_versions().items()})

    def on_trial_reported(self, trial: TrialStart, metrics: Mapping[str, float]) -> None:
        self._display.on_trial_reported(trial, metrics)
        epoch = int(metrics.get("epoch", 0))
        rows = {f"epoch/{key}": value for key, value in metrics.items() if key != "epoch"}
        self._trials[trial.name].log_metrics(rows, step=epoch)

    def on_trial_finished(self, record: TrialRecord, counts: Counts) -> None:
        self._end(record)
        self._display.on_trial_finished(record, counts)

    def on_trial_pruned(self, record: TrialRecord, counts: Counts) -> None:
        self._end(record)
        self._display.on_trial_pruned(record, counts)

    def on_trial_failed(self, record: TrialRecord, counts: Counts) -> None:
        self._end(record)
        self._display.on_trial_failed(record, counts)

    def _end(self, record: TrialRecord) -> None:
        tracker = self._trials.pop(record.name, None)
        if tracker is None:
            return
        tracker.log_metrics(record.figures, step=0)
        tracker.set_tags({"status": record.status, "reason": record.reason})
        report = self._launch.trials_dir / record.name / "report"
        for path in sorted(report.iterdir()) if report.is_dir() else ():
            if path.is_file() and not path.name.startswith("."):
                tracker.log_artifact(path, "report")
        if (config := self._launch.trials_dir / record.name / "config.json").is_file():
            tracker.log_artifact(config)
        tracker.finish("FAILED" if record.status == "failed" else "FINISHED", wait_s=FLUSH_S)

    def finish(self, result: SearchResult, report: Sequence[Path]) -> None:
        """Closes the parent run with the search's figures and report, unless nothing was run."""
        if self._parent is None:
            return
        figures = {"trials": float(len(result.records)), "front": float(len(result.front))}
        if result.hypervolume_curve:
            figures["hypervolume"] = result.hypervolume_curve[-1]
        self._parent.log_metrics(figures, step=len(result.records))
        for path in report:
            self._parent.log_artifact(path, "report")
        self._parent.finish("FINISHED" if result.complete else "KILLED", wait_s=FLUSH_S)

    def abandon(self) -> None:
        """Leaves open runs to be gone on with."""
        for tracker in (*self._trials.values(), self._parent):
            if tracker is not None:
                tracker.finish("KILLED", wait_s=3.0)
