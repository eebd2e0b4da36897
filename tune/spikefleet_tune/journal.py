"""The durable record of a search: one JSON line for each thing that happened to a trial.

It is the source of truth for results and for resumption. Each line is appended with one write and synced; a last line
that a crash cut short is dropped. Nothing in it depends on where the directory stands.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.errors import SearchError
from spikefleet_tune.jsonl_log import DamagedLineError, JsonlLog
from spikefleet_tune.lock import Lock, LockedError, hold
from spikefleet_tune.search_file import Search, search_of

Status = Literal["finished", "stopped", "pruned", "failed"]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has come to its end.

    finished: `figures` are what the trainable returned, that is, those of its best checkpoint.
    stopped:  early, by the scheduler or the budget; `figures` are those of its best reported epoch.
    pruned:   its loss or an objective was not finite. failed: it raised, or its process died. Both say why in `reason`.
    """

    number: int
    name: str
    overrides: Mapping[str, Any]
    point: Mapping[str, Any]
    figures: Mapping[str, float]
    status: Status
    seconds: float
    """Of the launch that it ended in."""
    seed: int
    """The search's."""
    reason: str = ""
    epoch: float | None = None
    """Of the best report, where the trial reported any."""
    changes: tuple[Mapping[str, Any], ...] = ()
    """What it was started with before a change in the middle of training, and until which epoch."""

    def values(self, objectives: Mapping[str, Any]) -> tuple[float, ...] | None:
        """The objectives in order, or None when the trial has no say: pruned, failed, or without one of them."""
        if self.status not in ("finished", "stopped") or any(name not in self.figures for name in objectives):
            return None
        return tuple(self.figures[name] for name in objectives)


@dataclass(frozen=True)
class WarmStartPoint:
    """A point from an earlier search: with figures it informs the sampler, without it is tried first."""

    point: Mapping[str, Any]
    figures: Mapping[str, float] | None = None
    origin: str = "warm-start point"


@dataclass
class Past:
    """What a journal tells."""

    started: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What each trial was last started with, or changed to."""
    proposed: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """The point that the sampler proposed, whatever the trial was changed to."""
    retried: set[int] = field(default_factory=set)
    ended: dict[int, TrialRecord] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)
    """("started" | "ended", number) as it happened."""
    attempts: dict[int, int] = field(default_factory=dict)
    warm_start: list[WarmStartPoint] = field(default_factory=list)
    extended: int = 0

    @property
    def records(self) -> list[TrialRecord]:
        return [self.ended[number] for number in sorted(self.ended)]

    @property
    def unfinished(self) -> list[int]:
        return [number for number in self.started if number not in self.ended]


class SearchFolder:
    """The directory of a search: `<storage>/<name>/`. Raises SearchError for a name that is no plain word."""

    def __init__(self, storage: Path, name: str) -> None:
        if not _PLAIN_NAME.fullmatch(name):
            raise SearchError(
                f"name {name!r} must be 1 to 100 letters, digits, '.', '_' and '-', and start with a letter or digit"
            )
        self.name = name
        self.path = storage.absolute() / name
        self._journal = JsonlLog(self.path / "journal.jsonl", durable=True, allow_nan=False)
        self._clock = self.path / "clock.json"

    @property
    def exists(self) -> bool:
        return (self.path / "search.json").is_file()

    def read_search(self) -> Search:
        """The search as it was started. Raises SearchError when there is none."""
        try:
            tree = json.loads((self.path / "search.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise SearchError(f"{self.path} holds no search that can be read: {error}") from None
        return search_of(tree, f"{self.path / 'search.json'}")

    def lock(self) -> Lock:
        """Holds the search for this launch, until the end of a `with` block. Raises SearchError when it is running."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return hold(self.path / ".lock")
        except LockedError as error:
            raise SearchError(
                f"search {self.name} is running already ({error.holder}); wait for it, or give another name"
            ) from None
        except OSError as error:
            raise SearchError(f"search directory {self.path} cannot be written: {error}") from None

    def begin(self, search: Search) -> None:
        """Writes the search down, or raises SearchError when another one was started under this name.

        Budget and resources may differ from launch to launch, and so may the points of a list: what was tried stays.
        """
        if self.exists:
            held, wanted = _identity(self.read_search()), _identity(search)
            differing = [key for key in held.keys() | wanted.keys() if held.get(key) != wanted.get(key)]
            if differing:
                listed = "; ".join(
                    f"{key}: {held.get(key, 'absent')} in the search, {wanted.get(key, 'absent')} asked for"
                    for key in sorted(differing)
                )
                raise SearchError(
                    f"search {self.name} was started with other settings: {listed}; "
                    "give its own values to resume it, or another name to start a new search"
                )
        write_atomically(self.path / "search.json", json.dumps(search.dump(), indent=1) + "\n")

    def append(self, event: str, **facts: Any) -> None:
        """One line, written and synced before this returns. Raises OSError when the disk is full."""
        self._journal.append({"event": event, **facts})

    def append_record(self, record: TrialRecord) -> None:
        self.append("ended", **asdict(record))

    def drop_torn_line(self) -> None:
        """Cuts off a last line that was not written to its end. Raises SearchError at a damaged line before it."""
        with self._damage_named():
            self._journal.drop_torn_line()

    def read(self) -> Past:
        """What happened so far. Raises SearchError at a line that cannot be read, unless it is the torn last one."""
        past = Past()
        with self._damage_named():
            for position, entry in enumerate(self._journal.entries(), start=1):
                try:
                    _take(past, entry.record)
                except (ValueError, KeyError, TypeError) as error:
                    raise SearchError(f"{self._journal.path}, line {position}: cannot be read: {error}") from None
        return past

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except DamagedLineError as error:
            raise SearchError(
                f"{error}, so what follows it cannot be trusted; start a new search under another name"
            ) from None

    def read_seconds(self) -> float:
        """Seconds that earlier launches ran, to within a few."""
        try:
            return float(json.loads(self._clock.read_text())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def write_seconds(self, seconds: float) -> None:
        write_atomically(self._clock, json.dumps({"seconds": round(seconds, 3)}))


class Clock:
    """Seconds of all launches together, kept in the search's directory every few seconds."""

    EVERY = 2.0

    def __init__(self, folder: SearchFolder) -> None:
        self._folder, self._before, self._since = folder, folder.read_seconds(), time.monotonic()
        self._written = self._since

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._since

    def tick(self, force: bool = False) -> None:
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
            record = TrialRecord(**{**line, "changes": tuple(line["changes"])})
            if record.number not in past.started:
                raise ValueError(f"trial {record.number} ended and was never started")
            past.ended[record.number] = record
            past.order = [one for one in past.order if one != ("ended", record.number)] + [("ended", record.number)]
        case "again":
            past.ended.pop(int(line["number"]), None)
            past.retried.add(int(line["number"]))
            past.order = [one for one in past.order if one != ("ended", int(line["number"]))]
        case "known":
            _need_objects(line, "point")
            past.warm_start.append(WarmStartPoint(line["point"], line["figures"], line["origin"]))
        case "extended":
            past.extended += int(line["trials"])
        case _:
            raise ValueError(f"unknown event {event!r}")


def _need_objects(line: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if not isinstance(line[key], Mapping):
            raise ValueError(f"{key} is no object")
