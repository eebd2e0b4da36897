"""A small store of recordings of different lengths, and the configuration of a training on their windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spikefleet.config.recipes import parse_config
from spikefleet.config.schema import Config
from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from support.event_arrays import random_events

SENSOR = (8, 8)
WINDOW_US = 10_000
LENGTHS = (1, 4, 2, 3, 5, 2, 4, 1, 3)
"""Windows of the recordings of each split."""
EVENTS_A_WINDOW = 120


def recording(number: int, windows: int) -> EventArrays:
    """Random events, the more the higher the number, until just before the end of the last window."""
    return random_events((EVENTS_A_WINDOW + 20 * number) * windows, SENSOR, WINDOW_US * windows, number)


def write_streams(out: Path, replaced: dict[int, EventArrays] | None = None) -> Store:
    """Write the store; of some recordings other events."""
    names = tuple("abc")
    events = EventFormat.of(SENSOR)
    with EventStoreWriter(out, source="event_folder", class_names=names, events=events, options={}) as writer:
        for offset, split in enumerate(("train", "val", "test")):
            given = []
            for number, windows in enumerate(LENGTHS):
                shown = (replaced or {}).get(number, recording(number + 100 * offset, windows))
                given.append(SourceRecording([shown], number % 3, name=str(number), t0=0, duration=WINDOW_US * windows))
            writer.write_recordings(split, given)
        writer.commit()
    return Store.open(out)


def write_box_streams(out: Path) -> Store:
    """Write three splits of three recordings of 32 x 32 pixels, 300 ms, with boxes at 100, 200 and 300 ms."""
    sensor = (32, 32)
    with EventStoreWriter(
        out, source="gen1", class_names="ab", category_ids=[0, 1], events=EventFormat.of(sensor), options={}
    ) as writer:
        for offset, split in enumerate(("train", "val", "test")):
            given = []
            for number in range(3):
                random = np.random.default_rng(10 * offset + number)
                times = np.array([100_000, 100_000, 200_000, 300_000])
                boxes = np.concatenate([random.integers(0, 16, (4, 2)), random.integers(8, 16, (4, 2))], 1).astype(
                    float
                )
                frames = LabelFrames.of_objects(times, boxes, np.array([0, 1, 0, 1]), np.arange(4))
                events = random_events(3000, sensor, 300_000, 10 * offset + number)
                given.append(SourceRecording([events], frames=frames, t0=0, name=str(number)))
            writer.write_recordings(split, given)
        writer.commit()
    return Store.open(out)


def stream_config(**overrides: Any) -> Config:
    """Three classes, T=3, a network of one block; `train__epochs=3` overrides `train.epochs`."""
    plain: dict[str, Any] = {
        "recipe": "streams",
        "model": {
            "family": "sg_resnet", "stages": [1], "width": 0.0625, "stem": "cifar", "connection": "bsg",
            "decoder": "rate", "in_channels": 2, "num_classes": 3, "timesteps": 3, "neuron": {"kind": "lif"},
        },
        "data": {"source": "event_folder", "transform": {"kind": "events", "window": "10ms"}},
        "train": {"epochs": 2, "global_batch": 4, "eval_batch": 2, "stream": {}},
        "optim": {"lr": 0.05, "schedule": "constant"},
        "cluster": {"workers": 0},
        "tracking": {"every_steps": 1, "health_every_steps": 4},
        "registry": {"register_best": False},
    }  # fmt: skip
    for key, value in overrides.items():
        *sections, field = key.split("__")
        place = plain
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return parse_config(plain, "streams")
