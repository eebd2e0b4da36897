"""Taking a split out of the training recordings of a store of events: what they are known by, and copying them."""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.windows import StoredRecording
from spikefleet_pipelines.store.event_reader import EventSplit
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter

_PART = 1 << 20


def recording_digests(split: EventSplit) -> list[bytes]:
    """Compute a hash of the events of each recording: those of equal recordings of one sensor are equal."""
    return [_digest(split.recording(row)) for row in range(len(split))]


def timeless_digests(split: EventSplit) -> list[bytes]:
    """Compute a hash of the events of each recording without their times: of its counts by pixel and polarity.

    Recordings with the same events at other times, as parts that were put together in another order, have equal ones.
    """
    cells = 1 << split.layout.address_bits
    return [
        hashlib.blake2b(_counts(split.recording(row), cells).data, digest_size=16).digest() for row in range(len(split))
    ]


def recording_classes(split: EventSplit) -> list[NDArray[np.int64]]:
    """Return the classes of each recording: its label, or those of the objects at all of its label times."""
    if not split.is_detection:
        return [np.array([label]) for label in split.labels.tolist()]
    ids = np.array(split.manifest.category_ids or (), np.int64)
    order = np.argsort(ids)
    return [
        order[np.searchsorted(ids[order], split.frames(row).category_ids)].astype(np.int64) for row in range(len(split))
    ]


def copy_recordings(source: EventSplit, name: str, rows: NDArray[np.int64], writer: EventStoreWriter) -> None:
    """Write recordings of a split into another store, in their order; memory holds one chunk of events.

    Args:
        source: the split.
        name: of the split that they become part of.
        rows: of the recordings.
        writer: of a store for the same sensor and classes.
    """
    writer.write_recordings(name, (_recorded(source, row) for row in rows.tolist()))


def _recorded(source: EventSplit, row: int) -> SourceRecording:
    recording = source.recording(row)
    return SourceRecording(
        _chunks(recording),
        None if source.is_detection else source.label(row),
        source.frames(row).from_start(-recording.t0) if source.is_detection else None,
        f"recording {row} of split {source.name!r} of {source.location}",
        recording.t0,
        recording.duration,
    )


def _chunks(recording: StoredRecording) -> Iterator[EventArrays]:
    """The events by the clock of the raw file."""
    for start in range(0, len(recording), _PART):
        part = recording.layout.unpack(recording.words, recording.ticks, start, min(start + _PART, len(recording)))
        yield EventArrays(part.t + recording.t0, part.x, part.y, part.p)


def _digest(recording: StoredRecording) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(recording), _PART):
        digest.update(recording.words[start : start + _PART].data)
    digest.update(recording.ticks.astype(np.uint64).data)
    return digest.digest()


def _counts(recording: StoredRecording, cells: int) -> NDArray[np.int64]:
    counts = np.zeros(cells, np.int64)
    for start in range(0, len(recording), _PART):
        counts += np.bincount(recording.words[start : start + _PART] & recording.layout.address_mask, minlength=cells)
    return counts
