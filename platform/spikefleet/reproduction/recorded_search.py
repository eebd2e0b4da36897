"""Searches, kept as JSON beside recorded trainings: with them the page of evidence shows fronts without their runs.

There is one file for each search, `search-NAME.json`, with every trial that has the objectives, its trainings with
other seeds, and what decides each objective. A search that is recorded again replaces its file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from spikefleet.errors import UserError
from spikefleet.files import read_json_object
from spikefleet.registry.api import Promotion
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet_tune import pareto
from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.direction import Direction
from spikefleet_tune.importance import METHOD, importance, importance_intervals
from spikefleet_tune.result import SearchResult

_PREFIX = "search-"


@dataclass(frozen=True)
class RecordedTrial:
    """A point of a search with its trainings."""

    name: str
    point: Mapping[str, Any]
    metrics: Mapping[str, float]
    """Of the training in the search."""
    others: tuple[Mapping[str, float], ...]
    """Of the same point with other seeds."""

    def values(self, key: str) -> list[float]:
        """A metric of all its trainings, that in the search first."""
        return [one[key] for one in (self.metrics, *self.others) if key in one]

    def mean(self, key: str) -> float:
        """Mean of a metric over all trainings."""
        return statistics.fmean(self.values(key))


@dataclass(frozen=True)
class RecordedSearch:
    """A search as the page of evidence needs it."""

    name: str
    words: tuple[str, ...]
    """The search that `spikefleet tune` was given, and overrides."""
    recipe: str
    keys: tuple[str, ...]
    """Of its space."""
    objectives: Mapping[str, Direction]
    trials: tuple[RecordedTrial, ...]
    without_values: int
    """Trials that failed or lack an objective."""
    importance: Mapping[str, Mapping[str, float] | str]
    """By objective, the share of its variance that each key explains; or why there is none. Over all trainings where
    each point has further seeds, else over those in the search."""
    intervals: Mapping[str, Mapping[str, Sequence[float]]]
    """Of those shares."""
    method: str
    """How both are computed."""
    knee: str | None
    """Name of the trial that is the knee of the front in the search."""
    registered: Mapping[str, Any] | None
    """`trial`, and `name`, `version`, `alias` of the version that it is registered as."""
    dataset: str
    data_hash: str
    code_versions: tuple[str, ...]
    seconds: float
    """Of all trainings."""

    @property
    def trainings(self) -> int:
        """How many there are with all objectives."""
        return sum(1 + len(trial.others) for trial in self.trials)

    @property
    def seeds(self) -> tuple[int, int]:
        """The fewest and the most trainings of a point."""
        counts = [1 + len(trial.others) for trial in self.trials]
        return min(counts, default=0), max(counts, default=0)

    @property
    def front(self) -> list[RecordedTrial]:
        """The front in the search, by one training of each point; best in the first objective first."""
        return self._front([[trial.metrics[name] for name in self.objectives] for trial in self.trials])

    @property
    def front_of_means(self) -> list[RecordedTrial]:
        """The front by means over all trainings of each point; of equally many, or it compares luck with means."""
        return self._front([[trial.mean(name) for name in self.objectives] for trial in self.trials])

    @property
    def best_known_front(self) -> list[RecordedTrial]:
        """The front of means where every point has further seeds, else that in the search."""
        return self.front_of_means if self.seeds[0] > 1 else self.front

    @property
    def knee_by_others(self) -> str | None:
        """Name of the trial that is the knee by trainings with other seeds, as many as any point has; None without."""
        most = max((len(trial.others) for trial in self.trials), default=0)
        trials = [trial for trial in self.trials if most and len(trial.others) == most]
        rows = [[statistics.fmean(one[name] for one in trial.others) for name in self.objectives] for trial in trials]
        position = pareto.knee(rows, list(self.objectives.values()))
        return None if position is None else trials[position].name

    def _front(self, rows: Sequence[Sequence[float]]) -> list[RecordedTrial]:
        members = pareto.front(rows, list(self.objectives.values())) if rows else []
        sign = 1 if next(iter(self.objectives.values())) == "max" else -1
        return [self.trials[i] for i in sorted(members, key=lambda i: -sign * rows[i][0])]

    @classmethod
    def of(
        cls,
        result: SearchResult,
        words: Sequence[str],
        options: Options,
        confirmation: Sequence[Mapping[str, Any]] = (),
        promotion: tuple[str, Promotion] | None = None,
    ) -> Self:
        """What is recorded of a search.

        Args:
            result: of the search.
            words: the search that `spikefleet tune` was given, and overrides but for those that say where data lie.
            options: where its runs are.
            confirmation: trainings with other seeds, as `confirm_trials` returns them.
            promotion: the trial that was registered, and as what.
        """
        again = {row["trial"]: row["by_seed"] for row in confirmation}
        trials = tuple(
            RecordedTrial(
                record.name,
                dict(record.point),
                dict(record.metrics),
                tuple(one["metrics"] for one in again.get(record.name, ())),
            )
            for record in result.comparable
        )
        runs = [Run(options.trials_dir(result.name) / record.name) for record in result.comparable]
        data = runs[0].data() if runs else None
        seconds = sum(record.seconds for record in result.records)
        seconds += sum(one["seconds"] for rows in again.values() for one in rows)
        registered = None
        if promotion is not None:
            trial, version = promotion
            registered = {
                "trial": trial,
                "name": version.name,
                "version": version.version,
                "alias": version.alias,
            }
        decided = _with_others(result, trials)
        return cls(
            result.name,
            tuple(words),
            result.search.recipe,
            tuple(result.search.space),
            dict(result.search.objectives),
            trials,
            len(result.records) - len(trials),
            importance(decided),
            importance_intervals(decided),
            METHOD,
            None if result.knee is None else result.knee.name,
            registered,
            "" if data is None else data.dataset,
            "" if data is None else data.content_hash,
            tuple(sorted({str(run.record().get("code_version", "unknown")) for run in runs})),
            seconds,
        )

    def write(self, folder: Path) -> Path:
        """Writes its file of a folder of recorded results, atomically; returns the path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_PREFIX}{self.name}.json"
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")  # in the order of objectives and keys
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a file. Raises UserError if it is damaged."""
        plain = read_json_object(path)
        try:
            trials = tuple(RecordedTrial(**{**one, "others": tuple(one["others"])}) for one in plain["trials"])
            fixed: dict[str, Any] = {key: tuple(plain[key]) for key in ("words", "keys", "code_versions")}
            for one in (metrics for trial in trials for metrics in (trial.metrics, *trial.others)):
                for name in plain["objectives"]:
                    one[name]
            fixed["intervals"] = {
                name: {key: tuple(ends) for key, ends in found.items()} for name, found in plain["intervals"].items()
            }
            return cls(**{**plain, **fixed, "trials": trials})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}; record the search again by `spikefleet tune`") from None


def _with_others(result: SearchResult, trials: Sequence[RecordedTrial]) -> SearchResult:
    """The search with all trainings as trials, where each point has some with other seeds; else as it was."""
    if not all(trial.others for trial in trials):
        return result
    others = {trial.name: trial.others for trial in trials}
    more = [replace(record, metrics=one) for record in result.comparable for one in others[record.name]]
    return replace(result, records=(*result.records, *more))


def recorded_searches(folder: Path) -> Iterator[RecordedSearch]:
    """The searches of a folder of recorded results, by name. Raises UserError if a file is damaged."""
    for path in sorted(folder.glob(f"{_PREFIX}*.json")):
        yield RecordedSearch.read(path)
