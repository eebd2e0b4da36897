"""Conversion of image files to shards: each file is decoded once to find broken ones, and its bytes are stored."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.packed_images import ImagePlace, read_encoded
from spikefleet_pipelines.sources.ray_tasks import run_tasks
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.manifest import ImageFormat, Shard, SkippedFile
from spikefleet_pipelines.store.shards import Targets, write_shard
from spikefleet_pipelines.store.writer import StoreWriter, content_digests

ENCODED = ImageFormat(encoding="encoded")

CheckSize = Callable[[Any, int, int, int], None]
"""Checks the size of a decoded image: (targets, row, height, width); raises ValueError "is ..." of the file."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    split: str
    out: Path
    paths: tuple[ImagePlace, ...]
    targets: Targets
    """Labels [n], or the objects of the n images."""
    advice: str
    """What to do about a bad file, for error messages."""
    skip_bad: bool
    check_size: CheckSize | None = None


@dataclass(frozen=True)
class _Written:
    shard: Shard | None
    """None if no image of the job could be read."""
    digests: list[bytes]
    rows: NDArray[np.int64]
    """Rows of the job that are in the shard, ascending."""
    skipped: tuple[SkippedFile, ...]


def write_shards(
    writer: StoreWriter, jobs: Sequence[ShardJob], progress: Progress, parallel: int | None
) -> Generator[tuple[ShardJob, NDArray[np.int64], Shard, list[bytes]], None, None]:
    """Write shards in parallel and add the files that were left out to `writer.skipped`.

    Args:
        writer: of the store.
        jobs: the shards.
        progress: called with (images done, images in all).
        parallel: number of Ray tasks, as for `prepare`.

    Yields:
        Each job with the rows that were written, the entry of the shard, and the digests of its images.

    Raises:
        SourceError: a file cannot be read, and is not skipped; the message names it.
    """
    total, done = sum(len(job.paths) for job in jobs), 0
    with closing(run_tasks(_convert, jobs, parallel, total)) as results:
        for job, written in zip(jobs, results, strict=True):
            writer.skipped += written.skipped
            if written.shard is not None:
                yield job, written.rows, written.shard, written.digests
            done += len(job.paths)
            progress(done, total)


def _convert(job: ShardJob) -> _Written:
    from spikefleet_pipelines.store.decode import decode_rgb  # here, because torchvision takes seconds to import

    images: list[bytes] = []
    rows: list[int] = []
    skipped: list[SkippedFile] = []
    for row, path in enumerate(job.paths):
        try:
            encoded = read_encoded(path)
            height, width = decode_rgb(np.frombuffer(encoded, np.uint8)).shape[1:]
            if job.check_size is not None:
                job.check_size(job.targets, row, height, width)
        except ValueError as error:
            if not job.skip_bad:
                joint = " " if str(error).startswith("is ") else ": "
                raise SourceError(f"{_named(job, row)}{joint}{error}; {job.advice}") from error
            skipped.append(SkippedFile(split=job.split, file=shown_path(path), reason=str(error)))
            continue
        images.append(encoded)
        rows.append(row)
    kept = np.array(rows, np.int64)
    if not images:
        return _Written(None, [], kept, tuple(skipped))
    shard = write_shard(job.out, images, select_targets(job.targets, kept), ENCODED)
    return _Written(shard, content_digests(images), kept, tuple(skipped))


def _named(job: ShardJob, row: int) -> str:
    columns = job.targets
    number = f" (image {columns.image_ids[row]})" if isinstance(columns, AnnotationColumns) else ""
    return f"{job.paths[row]}{number}"


def select_targets(targets: Targets, rows: NDArray[np.int64]) -> Targets:
    """Return the labels or objects of some images."""
    return targets.select(rows) if isinstance(targets, AnnotationColumns) else targets[rows]


def shown_path(path: ImagePlace) -> str:
    """A path as text that can be stored: bytes that are no UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()
