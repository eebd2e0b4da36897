"""Writing a store of events: recordings in this process, or shards that other processes wrote."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.store.event_format import EventAudit, EventFormat
from spikefleet_pipelines.store.event_shard_writer import EventShardWriter, SourceRecording, WrittenEventShard
from spikefleet_pipelines.store.event_shards import frame_columns
from spikefleet_pipelines.store.event_statistics import EventStatistics
from spikefleet_pipelines.store.manifest import SkippedFile
from spikefleet_pipelines.store.writer import StoreWriter

EVENT_SHARD_BYTES = 2 << 30


class EventStoreWriter(StoreWriter):
    """Collects the splits of a set of recordings; see `StoreWriter`.

    Args:
        out: directory of the store.
        source: name of the source.
        class_names: in the order of the class indices.
        events: format of the events.
        options: recorded in the manifest.
        overwrite: replace an existing store.
        shard_bytes: words after which a shard is complete; a recording is never divided.
        category_ids: of a detection store, the id of each class in the boxes; None for classification.
        stand_ins: aliases of splits, as for `StoreWriter`.
        name: of the data set, as for `StoreWriter`.
        otherwise: as for `StoreWriter`.
        skip_bad: as for `StoreWriter`.
        outside: "refuse" or "drop" events outside the sensor (those are counted).
        empty: "keep" or "drop" recordings without events (those are counted).
    """

    def __init__(
        self,
        out: Path,
        *,
        source: str,
        class_names: Sequence[str],
        events: EventFormat,
        options: dict[str, JsonValue],
        overwrite: bool = False,
        shard_bytes: int = EVENT_SHARD_BYTES,
        category_ids: Sequence[int] | None = None,
        stand_ins: Mapping[str, str] | None = None,
        name: str | None = None,
        otherwise: str | None = None,
        skip_bad: bool = False,
        outside: str = "refuse",
        empty: str = "keep",
    ) -> None:
        super().__init__(
            out,
            source=source,
            class_names=class_names,
            image=None,
            events=events,
            options=options,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            category_ids=category_ids,
            stand_ins=stand_ins,
            name=name,
            otherwise=otherwise,
            skip_bad=skip_bad,
        )
        self.layout = events.layout
        self.outside, self.empty = outside, empty
        self._statistics: dict[str, EventStatistics] = {}

    def open_shard(self, split: str, number: int) -> EventShardWriter:
        """Return a writer of one shard, also for another process; `number` counts from 0."""
        return EventShardWriter(
            self.directory / self.shard_name(split, number),
            self.layout,
            self.category_ids is not None,
            outside=self.outside,
            empty=self.empty,
        )

    def write_recordings(self, split: str, recordings: Iterable[SourceRecording]) -> None:
        """Add recordings to a split, in as many shards as needed; memory holds one chunk of events.

        Args:
            split: name of the split.
            recordings: to write.

        Raises:
            StoreError: events, a label or boxes are invalid; the message names the recording. With `skip_bad` it is
                left out instead, as one whose reader raises SourceError.
        """
        left = iter(recordings)
        recording = next(left, None)
        while recording is not None:
            with self.open_shard(split, len(self._shards.get(split, ()))) as shard:
                while recording is not None and (not len(shard) or shard.bytes < self.shard_bytes):
                    self._add(split, shard, recording)
                    recording = next(left, None)
                written = shard.finish() if len(shard) else None
                if written is None:
                    self.add_statistics(split, shard.statistics)
            if written is not None:
                self.add_event_shard(split, written)

    def add_event_shard(self, split: str, written: WrittenEventShard) -> None:
        """Add a shard that this or another process wrote to `directory`.

        Raises:
            StoreError: the file is missing, or a label, box or category is invalid.
        """
        targets = written.labels
        if written.frames is not None:
            self.add_shard(split, written.shard, frame_columns(written.frames, self.layout), written.digests)
        elif targets is not None:
            self.add_shard(split, written.shard, targets, written.digests)
        self.add_statistics(split, written.statistics)

    def _add(self, split: str, shard: EventShardWriter, recording: SourceRecording) -> None:
        try:
            shard.add(recording)
        except (SourceError, StoreError) as error:
            if not self.skip_bad:
                raise
            self.skipped.append(SkippedFile(split=split, file=recording.name, reason=str(error)))

    def add_statistics(self, split: str, statistics: EventStatistics) -> None:
        """Add what was counted for a shard of which no recording is left; `add_event_shard` does it for others."""
        self._statistics.setdefault(split, EventStatistics.of(self.layout)).merge(statistics)

    def _event_audit(self) -> dict[str, EventAudit]:
        return {split: self._statistics[split].audit(self.layout) for split in self._shards}
