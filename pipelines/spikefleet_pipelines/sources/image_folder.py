"""Data sets in ImageNet's layout: root/train/<class>/*.jpg and root/val/<class>/*.jpg.

The bytes of the files are stored unchanged, after each was decoded once to find broken ones.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.contents import held_out
from spikefleet_pipelines.sources.image_folder_config import IMAGE_FOLDER, ImageFolderOptions
from spikefleet_pipelines.sources.ray_tasks import run_tasks
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.manifest import ImageFormat, Shard
from spikefleet_pipelines.store.shards import write_shard
from spikefleet_pipelines.store.writer import StoreWriter, content_digests

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_ENCODED = ImageFormat(encoding="encoded")


@dataclass(frozen=True)
class _Files:
    """The images of a split, ordered by class and name."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]

    def where(self, chosen: NDArray[np.bool_]) -> "_Files":
        return _Files(tuple(self.paths[row] for row in np.flatnonzero(chosen)), self.labels[chosen])


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    split: str
    out: Path
    files: _Files


@dataclass(frozen=True)
class FolderContents:
    """The image files of a data set; they are read when the store is written."""

    class_names: tuple[str, ...]
    splits: dict[str, _Files]
    image: ImageFormat = _ENCODED
    category_ids: None = None
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    def write(self, writer: StoreWriter, progress: Progress, parallel: int | None) -> None:
        """Write all splits; see `Contents`."""
        total, done = sum(len(files.paths) for files in self.splits.values()), 0
        jobs = [
            _Job(split, writer.directory / writer.shard_name(split, number), part)
            for split, files in self.splits.items()
            for number, part in enumerate(_parts(files, writer.shard_bytes))
        ]
        with closing(run_tasks(_convert, jobs, parallel, total)) as results:
            for job, (shard, digests) in zip(jobs, results, strict=True):
                writer.add_shard(job.split, shard, job.files.labels, digests)
                done += shard.rows
                progress(done, total)


def read_image_folder(root: Path, options: ImageFolderOptions, seed: int) -> FolderContents:
    """List the files of a directory.

    A part of the training images of each class, by default 2 % and at least one, becomes val, and the val folder the
    test split. With `holdout=0` the val folder is val, and "test" an alias of it.

    Raises:
        SourceError: a folder is missing, or the classes of train and val differ; the message names them.
    """
    folders = {name: root / name for name in ("train", "val")}
    for folder in folders.values():
        if not folder.is_dir():
            raise IMAGE_FOLDER.missing(folder)
    train_classes, val_classes = (_classes(folder) for folder in folders.values())
    if not train_classes:
        raise IMAGE_FOLDER.missing(root / "train" / "<class>")
    if train_classes != val_classes:
        only = [
            f"only in {name}: {', '.join(sorted(extra)[:5])}{' ...' if len(extra) > 5 else ''}"
            for name, extra in (
                ("train", set(train_classes) - set(val_classes)),
                ("val", set(val_classes) - set(train_classes)),
            )
            if extra
        ]
        raise SourceError(
            f"class folders of {root}/train and {root}/val differ ({'; '.join(only)}); give both the same classes"
        )
    train, reported = (_list(folder, train_classes) for folder in folders.values())
    if not options.holdout:
        return FolderContents(train_classes, {"train": train, "val": reported}, stand_ins={"test": "val"})
    val = held_out(train.labels, lambda n: min(n - 1, max(1, round(n * options.holdout))), seed)
    return FolderContents(train_classes, {"train": train.where(~val), "val": train.where(val), "test": reported})


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))


def _list(folder: Path, classes: Sequence[str]) -> _Files:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."
        )
        if not found:
            raise SourceError(
                f"class folder {folder / name} contains no image ({', '.join(sorted(SUFFIXES))}); add images or "
                "remove it"
            )
        paths += found
        labels += [label] * len(found)
    return _Files(tuple(paths), np.array(labels, np.int64))


def _parts(files: _Files, shard_bytes: int) -> list[_Files]:
    """Divide the files into shards of about `shard_bytes`, independent of the number of writers."""
    sizes = np.cumsum([0, *(path.stat().st_size for path in files.paths)])[:-1]
    number = sizes // shard_bytes
    return [files.where(number == value) for value in np.unique(number)]


def _convert(job: _Job) -> tuple[Shard, list[bytes]]:
    from spikefleet_pipelines.store.decode import decode_rgb  # here, because torchvision takes seconds to import

    images = []
    for path in job.files.paths:
        encoded = path.read_bytes()
        try:
            decode_rgb(np.frombuffer(encoded, np.uint8))
        except ValueError as error:
            raise SourceError(f"{path}: {error}; replace or remove the file") from error
        images.append(encoded)
    return write_shard(job.out, images, job.files.labels, _ENCODED), content_digests(images)
