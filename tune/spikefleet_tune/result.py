"""The result of a search: its trials, their Pareto front, knee and hypervolume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spikefleet_tune import pareto
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.search_file import Search


@dataclass(frozen=True)
class SearchResult:
    """The trials of a search that have ended so far."""

    name: str
    folder: Path
    search: Search
    records: tuple[TrialRecord, ...]
    seconds: float
    complete: bool
    """False if the hours ended before the trials did, or if trials are still unfinished."""

    @property
    def comparable(self) -> list[TrialRecord]:
        """Trials with a value for each objective."""
        return [record for record in self.records if record.values(self.search.objectives) is not None]

    @property
    def front(self) -> list[TrialRecord]:
        """The trials that no other trial dominates, best in the first objective first."""
        trials, rows = self.comparable, self._rows()
        members = [trials[i] for i in pareto.front(rows, self.search.directions)]
        first, direction = next(iter(self.search.objectives.items()))
        return sorted(members, key=lambda one: one.metrics[first] * (-1 if direction == "max" else 1))

    @property
    def knee(self) -> TrialRecord | None:
        """The knee of the front; None if no trial has values."""
        position = pareto.knee(self._rows(), self.search.directions)
        return None if position is None else self.comparable[position]

    @property
    def hypervolume_curve(self) -> list[float]:
        """The hypervolume after each trial, in the order of their numbers, with one reference point for all."""
        rows = [record.values(self.search.objectives) for record in self.records]
        return pareto.hypervolume_curve(rows, self.search.directions)

    @property
    def reference(self) -> list[float] | None:
        """The reference point of the hypervolume; None if no trial has values."""
        rows = self._rows()
        return pareto.reference_point(rows, self.search.directions) if rows else None

    def _rows(self) -> list[tuple[float, ...]]:
        found = (record.values(self.search.objectives) for record in self.records)
        return [values for values in found if values is not None]
