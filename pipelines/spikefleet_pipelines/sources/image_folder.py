"""Data sets in ImageNet's layout: train/<class>/*.jpg, val/<class>/*.jpg and, maybe, test/<class>/*.jpg.

Files that are not used, such as images in sub-folders of a class, are counted by reason. The bytes of the files are
stored unchanged, after each was decoded once to find broken ones.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.contents import held_out
from spikefleet_pipelines.sources.encoded_files import ENCODED, ShardJob, select_targets, write_shards
from spikefleet_pipelines.sources.image_folder_config import IMAGE_FOLDER, ImageFolderOptions
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.image_files import (
    check_image_file,
    images_below,
    is_named_as_image,
    list_images,
    reason_unused,
)
from spikefleet_pipelines.store.image_header import IMAGE_SUFFIXES
from spikefleet_pipelines.store.manifest import ImageFormat, is_text
from spikefleet_pipelines.store.writer import StoreWriter

_NO_SPLIT = "image files in folders beside train, val and test"
_NO_CLASS = "image files in no class folder"
_HIDDEN_CLASS = "image files in hidden folders"


@dataclass(frozen=True)
class _Files:
    """The images of a split, ordered by class and name."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]

    def where(self, chosen: NDArray[np.bool_]) -> "_Files":
        return _Files(tuple(self.paths[row] for row in np.flatnonzero(chosen)), self.labels[chosen])


@dataclass(frozen=True)
class FolderContents:
    """The image files of a data set; they are read when the store is written."""

    class_names: tuple[str, ...]
    splits: dict[str, _Files]
    image: ImageFormat = ENCODED
    category_ids: None = None
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are not used, by reason."""

    def write(self, writer: StoreWriter, progress: Progress, parallel: int | None) -> None:
        """Write all splits; see `Contents`."""
        writer.unused = dict(self.unused)
        jobs = [
            ShardJob(
                split,
                writer.directory / writer.shard_name(split, number),
                part.paths,
                part.labels,
                "replace or remove the file",
                writer.skip_bad,
            )
            for split, files in self.splits.items()
            for number, part in enumerate(_parts(files, writer))
        ]
        for job, rows, shard, digests in write_shards(writer, jobs, progress, parallel):
            writer.add_shard(job.split, shard, select_targets(job.targets, rows), digests)


def read_image_folder(root: Path, options: ImageFolderOptions, seed: int) -> FolderContents:
    """List the files of a directory with the folders train and val, test, or both.

    With a val and a test folder, the splits are the folders. Where there is one of them, it becomes the test split, and
    a part of the training images of each class, by default 2 % and at least one, becomes val. With `holdout=0` it is
    val, and "test" an alias of it.

    Raises:
        SourceError: a folder is missing, a file cannot be read, or the classes of the folders differ; the message names
            them.
    """
    given = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "test" in given and not _classes(given["test"]):
        del given["test"]  # ImageNet's test images have no classes
    if "train" not in given or len(given) == 1:
        raise IMAGE_FOLDER.missing(root / ("val" if "train" in given else "train"))
    unused = Counter(_beside(root, given))
    classes = {name: _classes(folder) for name, folder in given.items()}
    if not classes["train"]:
        raise IMAGE_FOLDER.missing(root / "train" / "<class>")
    for name in given:
        _check_same_classes(root, name, classes)
    found = {name: _list(folder, classes["train"], unused) for name, folder in given.items()}
    if len(found) < 3:
        train, reported = found["train"], found.get("test", found.get("val"))
        assert reported is not None
        if not options.holdout:
            found = {"train": train, "val": reported}
            return FolderContents(
                classes["train"], found, stand_ins={"test": "val"}, unused=dict(sorted(unused.items()))
            )
        val = held_out(train.labels, lambda n: min(n - 1, max(1, round(n * options.holdout))), seed)
        found = {"train": train.where(~val), "val": train.where(val), "test": reported}
    return FolderContents(classes["train"], found, unused=dict(sorted(unused.items())))


def _beside(root: Path, splits: Mapping[str, Path]) -> Iterator[str]:
    """Why each file beside the class folders is not used."""
    for path in root.iterdir():
        if path.is_dir() and path.name not in splits:
            yield from [_NO_SPLIT] * sum(1 for _ in images_below(path))
    for folder in (root, *splits.values()):
        files = [path for path in folder.iterdir() if not path.is_dir()]
        yield from (_NO_CLASS if is_named_as_image(path) else reason_unused(path) for path in files)
    for folder in splits.values():
        for path in folder.iterdir():
            if path.is_dir() and path.name.startswith("."):
                yield from [_HIDDEN_CLASS] * sum(1 for _ in images_below(path))


def _check_same_classes(root: Path, split: str, classes: Mapping[str, Sequence[str]]) -> None:
    train, other = set(classes["train"]), set(classes[split])
    only = [
        f"only in {name}: {', '.join(sorted(extra)[:5])}{' ...' if len(extra) > 5 else ''}"
        for name, extra in (("train", train - other), (split, other - train))
        if extra
    ]
    if only:
        raise SourceError(
            f"class folders of {root}/train and {root}/{split} differ ({'; '.join(only)}); give both the same classes"
        )


def _classes(folder: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    for name in names:
        if not is_text(name):
            raise SourceError(f"class folder {name!r} of {folder} has a name that is not UTF-8; rename it")
    return tuple(names)


def _list(folder: Path, classes: Sequence[str], unused: Counter[str]) -> _Files:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = list_images(folder / name)
        unused.update(reason for _, reason in found.unused)
        if not found.images:
            others = f"; it has {found.summary}" if found.unused else ""
            raise SourceError(
                f"class folder {folder / name} contains no image ({', '.join(sorted(IMAGE_SUFFIXES))}){others}; add "
                "images or remove it"
            )
        paths += found.images
        labels += [label] * len(found.images)
    return _Files(tuple(paths), np.array(labels, np.int64))


def _parts(files: _Files, writer: StoreWriter) -> list[_Files]:
    """Divide the files into shards of about `shard_bytes`, independent of the number of writers."""
    sizes = np.cumsum([0, *(_size(path, writer.skip_bad) for path in files.paths)])[:-1]
    number = sizes // writer.shard_bytes
    return [files.where(number == value) for value in np.unique(number)]


def _size(path: Path, skip_bad: bool) -> int:
    try:
        return check_image_file(path)
    except ValueError as error:
        if skip_bad:
            return 0
        raise SourceError(f"{path}: {error}; replace or remove the file") from None
