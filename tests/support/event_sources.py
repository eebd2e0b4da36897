"""Tiny folders in the layouts of published sets of events, each recording with events of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.store.reader import Store
from support.event_files import made_events

Write = Callable[[Path, EventArrays], None]


def fill(folder: Path, names: list[str], write: Write, sensor: Sensor, seed: int = 0, events: int = 40) -> None:
    """Write recordings; the events of each are those of `seed` plus its place."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        write(folder / name, made_events(events, sensor, seed + place))


def stored(store: Store, split: str) -> list[EventArrays]:
    """The events of all recordings of a split, by the clock of their files."""
    recordings = store.recordings(split)
    found = []
    for row in range(len(recordings)):
        recording = recordings.recording(row)
        events = recording.events()
        found.append(EventArrays(events.t + recording.t0, events.x, events.y, events.p))
    return found


def same(one: EventArrays, other: EventArrays) -> bool:
    """Whether all events are equal."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in "txyp")
