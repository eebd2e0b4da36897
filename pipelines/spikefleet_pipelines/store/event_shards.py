"""A shard of events: an Arrow IPC file with one record batch, a row for each recording, read by memory mapping.

Columns: `events` (large list of uint32: the words), `ticks` (large list of uint32, or uint64 from 2^32 events on: the
index), `t0` and `duration` (int64, us), and for classification `label` (int64). For detection instead, of each
recording: the lists `frame_t` (int64, label times from t0) and `frame_offsets` (int32, first object of each time), and
the lists of its objects as in a shard of images, with `track_id`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.events.words import Ticks, WordLayout
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.manifest import Shard
from spikefleet_pipelines.store.shards import check_annotations


def _list(values: pa.DataType, large: bool = False) -> pa.DataType:
    item = pa.field("item", values, nullable=False)
    return pa.large_list(item) if large else pa.list_(item)


FRAME_COLUMNS = {"frame_t": _list(pa.int64()), "frame_offsets": _list(pa.int32())}
"""Columns of the label times of a recording."""
OBJECT_COLUMNS = {
    "boxes": _list(pa.list_(pa.field("item", pa.float64(), nullable=False), 4)),
    "category_id": _list(pa.int64()),
    "iscrowd": _list(pa.bool_()),
    "area": _list(pa.float64()),
    "annotation_id": _list(pa.int64()),
    "track_id": _list(pa.int64()),
}
"""Columns of its objects, in the order of `OBJECT_FIELDS`."""


def event_schema(detection: bool, wide: bool = False) -> pa.Schema:
    """Return the Arrow schema of a shard.

    Args:
        detection: whether rows have boxes instead of a label.
        wide: whether the index has 64 bits.
    """
    columns: dict[str, pa.DataType] = {
        "events": _list(pa.uint32(), large=True),
        "ticks": _list(pa.uint64() if wide else pa.uint32(), large=True),
        "t0": pa.int64(),
        "duration": pa.int64(),
    }
    columns |= {**FRAME_COLUMNS, **OBJECT_COLUMNS} if detection else {"label": pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


@dataclass(frozen=True)
class EventShardColumns:
    """Views into a mapped shard; nothing is copied until a window is read."""

    words: NDArray[np.uint32]
    """Of all recordings, one after the other."""
    word_offsets: NDArray[np.int64]
    """[n + 1]."""
    ticks: Ticks
    tick_offsets: NDArray[np.int64]
    """[n + 1]."""
    t0: NDArray[np.int64]
    durations: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    """Class of each recording [n]; None for detection."""
    frames: tuple[LabelFrames, ...] | None
    """Of each recording; None for classification."""


def frame_columns(frames: Sequence[LabelFrames], layout: WordLayout) -> AnnotationColumns:
    """The frames of several recordings as images of the sensor's size, numbered from 0."""
    count = sum(map(len, frames))
    return AnnotationColumns(
        np.arange(count),
        np.full(count, layout.height, np.int32),
        np.full(count, layout.width, np.int32),
        np.concatenate([[0], *(np.diff(one.offsets) for one in frames)]).cumsum().astype(np.int32),
        *(
            np.concatenate([getattr(one, name) for one in frames])
            for name in ("boxes", "category_ids", "crowd", "areas", "ids")
        ),
    )


def open_event_shard(
    path: Path, shard: Shard, layout: WordLayout, classes: int, category_ids: Sequence[int] | None = None
) -> EventShardColumns:
    """Map a shard into memory.

    Args:
        path: of the file.
        shard: its entry in the manifest.
        layout: the bits of a word.
        classes: number of classes.
        category_ids: the manifest's category id of each class; None for classification.

    Raises:
        StoreError: its columns, rows, index, labels or frames do not match the manifest.
    """
    detection = category_ids is not None
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            schema, batches = reader.schema, reader.num_record_batches
            batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, IndexError) as error:
        raise StoreError(f"shard {path} cannot be read: {error}; prepare the store again") from error
    known = any(schema.equals(event_schema(detection, wide)) for wide in (False, True))
    if not known or batches != 1 or batch.num_rows != shard.rows or any(map(_has_null, batch.columns)):
        raise StoreError(
            f"shard {path} holds {batch.num_rows} rows of ({', '.join(schema.names)}) in {batches} record batches, "
            f"expected {shard.rows} rows of ({', '.join(event_schema(detection).names)}) in one; prepare the store "
            "again"
        )
    words, ticks = batch.column("events"), batch.column("ticks")
    columns = EventShardColumns(
        words.values.to_numpy(),
        words.offsets.to_numpy(),
        ticks.values.to_numpy(),
        ticks.offsets.to_numpy(),
        batch.column("t0").to_numpy(),
        batch.column("duration").to_numpy(),
        None if detection else batch.column("label").to_numpy(),
        _read_frames(path, batch) if detection else None,
    )
    _check(path, columns, classes)
    if category_ids is not None and columns.frames:
        check_annotations(f"shard {path}", frame_columns(columns.frames, layout), category_ids)
    return columns


def _has_null(column: Any) -> bool:
    """Whether a column, or a list in it, lacks a value."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(column.null_count) or (is_list and _has_null(column.values))


def _check(path: Path, columns: EventShardColumns, classes: int) -> None:
    """Raises StoreError for an index that does not fit the events, or a label that is no class."""
    starts, stops = columns.tick_offsets[:-1], columns.tick_offsets[1:]
    fits = stops > starts
    if fits.all():
        fits &= (columns.ticks[starts] == 0) & (columns.ticks[stops - 1] == np.diff(columns.word_offsets))
        falls = np.flatnonzero(columns.ticks[1:] < columns.ticks[:-1]) + 1
        fits[np.searchsorted(columns.tick_offsets, falls[~np.isin(falls, starts)], side="right") - 1] = False
    if not fits.all():
        raise StoreError(
            f"shard {path} row {int(fits.argmin())}: its index does not fit its events; prepare the store again"
        )
    if columns.labels is not None:
        outside = (columns.labels < 0) | (columns.labels >= classes)
        if outside.any():
            row = int(outside.argmax())
            raise StoreError(
                f"shard {path} row {row}: label is {columns.labels[row]}, expected 0 to {classes - 1}; prepare the "
                "store again"
            )


def _read_frames(path: Path, batch: pa.RecordBatch) -> tuple[LabelFrames, ...]:
    per_frame = [batch.column(name) for name in FRAME_COLUMNS]
    objects = [batch.column(name) for name in OBJECT_COLUMNS]
    starts = [column.offsets.to_numpy() for column in per_frame]
    place = objects[0].offsets.to_numpy()
    flat, values = [_values(column) for column in per_frame], [_values(column) for column in objects]
    frames = []
    for row in range(batch.num_rows):
        here = [each[start[row] : start[row + 1]] for each, start in zip(flat, starts, strict=True)]
        chosen = slice(int(place[row]), int(place[row + 1]))
        fits = len(here[1]) == len(here[0]) + 1 and here[1][0] == 0 and here[1][-1] == chosen.stop - chosen.start
        if not fits or (np.diff(here[1]) < 0).any() or (np.diff(here[0]) <= 0).any():
            raise StoreError(f"shard {path} row {row}: its label times do not fit its objects; prepare the store again")
        frames.append(LabelFrames(here[0], here[1], *(each[chosen] for each in values)))
    if any(not np.array_equal(column.offsets.to_numpy(), place) for column in objects):
        raise StoreError(f"shard {path}: the numbers of boxes and of their fields differ; prepare the store again")
    return tuple(frames)


def _values(column: Any) -> NDArray[Any]:
    values = column.values
    if pa.types.is_fixed_size_list(values.type):
        return values.values.to_numpy().reshape(-1, 4)
    found: NDArray[Any] = values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))
    return found
