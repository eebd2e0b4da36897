"""Small stores of events whose classes and boxes a network can learn, without the simulated camera."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from support.event_arrays import random_events

LENGTH = 100_000
CATEGORY_IDS = (11, 22)


def in_area(count: int, area: tuple[int, int, int, int], seed: int, length: int = LENGTH) -> EventArrays:
    """Events at random places of an area: left, top, width and height."""
    left, top, width, height = area
    events = random_events(count, (height, width), length, seed)
    return EventArrays(events.t, events.x + np.uint16(left), events.y + np.uint16(top), events.p)


def labelled_store(
    out: Path, source: str, sensor: Sensor, counts: Sequence[int], classes: int = 8, orientation: str = "as-read"
) -> Store:
    """Recordings of `LENGTH` us with as many events as `counts` says, in train, val and test; row n has class n mod K.

    Events of class k are in column k of as many columns.
    """
    names = tuple(map(str, range(classes)))
    kind = EventFormat.of(sensor, orientation)
    width = sensor[1] // classes
    with EventStoreWriter(out, source=source, class_names=names, events=kind, options={}) as writer:
        for number, split in enumerate(("train", "val", "test")):
            found = []
            for n, count in enumerate(counts):
                events = in_area(count, (width * (n % classes), 0, width, sensor[0]), 1000 * number + n)
                found.append(SourceRecording([events], n % classes, name=str(n), t0=0, duration=LENGTH + 7))
            writer.write_recordings(split, found)
        writer.commit()
    return Store.open(out)


def boxed_store(out: Path, source: str, sensor: Sensor, recordings: int, events: int = 300) -> Store:
    """Recordings of two label times, each with a box around the events of the half before it, and one out of sight."""
    names = ("small", "large")
    half = LENGTH // 2
    with EventStoreWriter(
        out, source=source, class_names=names, events=EventFormat.of(sensor), options={}, category_ids=CATEGORY_IDS
    ) as writer:
        for number, split in enumerate(("train", "val", "test")):
            random = np.random.default_rng(number)
            found = []
            for n in range(recordings):
                parts, boxes = [], []
                for k in range(2):
                    side = (8, 16)[(n + k) % 2]
                    left, top = (int(random.integers(0, length - side)) for length in (sensor[1], sensor[0]))
                    part = in_area(events, (left, top, side, side), 100 * n + k, half)
                    parts.append(EventArrays(part.t + k * half, part.x, part.y, part.p))
                    boxes += [[left, top, side, side], [sensor[1] + 5, 0, 9, 9]]
                times, kinds = np.repeat([half, LENGTH], 2), np.array([n % 2, 0, (n + 1) % 2, 0])
                frames = LabelFrames.of_objects(times, np.array(boxes, float), np.array(CATEGORY_IDS)[kinds])
                found.append(SourceRecording(parts, None, frames, name=str(n), t0=0, duration=LENGTH))
            writer.write_recordings(split, found)
        writer.commit()
    return Store.open(out)
