"""Writing a shard of events: words into a file as they come, then the shard from that file, hashed on the way."""

import hashlib
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.label_frames import OBJECT_FIELDS, LabelFrames
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.words import WordLayout
from spikefleet_pipelines.store.event_shards import FRAME_COLUMNS, OBJECT_COLUMNS, event_schema
from spikefleet_pipelines.store.event_spill import LATEST_US, SpilledRecording, WordSpill
from spikefleet_pipelines.store.event_statistics import EventStatistics
from spikefleet_pipelines.store.manifest import Shard

_PIECE = 1 << 22


@dataclass(frozen=True)
class SourceRecording:
    """A recording to write."""

    chunks: Iterable[EventArrays]
    """Its events, by any clock in us; a reader's chunks are written as they come."""
    label: int | None = None
    """Class index, for classification."""
    frames: LabelFrames | None = None
    """Objects, for detection; times by the same clock."""
    name: str = "recording"
    """For error messages, for example its file."""
    t0: int | None = None
    """Start by the same clock; None: the first event."""
    duration: int | None = None
    """us, where the format says it; None: to the last event."""


class WrittenEventShard(NamedTuple):
    """A shard that a process has written, for `EventStoreWriter.add_event_shard`; it can be pickled."""

    shard: Shard
    digests: list[bytes]
    """Of each recording, to find duplicates."""
    statistics: EventStatistics
    labels: NDArray[np.int64] | None
    frames: list[LabelFrames] | None


class EventShardWriter:
    """Writes one shard; a context manager that leaves only the complete shard behind.

    Args:
        path: of the shard.
        layout: the bits of a word.
        detection: whether recordings have frames instead of a label.
        outside: what becomes of events outside the sensor: "refuse" or "drop" (they are counted).
        empty: what becomes of recordings without events: "keep" or "drop" (they are counted).

    Attributes:
        statistics: of the recordings so far.
    """

    def __init__(
        self, path: Path, layout: WordLayout, detection: bool, *, outside: str = "refuse", empty: str = "keep"
    ) -> None:
        for name, value, allowed in (("outside", outside, ("refuse", "drop")), ("empty", empty, ("keep", "drop"))):
            if value not in allowed:
                raise StoreError(f"{name} is {value!r}, expected {allowed[0]!r} or {allowed[1]!r}")
        self.path = path
        self._spill_path = path.with_name(f".{path.name}.words")
        self._layout = layout
        self._detection = detection
        self._drop_empty = empty == "drop"
        self.statistics = EventStatistics.of(layout)
        self._spill = WordSpill(self._spill_path, layout, outside == "drop", self.statistics)
        self._rows: list[SpilledRecording] = []
        self._durations: list[int] = []
        self._labels: list[int] = []
        self._frames: list[LabelFrames] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spill.close()
        self._spill_path.unlink(missing_ok=True)
        if error is not None:
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """Bytes of the words so far."""
        return 4 * self._spill.words

    def add(self, recording: SourceRecording) -> None:
        """Write a recording; memory holds one chunk of its events.

        Raises:
            StoreError: its events or labels are invalid; nothing of it is kept.
        """
        if (recording.frames is None) == self._detection or (recording.label is None) != self._detection:
            raise StoreError(f"{recording.name}: a store holds either labels or boxes of all recordings")
        self._spill.begin(recording.name, recording.t0)
        counted = self.statistics.dropped
        try:
            for chunk in recording.chunks:
                self._spill.append(chunk)
            frames = self._checked_frames(recording)
            duration = self._duration(recording)
            if self._drop_empty and not self._spill.count:
                self.statistics.dropped_recordings += 1
                return
            row = self._spill.end()
        except BaseException:
            self._spill.drop()
            self.statistics.dropped = counted
            raise
        self._rows.append(row)
        self._durations.append(duration)
        self.statistics.counts.append(row.events)
        self.statistics.durations.append(duration)
        if frames is not None:
            self._frames.append(frames)
            self.statistics.add_labels(frames, row.last)
        elif recording.label is not None:
            self._labels.append(recording.label)

    def finish(self) -> WrittenEventShard:
        """Write the shard from the words and what belongs to them.

        Raises:
            StoreError: there is no recording.
        """
        if not self._rows:
            raise StoreError(f"shard {self.path} would have no recording")
        ticks = [row.ticks for row in self._rows]
        wide = any(part.dtype == np.uint64 for part in ticks)
        schema = event_schema(self._detection, wide)
        flat_ticks = np.concatenate(ticks).astype(np.uint64 if wide else np.uint32, copy=False)
        with self.path.open("wb") as file, _Words(self._spill_path, self._spill.words) as words:
            columns = [
                _large_list(schema.field("events").type, [row.events for row in self._rows], words.array),
                _large_list(schema.field("ticks").type, [len(part) for part in ticks], pa.array(flat_ticks)),
                pa.array([row.t0 for row in self._rows], pa.int64()),
                pa.array(self._durations, pa.int64()),
                *(_frame_arrays(self._frames) if self._detection else [pa.array(self._labels, pa.int64())]),
            ]
            batch = pa.record_batch(columns, schema=schema)
            sink = _HashingSink(file, words)
            with pa.PythonFile(sink, "w") as target, pa.ipc.new_file(target, schema) as writer:
                writer.write_batch(batch)
            del batch, columns
        shard = Shard(file=self.path.name, rows=len(self._rows), bytes=sink.size, sha256=sink.digest.hexdigest())
        return WrittenEventShard(
            shard,
            [row.digest for row in self._rows],
            self.statistics,
            None if self._detection else np.array(self._labels, np.int64),
            self._frames if self._detection else None,
        )

    def _duration(self, recording: SourceRecording) -> int:
        least = self._spill.last + 1
        if recording.duration is None:
            return least
        if recording.duration < least:
            raise StoreError(
                f"{recording.name}: duration is {recording.duration} us, but its last event is {least - 1} us after "
                "its start; check the time unit"
            )
        return recording.duration

    def _checked_frames(self, recording: SourceRecording) -> LabelFrames | None:
        """The frames of a recording with times from its start."""
        if recording.frames is None:
            return None
        frames = recording.frames.from_start(self._spill.t0)
        if (np.diff(frames.times) <= 0).any() or len(frames.offsets) != len(frames) + 1:
            raise StoreError(f"{recording.name}: label times are not strictly increasing; group the boxes by time")
        end = max(self._spill.last, (recording.duration or 0) - 1)
        if len(frames) and (frames.times[0] < 0 or frames.times[-1] > end + LATEST_US):
            wrong = frames.times[0] if frames.times[0] < 0 else frames.times[-1]
            raise StoreError(
                f"{recording.name}: a label is {wrong:,} us after the start, expected 0 to {end + LATEST_US:,} (1 s "
                "after the last event); check that boxes and events are of the same recording"
            )
        return frames


class _Words:
    """The file of words as an Arrow array that is not read into memory."""

    def __init__(self, path: Path, count: int) -> None:
        self._map: mmap.mmap | None = None
        if count:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 4 * count, access=mmap.ACCESS_READ)
            self.array = pa.Array.from_buffers(pa.uint32(), count, [None, pa.py_buffer(self._map)])
        else:
            self.array = pa.array([], pa.uint32())
        self.size = 4 * count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self.array  # Arrow holds the map until then

    def forget(self, start: int, length: int) -> None:
        """Drop pages that were written from this process's memory; they are still in the file."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)


class _HashingSink:
    """A file for Arrow that hashes what is written to it."""

    def __init__(self, file: Any, words: _Words) -> None:
        self._file = file
        self._words = words
        self.digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        if not len(data):
            return 0
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self._file.write(piece)
            self.digest.update(piece)
            if len(view) == self._words.size:
                self._words.forget(start, len(piece))
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        self.closed = True


def _offsets(counts: Sequence[int], kind: type[np.int64] | type[np.int32]) -> NDArray[Any]:
    return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(kind)


def _large_list(kind: pa.DataType, counts: Sequence[int], values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(_offsets(counts, np.int64)), values, type=kind)


def _frame_arrays(frames: Sequence[LabelFrames]) -> list[pa.Array]:
    """The columns of label times and objects."""

    def flat(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(one, name) for one in frames])

    def lists(counts: Sequence[int], values: pa.Array, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(_offsets(counts, np.int32)), values, type=kind)

    objects = [len(one.boxes) for one in frames]
    columns = [
        lists([len(one) for one in frames], pa.array(flat("times"), pa.int64()), FRAME_COLUMNS["frame_t"]),
        lists([len(one) + 1 for one in frames], pa.array(flat("offsets"), pa.int32()), FRAME_COLUMNS["frame_offsets"]),
    ]
    for field, kind in zip(OBJECT_FIELDS, OBJECT_COLUMNS.values(), strict=True):
        if field == "boxes":
            numbers = pa.array(flat("boxes").reshape(-1), pa.float64())
            values = pa.FixedSizeListArray.from_arrays(numbers, type=kind.value_type)
        else:
            values = pa.array(flat(field), kind.value_type)
        columns.append(lists(objects, values, kind))
    return columns
