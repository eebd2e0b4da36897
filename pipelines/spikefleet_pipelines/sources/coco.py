"""Data sets in COCO's format (Lin et al., "Microsoft COCO", 2014): JSON files of boxes and directories of images.

`prepare("coco", root, out)` reads a directory with all splits, by default in the layout of COCO 2017. With options
`images`, `annotations` and `split` and without root it reads one directory of images and one JSON file, and creates a
store or adds the split to the one at `out`. The bytes of the image files are stored unchanged, after each was decoded
once to find broken ones.

The boxes of COCO's test images are not public, and results are reported on val2017: where no test split is given,
"test" is an alias of "val" (recorded in the manifest as `audit.same_as`). To select models on other images than the
reported ones, hold out a part of train for val and use val2017 as test.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from spikefleet_pipelines.counter_random import Draw, random_bits
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources.coco_config import COCO, CocoOptions, CocoSplitOptions
from spikefleet_pipelines.sources.coco_json import CocoFile, read_coco_json
from spikefleet_pipelines.sources.encoded_files import ENCODED, ShardJob, select_targets, shown_path, write_shards
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.data_set_name import name_after
from spikefleet_pipelines.store.extension import StoreExtension
from spikefleet_pipelines.store.manifest import ImageFormat, Manifest, SkippedFile
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter

STAND_INS = {"test": "val"}


@dataclass(frozen=True)
class _Images:
    """The images of a split, and their objects."""

    paths: tuple[Path, ...]
    sizes: NDArray[np.int64]
    """Bytes of each file."""
    columns: AnnotationColumns
    computed_areas: NDArray[np.int64]
    listed_in: Path
    """The annotation file."""

    def select(self, rows: NDArray[np.int64]) -> "_Images":
        paths = tuple(self.paths[row] for row in rows)
        return _Images(paths, self.sizes[rows], self.columns.select(rows), self.computed_areas[rows], self.listed_in)

    def parts(self, shard_bytes: int) -> "list[_Images]":
        """Divide the images into shards of about `shard_bytes`, independent of the number of writers."""
        number = np.cumsum([0, *self.sizes])[:-1] // shard_bytes
        return [self.select(np.flatnonzero(number == value)) for value in np.unique(number)]


@dataclass(frozen=True)
class CocoContents:
    """Annotations and image files of a data set; the files are read when the store is written."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    splits: dict[str, _Images]
    stand_ins: Mapping[str, str]
    unused: Mapping[str, int] = field(default_factory=dict)
    """Number of categories that are not used, by reason."""
    image: ImageFormat = ENCODED

    def write(self, writer: StoreWriter, progress: Progress, parallel: int | None) -> None:
        """Write all splits; see `Contents`."""
        writer.unused = dict(self.unused)
        jobs, computed = [], []
        for split, images in self.splits.items():
            for number, part in enumerate(_present(split, images, writer).parts(writer.shard_bytes)):
                out = writer.directory / writer.shard_name(split, number)
                advice = "replace the file, or remove its entry"
                jobs.append(ShardJob(split, out, part.paths, part.columns, advice, writer.skip_bad, _check_size))
                computed.append(part.computed_areas)
        areas = dict(zip((job.out for job in jobs), computed, strict=True))
        for job, rows, shard, digests in write_shards(writer, jobs, progress, parallel):
            objects = select_targets(job.targets, rows)
            writer.add_shard(job.split, shard, objects, digests, int(areas[job.out][rows].sum()))


def read_coco(root: Path, options: CocoOptions, seed: int) -> CocoContents:
    """Read all splits of a directory.

    Raises:
        SourceError: a file is missing or invalid, or the categories of the splits differ.
    """
    if (options.test_images is None) != (options.test_annotations is None):
        raise SourceError(
            f"source 'coco': test_images is {options.test_images} and test_annotations is {options.test_annotations}; "
            "set both or neither"
        )
    if options.holdout and options.test_images is not None:
        raise SourceError(
            f"source 'coco': test_images is {options.test_images}, but with holdout val becomes the test split; remove "
            "test_images or holdout"
        )
    places = {
        "train": (options.train_images, options.train_annotations),
        "test" if options.holdout else "val": (options.val_images, options.val_annotations),
    }
    if options.test_images is not None and options.test_annotations is not None:
        places["test"] = options.test_images, options.test_annotations
    for images, annotations in places.values():
        for place, there in ((root / images, Path.is_dir), (root / annotations, Path.is_file)):
            if not there(place):
                raise COCO.missing(place)
    files = {split: read_coco_json(root / annotations) for split, (_, annotations) in places.items()}
    if len({file.grouping for file in files.values()}) > 1:  # one that has objects in some split is a class in all
        files = {split: file.with_all_categories() for split, file in files.items()}
    first = files["train"]
    for file in files.values():
        file.check_same_categories(first.category_ids, first.class_names, str(first.path))
    splits: dict[str, _Images] = {}
    for split, (images, _) in places.items():
        splits |= _divide(split, _find(files[split], root / images), options.holdout, seed)
    return CocoContents(first.class_names, first.category_ids, splits, STAND_INS, first.unused)


def prepare_coco_split(
    options: CocoSplitOptions,
    out: Path,
    progress: Progress,
    parallel: int | None,
    seed: int,
    overwrite: bool,
    skip_bad: bool = False,
) -> None:
    """Add one split of a COCO data set to the store at `out`, or create the store.

    The split appears atomically when it is complete. A split that the store already contains from the same file is not
    changed.

    Args:
        options: files of the split.
        out: directory of the store.
        progress: called with (images done, images in all).
        parallel: number of Ray tasks, as for `prepare`.
        seed: selects the samples held out for val.
        overwrite: replace this split if the store contains it; other splits are kept.
        skip_bad: leave out images that are missing or cannot be read.

    Raises:
        SourceError: a file is missing or invalid.
        StoreError: `out` contains something else, or this split of other data.
    """
    images, annotations, split, holdout = options.images, options.annotations, options.split, options.holdout
    if holdout and split != "train":
        raise SourceError(
            f"source 'coco': holdout is {holdout} for split {split!r}, expected 0; only split 'train' can hold out "
            "images"
        )
    if not images.is_dir():
        raise SourceError(
            f"source 'coco': images is {images}, which is not a directory; set images to the directory of image files"
        )
    if not annotations.is_file():
        raise SourceError(
            f"source 'coco': annotations is {annotations}, which is not a file; set annotations to the JSON of the "
            "boxes"
        )
    with annotations.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    recorded: dict[str, JsonValue] = {
        f"{split}_images": images.resolve().name,
        f"{split}_annotations": annotations.name,
        f"{split}_sha256": digest,
    }
    if split == "train":
        recorded |= {"holdout": holdout, "seed": seed}
    there = Store.open(out).manifest if Store.is_store(out) else None
    if there is not None and _is_done(there, out, ("train", "val") if holdout else (split,), recorded, overwrite):
        return
    if there is None and out.is_dir() and any(out.iterdir()):
        raise StoreError(f"{out} is neither empty nor a store; choose another directory")
    file = read_coco_json(annotations)
    if there is not None and {number for number, _ in file.grouping} & set(there.category_ids or ()):
        file = file.with_all_categories()
    if there is not None:
        file.check_same_categories(there.category_ids or (), there.class_names, f"the store {out}")
    splits = _divide(split, _find(file, images), holdout, seed)
    contents = CocoContents(file.class_names, file.category_ids, splits, STAND_INS, file.unused)
    writer = (
        StoreExtension(out, options=recorded, stand_ins=STAND_INS, skip_bad=skip_bad)
        if there is not None
        else StoreWriter(
            out,
            source=COCO.name,
            class_names=file.class_names,
            image=ENCODED,
            options=recorded,
            category_ids=file.category_ids,
            stand_ins=STAND_INS,
            otherwise=_name_after(images, annotations),
            skip_bad=skip_bad,
        )
    )
    with writer:
        contents.write(writer, progress, parallel)
        writer.commit()


def _name_after(images: Path, annotations: Path) -> str:
    """The name of data that are not COCO: that of the folder which holds the images and the file of a split."""
    return name_after(Path(os.path.commonpath([images.absolute(), annotations.absolute()])), COCO.name)


def _is_done(
    there: Manifest, out: Path, splits: tuple[str, ...], recorded: dict[str, JsonValue], overwrite: bool
) -> bool:
    """Whether the store already contains exactly these splits.

    Raises:
        StoreError: it contains one of them from other data and `overwrite` is not set, or it is of another source.
    """
    if there.source != COCO.name:
        raise StoreError(f"{out} already contains a store of {there.source!r}; choose another directory")
    own = set(there.shards) - set(there.audit.same_as or ())
    has = [split for split in splits if split in own]
    if overwrite or not has:
        return False
    if has == list(splits) and recorded.items() <= there.options.items():
        return True
    made_of = there.options.get(f"{has[0]}_annotations", "images held out of train")
    raise StoreError(
        f"{out} already contains split {has[0]!r} from {made_of}; choose another directory, or use --overwrite to "
        "replace it"
    )


def _find(file: CocoFile, folder: Path) -> _Images:
    """Find the files of all images that an annotation file lists; one that is missing has the size -1."""
    paths = tuple(folder / name for name in file.file_names)
    sizes = np.array([_size(path) for path in paths], np.int64)
    return _Images(paths, sizes, file.columns, file.computed_areas, file.path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _present(split: str, images: _Images, writer: StoreWriter) -> _Images:
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
    what = f"is a link to {path.readlink()}, which does not exist" if path.is_symlink() else "is missing"
    raise SourceError(
        f"{path} {what}: image {images.columns.image_ids[row]} of {images.listed_in}{more}; download the images, "
        "or set the directory that contains them"
    )


def _divide(split: str, images: _Images, holdout: float, seed: int) -> dict[str, _Images]:
    """Hold out a part of train for val: the images with the smallest hashes of their ids, independent of the order."""
    if split != "train" or not holdout:
        return {split: images}
    count = len(images.paths)
    kept_back = min(count - 1, max(1, round(count * holdout)))
    keys = random_bits(seed, 0, images.columns.image_ids, Draw.HOLD_OUT)
    chosen = np.zeros(count, np.bool_)
    chosen[np.argsort(keys, kind="stable")[:kept_back]] = True
    return {"train": images.select(np.flatnonzero(~chosen)), "val": images.select(np.flatnonzero(chosen))}


def _check_size(columns: AnnotationColumns, row: int, height: int, width: int) -> None:
    expected = int(columns.heights[row]), int(columns.widths[row])
    if (height, width) != expected:
        hint = " (the file's EXIF orientation rotates it, the boxes are of the image before rotation)"
        raise ValueError(
            f"is {width} x {height} pixels, expected {expected[1]} x {expected[0]} of its annotations"
            f"{hint if (width, height) == expected else ''}"
        )
