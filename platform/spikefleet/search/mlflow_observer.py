"""Tracks a search in MLflow: a parent run, and one nested run for each trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikefleet.config.schema import Config, leaves
from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object
from spikefleet.runs.observer import ENVIRONMENT
from spikefleet.runs.options import Options
from spikefleet.runs.run_page import shown_params, source_tags
from spikefleet.search.display import SearchDisplay
from spikefleet.search.search_page import search_description, search_experiment, trial_description
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.tracker import TrackedDataset, Tracker
from spikefleet.versions import code_version, library_versions
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.ledger import Counts, TrialStart
from spikefleet_tune.result import SearchResult
from spikefleet_tune.search_file import Search

FLUSH_S = 30.0
"""Seconds to wait for the delivery of tracking records."""


def check_same_data(folder: Path, data: DataSummary) -> None:
    """Raises UserError if the search in a folder was started on other data."""
    if not (folder / DATA_SUMMARY).is_file():
        return
    held = str(read_json_object(folder / DATA_SUMMARY, "content_hash")["content_hash"])
    if held != data.content_hash:
        raise UserError(
            f"search {folder.name} was started on data with content hash {held[:12]}, but the store has "
            f"{data.content_hash[:12]}; use the same data, or set another --name"
        )


class SearchTracker:
    """An observer of a search that logs to MLflow and forwards to a display.

    Args:
        name: of the search.
        options: directories and cluster.
        search: the search.
        display: shows the progress.
        data: summary of the data of all trials.
        dataset: the same data as MLflow shows them.
        resolve: gives the configuration of a trial's overrides.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        search: Search,
        display: SearchDisplay,
        data: DataSummary,
        dataset: TrackedDataset,
        resolve: Callable[[Mapping[str, Any]], Config],
    ) -> None:
        self._name, self._search, self._display, self._data = name, search, display, data
        self._folder, self._trials_dir = options.searches_dir / name, options.trials_dir(name)
        self._dataset, self._resolve = dataset, resolve
        self._uri = resolve_tracking_uri(options.runs_dir)
        self._experiment = f"search-{name}"
        self._parent: Tracker | None = None
        self._trials: dict[str, Tracker] = {}

    def _parent_run(self) -> Tracker:
        """The run of the search; opened with the first trial, so that a refused attempt changes nothing."""
        if self._parent is None:
            self._data.write(self._folder)
            self._parent = Tracker.open(self._folder, self._name, self._experiment, self._uri)
            self._parent.describe_experiment(search_experiment(self._name, self._search))
            self._parent.log_dataset(self._dataset)
            self._parent.log_params(dict(leaves(self._search.dump())))
            self._parent.set_tags({"recipe": self._search.recipe, "code_version": code_version(), "kind": "search"})
            self._parent.set_tags(source_tags(f"spikefleet tune {self._name}", code_version()))
            self._parent.log_dict(library_versions(), ENVIRONMENT)
            self._parent.describe(search_description(self._name, self._search))
            self._parent.flush(FLUSH_S)  # trials need its id as their parent
        return self._parent

    def on_trial_started(self, trial: TrialStart, counts: Counts) -> None:
        """Opens the trial's run and logs its configuration."""
        self._display.on_trial_started(trial, counts)
        tracker = self._trials.get(trial.name)
        if tracker is None:
            run_dir = self._trials_dir / trial.name
            tracker = Tracker.open(run_dir, trial.name, self._experiment, self._uri, self._parent_run().run_id)
            self._trials[trial.name] = tracker
        config = self._resolve(trial.overrides)
        tracker.log_dataset(self._dataset)
        shown = {**shown_params(config.model), **dict(leaves(config.dump()))}
        tracker.log_params(shown)  # a later change by pbt becomes a tag
        attempt = trial.attempt if trial.attempt > 1 else ""
        tracker.set_tags({"trial": trial.number, "attempt": attempt, "search": self._name})
        tracker.set_tags({"recipe": config.recipe, "task": config.task, "dataset": self._data.dataset})
        tracker.set_tags({"code_version": code_version()})
        tracker.describe(trial_description(self._name, trial))

    def on_trial_reported(self, trial: TrialStart, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of an epoch."""
        self._display.on_trial_reported(trial, metrics)
        epoch = int(metrics.get("epoch", 0))
        rows = {f"epoch/{key}": value for key, value in metrics.items() if key != "epoch"}
        self._trials[trial.name].log_metrics(rows, step=epoch)

    def on_trial_finished(self, record: TrialRecord, counts: Counts) -> None:
        """Closes the trial's run with its metrics and report."""
        self._end(record)
        self._display.on_trial_finished(record, counts)

    def on_trial_pruned(self, record: TrialRecord, counts: Counts) -> None:
        """Closes the trial's run with the reason."""
        self._end(record)
        self._display.on_trial_pruned(record, counts)

    def on_trial_failed(self, record: TrialRecord, counts: Counts) -> None:
        """Closes the trial's run with the reason."""
        self._end(record)
        self._display.on_trial_failed(record, counts)

    def on_trial_lost(self, trial: TrialStart, reason: str) -> None:
        """Nothing is logged: the attempts of a trial are counted when it starts again."""
        self._display.on_trial_lost(trial, reason)

    def on_waiting(self, what: str) -> None:
        """Nothing is logged."""
        self._display.on_waiting(what)

    def on_stopping(self) -> None:
        """Nothing is logged: `abandon` marks the open runs as killed."""
        self._display.on_stopping()

    def _end(self, record: TrialRecord) -> None:
        tracker = self._trials.pop(record.name, None)
        if tracker is None:
            return
        tracker.log_metrics(record.metrics, step=0)
        tracker.set_tags({"status": record.status, "reason": record.reason})
        tracker.describe(trial_description(self._name, record))
        report = self._trials_dir / record.name / "report"
        for path in sorted(report.iterdir()) if report.is_dir() else ():
            if path.is_file() and not path.name.startswith("."):
                tracker.log_artifact(path, "report")
        if (config := self._trials_dir / record.name / "config.json").is_file():
            tracker.log_artifact(config)
        tracker.finish("FAILED" if record.status == "failed" else "FINISHED", wait_s=FLUSH_S)

    def finish(self, result: SearchResult, report: Sequence[Path]) -> None:
        """Closes the parent run with the metrics and the report of the search, if any trial was run."""
        if self._parent is None:
            return
        metrics = {"trials": float(len(result.records)), "front": float(len(result.front))}
        if result.hypervolume_curve:
            metrics["hypervolume"] = result.hypervolume_curve[-1]
        self._parent.log_metrics(metrics, step=len(result.records))
        for path in report:
            self._parent.log_artifact(path, "report")
        self._parent.describe(search_description(self._name, self._search, result))
        self._parent.finish("FINISHED" if result.complete else "KILLED", wait_s=FLUSH_S)

    def abandon(self) -> None:
        """Marks open runs as killed; the search can be resumed."""
        for tracker in (*self._trials.values(), self._parent):
            if tracker is not None:
                tracker.finish("KILLED", wait_s=3.0)
