"""Image files with boxes: what the sources of detection data find, and how it becomes the shards of a store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.encoded_files import ENCODED, ShardJob, select_targets, shown_path, write_shards
from spikefleet_pipelines.sources.packed_images import ImagePlace
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.manifest import ImageFormat, SkippedFile
from spikefleet_pipelines.store.writer import StoreWriter


@dataclass(frozen=True)
class BoxedImages:
    """The images of a split, and their objects."""

    paths: tuple[ImagePlace, ...]
    sizes: NDArray[np.int64]
    """Bytes of each file; -1 for one that is missing."""
    columns: AnnotationColumns
    computed_areas: NDArray[np.int64]
    """Number of annotations without an area, for each image, [n]."""
    listed_in: Path
    """The file or directory that lists the images."""

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: NDArray[np.int64]) -> "BoxedImages":
        """Return the images at `rows`, in that order."""
        paths = tuple(self.paths[row] for row in rows)
        computed = self.computed_areas[rows]
        return BoxedImages(paths, self.sizes[rows], self.columns.select(rows), computed, self.listed_in)

    def parts(self, shard_bytes: int) -> "list[BoxedImages]":
        """Divide the images into shards of about `shard_bytes`, independent of the number of writers."""
        number = np.cumsum([0, *self.sizes])[:-1] // shard_bytes
        return [self.select(np.flatnonzero(number == value)) for value in np.unique(number)]


@dataclass(frozen=True)
class BoxedContents:
    """Annotations and image files of a data set; the files are read when the store is written."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    splits: Mapping[str, BoxedImages]
    stand_ins: Mapping[str, str]
    unused: Mapping[str, int] = field(default_factory=dict)
    """Number of what the source has and does not use, by reason."""
    advice: str = "replace the file, or remove its entry"
    """What to do about a file that cannot be read."""
    image: ImageFormat = ENCODED

    def write(self, writer: StoreWriter, progress: Progress, parallel: int | None) -> None:
        """Write all splits; see `Contents`."""
        writer.unused = dict(self.unused)
        jobs, computed = [], []
        for split, images in self.splits.items():
            for number, part in enumerate(_present(split, images, writer).parts(writer.shard_bytes)):
                out = writer.directory / writer.shard_name(split, number)
                jobs.append(ShardJob(split, out, part.paths, part.columns, self.advice, writer.skip_bad, _check_size))
                computed.append(part.computed_areas)
        areas = dict(zip((job.out for job in jobs), computed, strict=True))
        for job, rows, shard, digests in write_shards(writer, jobs, progress, parallel):
            objects = select_targets(job.targets, rows)
            writer.add_shard(job.split, shard, objects, digests, int(areas[job.out][rows].sum()))


def file_sizes(paths: Sequence[ImagePlace]) -> NDArray[np.int64]:
    """Bytes of each image; -1 for a file that is missing."""
    return np.array([_size(path) for path in paths], np.int64)


def _size(path: ImagePlace) -> int:
    try:
        return path.stat().st_size if isinstance(path, Path) else path.size
    except OSError:
        return -1


def _present(split: str, images: BoxedImages, writer: StoreWriter) -> BoxedImages:
    """Leave out the images whose files are missing.

    Raises:
        SourceError: some are missing and must not be skipped; the message names the first, with its image id.
    """
    missing = np.flatnonzero(images.sizes < 0)
    if not len(missing):
        return images
    if writer.skip_bad:
        writer.skipped += [
            SkippedFile(split=split, file=shown_path(images.paths[row]), reason="it is missing") for row in missing
        ]
        return images.select(np.flatnonzero(images.sizes >= 0))
    row = int(missing[0])
    more = f" ({len(missing)} of its {len(images.paths)} images are missing)" if len(missing) > 1 else ""
    path = images.paths[row]
    what = "is missing"
    if isinstance(path, Path) and path.is_symlink():
        what = f"is a link to {path.readlink()}, which does not exist"
    raise SourceError(
        f"{path} {what}: image {images.columns.image_ids[row]} of {images.listed_in}{more}; download the images, "
        "or set the directory that contains them"
    )


def _check_size(columns: AnnotationColumns, row: int, height: int, width: int) -> None:
    expected = int(columns.heights[row]), int(columns.widths[row])
    if (height, width) != expected:
        hint = " (the file's EXIF orientation rotates it, the boxes are of the image before rotation)"
        raise ValueError(
            f"is {width} x {height} pixels, expected {expected[1]} x {expected[0]} of its annotations"
            f"{hint if (width, height) == expected else ''}"
        )
