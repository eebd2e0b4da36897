"""The state of a running search: which trials run, and how others ended; kept in step with journal and sampler."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from spikefleet_tune.journal import Past, SearchFolder, Status, TrialRecord
from spikefleet_tune.samplers import PointSampler
from spikefleet_tune.search_file import Search
from spikefleet_tune.trials import BEST, END, EPOCH, INTERRUPTED, ROW, finite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """Progress of a search: trials by status."""

    total: int | None
    """Trials of the whole search; None if only hours or an exhausted space end it."""
    finished: int = 0
    stopped: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0

    @property
    def done(self) -> int:
        """Trials that have ended."""
        return self.finished + self.stopped + self.pruned + self.failed


@dataclass(frozen=True)
class TrialStart:
    """A trial that starts or restarts."""

    number: int
    name: str
    overrides: Mapping[str, Any]
    point: Mapping[str, Any]
    attempt: int


class SearchObserver(Protocol):
    """Callbacks of a search, called in the driver. Exceptions are logged; they do not stop the search."""

    def on_trial_started(self, trial: TrialStart, counts: Counts) -> None:
        """A trial starts, restarts, or resumes with other values."""

    def on_trial_reported(self, trial: TrialStart, metrics: Mapping[str, float]) -> None:
        """A trial reports the metrics of an epoch."""

    def on_trial_finished(self, record: TrialRecord, counts: Counts) -> None:
        """A trial ended with status finished or stopped."""

    def on_trial_pruned(self, record: TrialRecord, counts: Counts) -> None:
        """A trial ended with status pruned."""

    def on_trial_failed(self, record: TrialRecord, counts: Counts) -> None:
        """A trial ended with status failed."""

    def on_trial_lost(self, trial: TrialStart, reason: str) -> None:
        """A trial's process is lost, and the trial will run again."""

    def on_waiting(self, what: str) -> None:
        """No trial fits into the cluster: what the search waits for, as a sentence; empty when one fits again."""

    def on_stopping(self) -> None:
        """A signal arrived: the running trials stop after their step; a second signal does not wait for them."""


class SilentObserver:
    """Does nothing; a base for observers that implement some of the callbacks."""

    def on_trial_started(self, trial: TrialStart, counts: Counts) -> None:
        """Does nothing."""

    def on_trial_reported(self, trial: TrialStart, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def on_trial_finished(self, record: TrialRecord, counts: Counts) -> None:
        """Does nothing."""

    def on_trial_pruned(self, record: TrialRecord, counts: Counts) -> None:
        """Does nothing."""

    def on_trial_failed(self, record: TrialRecord, counts: Counts) -> None:
        """Does nothing."""

    def on_trial_lost(self, trial: TrialStart, reason: str) -> None:
        """Does nothing."""

    def on_waiting(self, what: str) -> None:
        """Does nothing."""

    def on_stopping(self) -> None:
        """Does nothing."""


@dataclass
class _Live:
    start: TrialStart
    since: float | None = None
    """When its process started."""
    changes: list[Mapping[str, Any]] = field(default_factory=list)
    best: Mapping[str, float] | None = None
    epoch: float = 0.0
    end: Mapping[str, Any] | None = None


class Ledger:
    """Trials of one attempt by number, with those that ended in earlier attempts.

    Every change is written to the journal, then reported to the sampler and the observer.
    """

    def __init__(
        self, search: Search, folder: SearchFolder, past: Past, sampler: PointSampler, observer: SearchObserver
    ) -> None:
        self._search, self._folder, self._sampler, self._observer = search, folder, sampler, observer
        self._attempts = dict(past.attempts)
        self._earlier = {number: line["changes"] for number, line in past.started.items()}
        self.ended = dict(past.ended)
        self.live: dict[int, _Live] = {}
        self.total: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles the callbacks for a restoration that we never use; observers hold locks."""
        return {**self.__dict__, "_observer": SilentObserver()}

    @property
    def records(self) -> list[TrialRecord]:
        """Trials that have ended, in the order of their numbers."""
        return [self.ended[number] for number in sorted(self.ended)]

    @property
    def counts(self) -> Counts:
        """Trials by status."""
        statuses = [record.status for record in self.ended.values()]
        of: dict[Status, int] = {"finished": 0, "stopped": 0, "pruned": 0, "failed": 0}
        for status in statuses:
            of[status] += 1
        return Counts(self.total, **of, running=len(self.live))

    def begin(self, number: int, point: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
        """Journals a trial before it starts; returns its configuration for Ray Tune."""
        overrides = {**self._search.overrides, **point}
        self._attempts[number] = self._attempts.get(number, 0) + 1
        start = TrialStart(number, f"{self._folder.name}-{number:04d}", overrides, dict(point), self._attempts[number])
        self._folder.append(
            "started", number=number, name=start.name, overrides=overrides, point=dict(point), memory=dict(memory)
        )
        self.live[number] = _Live(start, changes=list(self._earlier.get(number, [])))
        return {"number": number, "overrides": overrides, "point": dict(point)}

    def running(self, number: int, config: Mapping[str, Any]) -> None:
        """A trial's process started, or resumed with values that the scheduler changed."""
        live = self.live[number]
        live.since = live.since or time.monotonic()
        if config["point"] != live.start.point:
            before = {"point": dict(live.start.point), "until_epoch": live.epoch}
            live.changes.append(before)
            live.best = None  # it belongs to the earlier point
            live.start = replace(live.start, overrides=config["overrides"], point=config["point"])
            self._folder.append(
                "changed", number=number, overrides=config["overrides"], point=config["point"], before=before
            )
        self._notify("on_trial_started", live.start, self.counts)

    def reported(self, number: int, result: Mapping[str, Any]) -> None:
        """A trial reported an epoch, or, in its last report, how it ended."""
        live = self.live[number]
        if END in result:
            live.end = json.loads(result[END])
            return
        metrics = finite(json.loads(result[ROW]))
        live.epoch = metrics.get(EPOCH, live.epoch)
        kept = metrics.pop(BEST, None)
        if self._decides(metrics, live.best) if kept is None else kept:
            live.best = metrics
        self._notify("on_trial_reported", live.start, metrics)

    def _decides(self, metrics: Mapping[str, float], best: Mapping[str, float] | None) -> bool:
        """Whether an epoch is better than the best so far by the deciding metric."""
        metric, mode = self._search.deciding
        if metric not in metrics or best is None:
            return metric in metrics
        return metrics[metric] > best[metric] if mode == "max" else metrics[metric] < best[metric]

    def completed(self, number: int, stopped: bool) -> None:
        """Ray Tune ended a trial without an error: the trial returned, or the scheduler `stopped` it.

        A trial that stopped with its search stays unfinished.
        """
        live = self.live[number]
        if live.end is not None and live.end["status"] == INTERRUPTED:
            return
        if live.end is not None:
            self._end(number, live.end["status"], live.end["metrics"], live.end["reason"])
        elif stopped:
            self.stop_early(number, f"stopped by {self._search.scheduler.kind} after epoch {live.epoch:g}")

    def stop_early(self, number: int, reason: str) -> None:
        """Ends a trial with its best reported epoch; a trial without a report stays unfinished."""
        best = self.live[number].best
        if best is not None:
            self._end(number, "stopped", {key: value for key, value in best.items() if key != EPOCH}, reason)

    def has_ended(self, number: int) -> bool:
        """Whether a trial has nothing more to do: it has sent its last report, or is recorded."""
        return number not in self.live or self.live[number].end is not None

    def waits(self, what: str) -> None:
        """No trial fits into the cluster; an empty sentence: one fits again."""
        self._notify("on_waiting", what)

    def stopping(self) -> None:
        """The search was asked to stop."""
        self._notify("on_stopping")

    def lost(self, number: int, reason: str) -> None:
        """A trial's process died, and Ray Tune runs the trial again."""
        self._notify("on_trial_lost", self.live[number].start, reason)

    def failed(self, number: int, reason: str) -> None:
        """A trial's process died, or Ray Tune reported an error."""
        self._end(number, "failed", {}, reason)

    def _end(self, number: int, status: Status, metrics: Mapping[str, float], reason: str) -> None:
        live = self.live.pop(number)
        record = TrialRecord(
            number=number,
            name=live.start.name,
            overrides=live.start.overrides,
            point=live.start.point,
            metrics=metrics,
            status=status,
            seconds=0.0 if live.since is None else round(time.monotonic() - live.since, 3),
            seed=self._search.seed,
            reason=reason,
            epoch=live.best.get(EPOCH) if live.best is not None else None,
            changes=tuple(live.changes),
        )
        self._folder.append_record(record)
        self.ended[number] = record
        self._sampler.tell(number, record.values(self._search.objectives))
        to = {"pruned": "on_trial_pruned", "failed": "on_trial_failed"}.get(status, "on_trial_finished")
        self._notify(to, record, self.counts)

    def _notify(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._observer, method)(*arguments)
        except Exception:
            log.exception("%s of the observer failed; the search continues", method)
