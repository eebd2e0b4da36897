"""The durable journal of a search: one JSON line for each event of a trial.

Results and resumption are read from it alone. Each line is appended with one write and synced; an incomplete last line
is dropped. Nothing in it depends on the location of the directory.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.errors import SearchError
from spikefleet_tune.jsonl_log import DamagedLineError, JsonlLog
from spikefleet_tune.lock import Lock, LockedError, hold
from spikefleet_tune.messages import one_of
from spikefleet_tune.search_file import Search, search_of

Status = Literal["finished", "stopped", "pruned", "failed"]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_STORED_METRICS = "figures"  # the key of metrics in journals, since the first release


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended.

    * finished: `metrics` are those that the trainable returned, those of its best checkpoint.
    * stopped: the scheduler or the budget ended it early; `metrics` are those of its best reported epoch.
    * pruned: its loss or an objective was not finite; `reason` says which.
    * failed: it raised, or its process died; `reason` says why.
    """

    number: int
    name: str
    overrides: Mapping[str, Any]
    point: Mapping[str, Any]
    metrics: Mapping[str, float]
    status: Status
    seconds: float
    """Wall time in the attempt in which it ended."""
    seed: int
    """The seed of the search."""
    reason: str = ""
    epoch: float | None = None
    """The epoch of the best report; None without a report."""
    changes: tuple[Mapping[str, Any], ...] = ()
    """For each change during training: the earlier point, and the epoch until which it was used."""

    def values(self, objectives: Mapping[str, Any]) -> tuple[float, ...] | None:
        """The objectives in order; None for a trial that was pruned, failed, or lacks one of them."""
        if self.status not in ("finished", "stopped") or any(name not in self.metrics for name in objectives):
            return None
        return tuple(self.metrics[name] for name in objectives)


@dataclass(frozen=True)
class WarmStartPoint:
    """A point from an earlier search: with metrics it informs the sampler, without them it is tried first."""

    point: Mapping[str, Any]
    metrics: Mapping[str, float] | None = None
    origin: str = "warm-start point"


@dataclass
class Past:
    """The history of a search, as its journal records it."""

    started: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The overrides and the point that each trial was last started with, or changed to."""
    proposed: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """The point that the sampler suggested, before any change."""
    retried: set[int] = field(default_factory=set)
    ended: dict[int, TrialRecord] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)
    """("started" | "ended", number) in order of time."""
    attempts: dict[int, int] = field(default_factory=dict)
    warm_start: list[WarmStartPoint] = field(default_factory=list)
    extended: int = 0

    @property
    def records(self) -> list[TrialRecord]:
        """Trials that have ended, in the order of their numbers."""
        return [self.ended[number] for number in sorted(self.ended)]

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the trials that were started and have not ended."""
        return [number for number in self.started if number not in self.ended]


class SearchFolder:
    """The directory of a search: `<storage>/<name>/`. Raises SearchError for a name that is not a plain file name."""

    def __init__(self, storage: Path, name: str) -> None:
        if not _PLAIN_NAME.fullmatch(name):
            raise SearchError(
                f"search name {name!r} must have 1 to 100 letters, digits, '.', '_' or '-', "
                "and start with a letter or digit"
            )
        self.name = name
        self.path = storage.absolute() / name
        self._journal = JsonlLog(self.path / "journal.jsonl", durable=True, allow_nan=False)
        self._clock = self.path / "clock.json"

    @property
    def exists(self) -> bool:
        """Whether a search was started in the directory."""
        return (self.path / "search.json").is_file()

    def read_search(self) -> Search:
        """Reads the search as it was started. Raises SearchError if there is none, or it cannot be read."""
        try:
            tree = json.loads((self.path / "search.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            known = sorted(path.parent.name for path in self.path.parent.glob("*/search.json"))
            raise SearchError(
                f"search {self.path.name!r} does not exist in {self.path.parent}; {one_of(known)}"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise SearchError(f"{self.path / 'search.json'} cannot be read as a search: {error}") from None
        return search_of(tree, f"{self.path / 'search.json'}")

    def lock(self) -> Lock:
        """Locks the search for this attempt, until the end of a `with` block.

        Raises:
            SearchError: the search is already running, or its directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return hold(self.path / ".lock")
        except LockedError as error:
            raise SearchError(
                f"search {self.name} is already running ({error.holder}); wait for it, or set another name"
            ) from None
        except OSError as error:
            raise SearchError(f"search directory {self.path} cannot be written: {error}") from None

    def begin(self, search: Search) -> None:
        """Saves the search, or checks it against the one that was started under this name.

        Budget and resources may differ between attempts, and so may the points of the sampler `listed`.

        Raises:
            SearchError: the search was started with other settings; the message lists them field by field.
        """
        if self.exists:
            saved, given = _identity(self.read_search()), _identity(search)
            differing = [key for key in saved.keys() | given.keys() if saved.get(key) != given.get(key)]
            if differing:
                listed = "; ".join(
                    f"{key}: expected {saved.get(key, 'no value')}, found {given.get(key, 'no value')}"
                    for key in sorted(differing)
                )
                raise SearchError(
                    f"search {self.name} was started with other settings: {listed}; "
                    "use its settings to resume it, or set another name to start a new search"
                )
        write_atomically(self.path / "search.json", json.dumps(search.dump(), indent=1) + "\n")

    def append(self, event: str, **fields: Any) -> None:
        """Appends one line and syncs it to disk. Raises OSError if the disk is full."""
        self._journal.append({"event": event, **fields})

    def append_record(self, record: TrialRecord) -> None:
        """Appends the end of a trial; the journal's key for its metrics is `figures`. Raises OSError."""
        stored = {"metrics": _STORED_METRICS}
        self.append("ended", **{stored.get(name, name): value for name, value in asdict(record).items()})

    def append_warm_start(self, given: WarmStartPoint) -> None:
        """Appends a warm-start point, under the journal's keys `known` and `figures`. Raises OSError."""
        metrics = None if given.metrics is None else dict(given.metrics)
        self.append("known", point=dict(given.point), origin=given.origin, **{_STORED_METRICS: metrics})

    def drop_torn_line(self) -> None:
        """Truncates an incomplete last line. Raises SearchError at a damaged line before it."""
        with self._damage_named():
            self._journal.drop_torn_line()

    def read(self) -> Past:
        """Reads the journal. Raises SearchError at a line that cannot be read, except an incomplete last one."""
        past = Past()
        with self._damage_named():
            for position, entry in enumerate(self._journal.entries(), start=1):
                try:
                    _take(past, entry.record)
                except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
                    raise SearchError(f"{self._journal.path}, line {position} cannot be read: {error}") from None
        return past

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except DamagedLineError as error:
            raise SearchError(
                f"{error}, so the lines after it cannot be trusted; start a new search under another name"
            ) from None

    def read_seconds(self) -> float:
        """Seconds that earlier attempts ran, to within `Clock.EVERY`."""
        try:
            return float(json.loads(self._clock.read_text())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def write_seconds(self, seconds: float) -> None:
        """Saves the seconds of all attempts, atomically."""
        write_atomically(self._clock, json.dumps({"seconds": round(seconds, 3)}))


class Clock:
    """Seconds of all attempts together, saved in the search's directory every few seconds."""

    EVERY = 2.0
    """Seconds between two saves."""

    def __init__(self, folder: SearchFolder) -> None:
        self._folder, self._before, self._since = folder, folder.read_seconds(), time.monotonic()
        self._written = self._since

    @property
    def seconds(self) -> float:
        """Seconds of all attempts until now."""
        return self._before + time.monotonic() - self._since

    def tick(self, force: bool = False) -> None:
        """Saves the seconds if it is time to, or if `force`."""
        if force or time.monotonic() - self._written > self.EVERY:
            self._folder.write_seconds(self.seconds)
            self._written = time.monotonic()


def _identity(search: Search) -> dict[str, Any]:
    free = {"budget", "resources"} | ({"points"} if search.sampler.kind == "listed" else set())
    return {key: value for key, value in search.dump().items() if key not in free}


def _take(past: Past, line: dict[str, Any]) -> None:
    event = line.pop("event")
    match event:
        case "started":
            number = int(line["number"])
            _need_objects(line, "point", "overrides", "memory")
            line["changes"] = past.started.get(number, {}).get("changes", [])
            past.started[number] = line
            past.proposed.setdefault(number, line["point"])
            past.attempts[number] = past.attempts.get(number, 0) + 1
            if ("started", number) not in past.order:
                past.order.append(("started", number))
        case "changed":
            _need_objects(line, "point", "overrides", "before")
            past.started[int(line["number"])].update(overrides=line["overrides"], point=line["point"])
            past.started[int(line["number"])]["changes"].append(line["before"])
        case "ended":
            _need_objects(line, "point", "overrides", _STORED_METRICS)
            metrics = line.pop(_STORED_METRICS)
            _need_numbers(metrics, "metrics")
            _need_numbers({"number": line["number"], "seconds": line["seconds"]}, "trial")
            if line["status"] not in get_args(Status):
                raise ValueError(f"unknown status {line['status']!r}")
            record = TrialRecord(**{**line, "metrics": metrics, "changes": tuple(line["changes"])})
            if record.number not in past.started:
                raise ValueError(f"trial {record.number} ended but was never started")
            past.ended[record.number] = record
            past.order = [one for one in past.order if one != ("ended", record.number)] + [("ended", record.number)]
        case "again":
            past.ended.pop(int(line["number"]), None)
            past.retried.add(int(line["number"]))
            past.order = [one for one in past.order if one != ("ended", int(line["number"]))]
        case "known":
            _need_objects(line, "point")
            if line[_STORED_METRICS] is not None:
                _need_numbers(line[_STORED_METRICS], "metrics")
            past.warm_start.append(WarmStartPoint(line["point"], line[_STORED_METRICS], line["origin"]))
        case "extended":
            past.extended += int(line["trials"])
        case _:
            raise ValueError(f"unknown event {event!r}")


def _need_numbers(values: Mapping[str, Any], what: str) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} of {what} must be a number")


def _need_objects(line: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if not isinstance(line[key], Mapping):
            raise ValueError(f"{key} must be an object")
