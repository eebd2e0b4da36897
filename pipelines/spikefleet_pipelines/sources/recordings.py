"""Files of recordings of an event camera, converted to shards in this process or as Ray tasks.

Files are divided into shards by their sizes alone, so that a store does not depend on the number of processes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.events.readers.finding import read_recording
from spikefleet_pipelines.events.readers.labelled_boxes import read_boxes
from spikefleet_pipelines.events.readers.ncaltech101_boxes import SACCADES_US, read_annotation
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.events.readers.reader import EventReader, ReadAudit
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.words import WordLayout
from spikefleet_pipelines.sources.encoded_files import shown_path
from spikefleet_pipelines.sources.ray_tasks import run_tasks, runs_here
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import EventShardWriter, SourceRecording, WrittenEventShard
from spikefleet_pipelines.store.event_statistics import EventStatistics
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.manifest import SkippedFile

SHARD_FILE_BYTES = 256 << 20
"""Bytes of files after which a shard is complete: many small recordings, or one large one."""

# How much later than one after it an event may be in a file: `event_spill.LATEST_US`.
_LATE_US = 1_000_000


@dataclass(frozen=True)
class RecordingFile:
    """One recording to store: a file, or the events between two times in it.

    Attributes:
        path: of the file.
        label: class index, for classification, and for detection where the file of boxes has no classes.
        boxes: file of its boxes, for detection: NAME_bbox.npy, or an annotation of N-Caltech101 (.bin).
        between: start and end in us by the file's clock, of a recording that is a part of the file.
    """

    path: Path
    label: int | None = None
    boxes: Path | None = None
    between: tuple[int, int] | None = None


@dataclass(frozen=True)
class RecordingContents:
    """The recordings of a data set; they are read when the store is written.

    Attributes:
        class_names: in the order of the class indices.
        splits: recordings of each split, in their order.
        events: format of the store.
        read_options: of the files; `sensor` is that of `events`.
        empty: "keep" or "drop" recordings without events.
        category_ids: of a detection data set, the id of each class.
        stand_ins: aliases of splits.
        unused: number of files that are not used, by reason.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, Sequence[RecordingFile]]
    events: EventFormat
    read_options: ReadOptions
    empty: str = "keep"
    category_ids: tuple[int, ...] | None = None
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)

    def write(self, writer: EventStoreWriter, progress: Progress, parallel: int | None) -> None:
        """Write all splits; see `Contents`. Raises SourceError or StoreError, naming the file that is damaged."""
        unused = Counter(self.unused)
        jobs = [
            _Job(
                split,
                writer.directory / writer.shard_name(split, number),
                files,
                self.read_options,
                self.events.layout,
                self.category_ids,
                self.empty,
                writer.skip_bad,
            )
            for split, every in self.splits.items()
            for number, files in enumerate(_parts(every))
        ]
        total, done = sum(len(job.files) for job in jobs), 0

        def one_more() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        here = runs_here(parallel, total)
        convert = partial(_convert, report=one_more) if here else _convert
        with closing(run_tasks(convert, jobs, parallel, total)) as results:
            for job, written in zip(jobs, results, strict=True):
                writer.skipped += written.skipped
                unused += written.flaws
                if written.shard is None:
                    writer.add_statistics(job.split, written.statistics)
                else:
                    writer.add_event_shard(job.split, written.shard)
                if not here:
                    done += len(job.files)
                    progress(done, total)
        writer.unused = dict(unused)


def open_recording(path: Path, options: ReadOptions) -> EventReader:
    """Open a recording whose size is known.

    Raises:
        SourceError: it cannot be read, is no regular file (which could wait forever), or has no size.
    """
    if path.exists() and not path.is_file():
        raise SourceError(f"{path} is not a regular file; replace or remove it")
    reader = read_recording(path, options)
    reader.require_sensor()
    return reader


@dataclass(frozen=True)
class _Job:
    """The recordings of one shard."""

    split: str
    out: Path
    files: Sequence[RecordingFile]
    read_options: ReadOptions
    layout: WordLayout
    category_ids: tuple[int, ...] | None
    empty: str
    skip_bad: bool


@dataclass(frozen=True)
class _Written:
    shard: WrittenEventShard | None
    """None where every recording was left out."""
    statistics: EventStatistics
    skipped: list[SkippedFile]
    flaws: Counter[str]


def _parts(files: Sequence[RecordingFile]) -> list[list[RecordingFile]]:
    """Divide recordings into shards by the sizes of their files, which are 0 where they cannot be read."""
    parts: list[list[RecordingFile]] = []
    filled = SHARD_FILE_BYTES
    for file in files:
        if filled >= SHARD_FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(file)
        filled += file.path.stat().st_size if file.path.is_file() else 0
    return parts


def _convert(job: _Job, report: Callable[[], None] | None = None) -> _Written:
    skipped: list[SkippedFile] = []
    flaws: Counter[str] = Counter()
    with EventShardWriter(job.out, job.layout, job.category_ids is not None, empty=job.empty) as shard:
        for file in job.files:
            try:
                found = _add(job, file, shard)
            except (SourceError, StoreError) as error:
                if not job.skip_bad:
                    raise
                skipped.append(SkippedFile(split=job.split, file=shown_path(file.path), reason=str(error)))
            else:
                shard.statistics.dropped += found.outside
                flaws += _flaws(found)
            if report is not None:
                report()
        written = shard.finish() if len(shard) else None
    return _Written(written, shard.statistics, skipped, flaws)


def _add(job: _Job, file: RecordingFile, shard: EventShardWriter) -> ReadAudit:
    """Read a recording into a shard; return what was left out of the whole file."""
    reader = open_recording(file.path, job.read_options)
    name = shown_path(file.path)
    if file.between is not None:
        start, end = file.between
        part = f"{name} from {start:,} to {end:,} us"
        shard.add(SourceRecording(_between(reader, start, end), file.label, name=part, t0=start, duration=end - start))
        return ReadAudit()  # the file's flaws belong to several recordings, or to none
    if file.boxes is None:
        shard.add(SourceRecording(reader, file.label, name=name))
    else:
        frames = _frames(file, file.boxes, job.category_ids or ())
        # Times of boxes count from the clock's start, also where no event is that early.
        shard.add(SourceRecording(reader, None, frames, name=name, t0=0))
    return reader.audit


def _between(reader: EventReader, start: int, end: int) -> Iterator[EventArrays]:
    """The events with start <= t < end; a file is read only as far as such events may be."""
    for chunk in reader:
        yield chunk.select((chunk.t >= start) & (chunk.t < end))
        if len(chunk) and int(chunk.t[-1]) >= end + 2 * _LATE_US:
            return


def _frames(file: RecordingFile, path: Path, categories: Sequence[int]) -> LabelFrames:
    if file.label is not None:
        box = read_annotation(path).box
        return LabelFrames.of_objects(
            np.array([SACCADES_US]), np.array([box], np.float64), np.array([categories[file.label]])
        )
    labelled = read_boxes(path)
    unknown = ~np.isin(labelled.class_id, categories)
    if unknown.any():
        row = int(np.argmax(unknown))
        raise SourceError(
            f"{path}: the box at {labelled.t[row]:,} us has class {labelled.class_id[row]}, expected one of "
            f"{', '.join(map(str, categories))}; correct or remove it"
        )
    return LabelFrames.of_objects(labelled.t, labelled.boxes.astype(np.float64), labelled.class_id, labelled.track_id)


def _flaws(found: ReadAudit) -> Counter[str]:
    return +Counter(
        {
            "bytes after the last whole event of a file": found.cut_bytes,
            "events that are marked as invalid or have no time, row or base": found.invalid,
        }
    )
