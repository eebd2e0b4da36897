"""Image files with one class each: what the sources of classification data find, and how it becomes shards."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.encoded_files import ENCODED, ShardJob, select_targets, write_shards
from spikefleet_pipelines.sources.packed_images import ImagePlace, encoded_size
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.writer import StoreWriter


@dataclass(frozen=True)
class LabelledImages:
    """The images of a split."""

    paths: tuple[ImagePlace, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: NDArray[np.int64]) -> "LabelledImages":
        """Return the images at `rows`, in that order."""
        return LabelledImages(tuple(self.paths[row] for row in rows), self.labels[rows])

    def where(self, chosen: NDArray[np.bool_]) -> "LabelledImages":
        """Return the images of a mask [n]."""
        return self.select(np.flatnonzero(chosen))


@dataclass(frozen=True)
class LabelledContents:
    """The image files of a data set; they are read when the store is written."""

    class_names: tuple[str, ...]
    splits: Mapping[str, LabelledImages]
    image: ImageFormat = ENCODED
    category_ids: None = None
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are not used, by reason."""
    advice: str = "replace or remove the file"
    """What to do about a file that cannot be read."""

    def write(self, writer: StoreWriter, progress: Progress, parallel: int | None) -> None:
        """Write all splits; see `Contents`."""
        writer.unused = dict(self.unused)
        jobs = [
            ShardJob(
                split,
                writer.directory / writer.shard_name(split, number),
                part.paths,
                part.labels,
                self.advice,
                writer.skip_bad,
            )
            for split, files in self.splits.items()
            for number, part in enumerate(self._parts(files, writer))
        ]
        for job, rows, shard, digests in write_shards(writer, jobs, progress, parallel):
            writer.add_shard(job.split, shard, select_targets(job.targets, rows), digests)

    def _parts(self, files: LabelledImages, writer: StoreWriter) -> list[LabelledImages]:
        """Divide the files into shards of about `shard_bytes`, independent of the number of writers."""
        sizes = np.cumsum([0, *(self._size(path, writer.skip_bad) for path in files.paths)])[:-1]
        number = sizes // writer.shard_bytes
        return [files.where(number == value) for value in np.unique(number)]

    def _size(self, path: ImagePlace, skip_bad: bool) -> int:
        try:
            return encoded_size(path)
        except ValueError as error:
            if skip_bad:
                return 0
            raise SourceError(f"{path}: {error}; {self.advice}") from None
