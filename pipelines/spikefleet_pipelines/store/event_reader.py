"""Reading a store of events: recordings as views of the memory map, random access by row and by time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.events.windows import StoredRecording
from spikefleet_pipelines.store.annotations import Annotations, Moment, class_indices
from spikefleet_pipelines.store.event_shards import EventShardColumns, open_event_shard
from spikefleet_pipelines.store.manifest import Manifest


class EventSplit:
    """The recordings of one split; a row is a recording.

    It pickles as its paths, so that spawned loader processes map the files again.

    Attributes:
        layout: the bits of a word.
    """

    def __init__(self, name: str, location: str, manifest: Manifest, files: Sequence[Path]) -> None:
        if manifest.events is None:
            raise StoreError(f"{location} holds images, not recordings of events; read it with Store.split({name!r})")
        self.name = name
        self.location = location
        self.manifest = manifest
        self.layout = manifest.events.layout
        self._files = tuple(files)
        shards = manifest.shards[name]
        self._shards = [
            open_event_shard(file, shard, self.layout, len(manifest.class_names), manifest.category_ids)
            for file, shard in zip(files, shards, strict=True)
        ]
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        frames = [len(one) for shard in self._shards for one in shard.frames or ()]
        self._first_frames = np.cumsum([0, *frames])

    def __reduce__(self) -> tuple[Any, ...]:
        return EventSplit, (self.name, self.location, self.manifest, self._files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        return self.manifest.class_names

    @property
    def is_detection(self) -> bool:
        """Whether recordings have `frames`; otherwise they have `labels`."""
        return self.manifest.task == "detection"

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each recording, [n].

        Raises:
            StoreError: this is a detection store.
        """
        if self.is_detection:
            raise StoreError(f"split {self.name!r} of {self.location} is for detection: it has frames and no labels")
        parts = [shard.labels for shard in self._shards if shard.labels is not None]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def label(self, row: int) -> int:
        """Class of one recording. Raises StoreError for a detection store."""
        shard, inside = self._place(row)
        return int(self.labels[row]) if shard.labels is None else int(shard.labels[inside])

    def recording(self, row: int) -> StoredRecording:
        """Return one recording; its words and index are views into the mapped shard."""
        shard, inside = self._place(row)
        return StoredRecording(
            self.layout,
            shard.words[shard.word_offsets[inside] : shard.word_offsets[inside + 1]],
            shard.ticks[shard.tick_offsets[inside] : shard.tick_offsets[inside + 1]],
            int(shard.t0[inside]),
            int(shard.durations[inside]),
        )

    def frames(self, row: int) -> LabelFrames:
        """Return the objects of one recording, views into the mapped shard; times count from its start.

        Raises:
            StoreError: this is a classification store.
        """
        shard, inside = self._place(row)
        if shard.frames is None:
            raise StoreError(f"split {self.name!r} of {self.location} is for classification: it has no frames")
        return shard.frames[inside]

    def annotations(self, row: int, frame: int) -> Annotations:
        """Return the objects at one label time of a recording, as those of an image with the size of the sensor.

        `image_id` is the number of the frame in the split.

        Raises:
            StoreError: this is a classification store.
        """
        frames = self.frames(row)
        if not 0 <= frame < len(frames):
            raise IndexError(f"frame {frame} is outside recording {row}, expected 0 to {len(frames) - 1}")
        objects = slice(int(frames.offsets[frame]), int(frames.offsets[frame + 1]))
        categories = frames.category_ids[objects]
        labels, _ = class_indices(categories, self.manifest.category_ids or ())
        return Annotations(
            int(self._first_frames[row]) + frame,
            self.layout.height,
            self.layout.width,
            frames.boxes[objects],
            categories,
            labels,
            frames.crowd[objects],
            frames.areas[objects],
            frames.ids[objects],
            Moment(row, int(frames.times[frame]), frames.still_us(frame)),
        )

    def _place(self, row: int) -> tuple[EventShardColumns, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside split {self.name!r}, expected 0 to {len(self) - 1}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._shards[number], row - int(self._starts[number])
