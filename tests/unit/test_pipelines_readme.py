"""The examples in the README of pipelines run as they stand, one after another."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikefleet_pipelines.events.binning_config import BinningConfig
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.representations import bin_events
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.sources import Source, SourceOptions, list_sources, prepare, register_source, registry
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig
from support.event_stores import labelled_store

EVENT_NAMES = (BinningConfig, EventArrays, EventFormat, EventStoreWriter, SourceRecording, bin_events)
README = Path(__file__).parents[2] / "pipelines" / "README.md"


class MineOptions(SourceOptions):
    """What the README leaves to the reader."""


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_SOURCES", dict(registry._SOURCES))
    prepare("scenes", None, Path("stores/mine"), train=8, val=2, test=2)
    loading, detection, samples, events, source = re.findall(
        r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Any] = {
        value.__name__: value
        for value in (BatchLoader, EpochPlan, Path, Source, Store, TransformConfig, DetectionTransformConfig, prepare)
    }
    exec(loading, names)
    assert names["batch"].images.shape[1:] == (1, 8, 8)
    assert names["batch"].global_count == len(names["train"]) % 128
    names["plan"] = EpochPlan(samples=8, global_batch=4)
    exec(detection, names)
    assert names["batch"].images.shape == (4, 3, 640, 640)
    labelled_store(Path("stores/saccades"), "saccades", (12, 16), [50] * 8)
    of_events = names | {"EventsTransformConfig": EventsTransformConfig}
    exec(samples, of_events)
    assert of_events["batch"].network_input.shape == (8, 4, 2, 12, 16)
    names |= {one.__name__: one for one in EVENT_NAMES} | {"np": np, "places": np.arange(1000, dtype=np.uint16)}
    exec(events, names)
    assert names["frames"].sum() == len(names["window"]) == 333
    exec(source, names | {"MineOptions": MineOptions, "register_source": register_source})
    assert list_sources()["mine"] == "my images, one CSV file of labels"
