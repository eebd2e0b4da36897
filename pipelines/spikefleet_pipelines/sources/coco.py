"""Data sets in COCO's format (Lin et al., "Microsoft COCO", 2014): JSON files of boxes and directories of images.

`prepare("coco", root, out)` reads a directory with all splits, by default in the layout of COCO 2017. With options
`images`, `annotations` and `split` and without root it reads one directory of images and one JSON file, and creates a
store or adds the split to the one at `out`. The bytes of the image files are stored unchanged, after each was decoded
once to find broken ones.

Two layouts of exports are known too: `train/`, `valid/` and `test/` with `_annotations.coco.json` in each (Roboflow),
and `result.json` beside `images/` (Label Studio), of whose images `holdout` makes val.

The boxes of COCO's test images are not public, and results are reported on val2017: where no test split is given,
"test" is an alias of "val" (recorded in the manifest as `audit.same_as`). To select models on other images than the
reported ones, hold out a part of train for val and use val2017 as test.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from spikefleet_pipelines.counter_random import Draw, random_bits
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources.boxed_images import BoxedContents, BoxedImages, file_sizes
from spikefleet_pipelines.sources.coco_config import COCO, CocoOptions, CocoSplitOptions
from spikefleet_pipelines.sources.coco_json import CocoFile, read_coco_json
from spikefleet_pipelines.sources.encoded_files import ENCODED
from spikefleet_pipelines.sources.own_splits_config import SPLIT_FOLDERS, only_place
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.sources.split_rules import STAND_INS
from spikefleet_pipelines.store.data_set_name import name_after
from spikefleet_pipelines.store.extension import StoreExtension
from spikefleet_pipelines.store.manifest import Manifest
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter

ROBOFLOW_JSON = "_annotations.coco.json"
LABEL_STUDIO_JSON = "result.json"
"""File names of annotations in exports."""


def read_coco(root: Path, options: CocoOptions, seed: int) -> BoxedContents:
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
    places = _places(root, options)
    files = {split: read_coco_json(root / annotations) for split, (_, annotations) in places.items()}
    if len({file.grouping for file in files.values()}) > 1:  # one that has objects in some split is a class in all
        files = {split: file.with_all_categories() for split, file in files.items()}
    first = files["train"]
    for file in files.values():
        file.check_same_categories(first.category_ids, first.class_names, str(first.path))
    splits: dict[str, BoxedImages] = {}
    for split, (images, _) in places.items():
        splits |= _divide(split, _find(files[split], root / images), options.holdout, seed)
    return BoxedContents(first.class_names, first.category_ids, splits, STAND_INS, first.unused)


def _places(root: Path, options: CocoOptions) -> dict[str, tuple[str, str]]:
    """The directory of images and the file of boxes of each split.

    Raises:
        SourceError: one is missing, or there are no images for validation.
    """
    exported = {} if options != CocoOptions(holdout=options.holdout) else _exported(root)
    if exported:
        if options.holdout and {"val", "test"} <= set(exported):
            raise SourceError(
                f"source 'coco': option holdout={options.holdout:g}, but {root} has val and test splits; remove holdout"
            )
        if not options.holdout and "val" not in exported:
            raise SourceError(
                f"source 'coco': {root} has no images for validation; hold some out: --option holdout=0.1"
            )
        return {"test" if options.holdout and split == "val" else split: place for split, place in exported.items()}
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
    return places


def _exported(root: Path) -> dict[str, tuple[str, str]]:
    """The splits in the layouts of Roboflow (a JSON in each folder) and of Label Studio (one JSON); empty in others."""
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        there = [root / name for name in names if (root / name / ROBOFLOW_JSON).is_file()]
        if (place := only_place(root, split, there)) is not None:
            found[split] = place.name, f"{place.name}/{ROBOFLOW_JSON}"
    if not found and (root / LABEL_STUDIO_JSON).is_file():
        return {"train": (".", LABEL_STUDIO_JSON)}
    return found if "train" in found else {}


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
    contents = BoxedContents(file.class_names, file.category_ids, splits, STAND_INS, file.unused)
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


def _find(file: CocoFile, folder: Path) -> BoxedImages:
    """Find the files of all images that an annotation file lists; one that is missing has the size -1."""
    paths = tuple(folder / name for name in file.file_names)
    return BoxedImages(paths, file_sizes(paths), file.columns, file.computed_areas, file.path)


def _divide(split: str, images: BoxedImages, holdout: float, seed: int) -> dict[str, BoxedImages]:
    """Hold out a part of train for val: the images with the smallest hashes of their ids, independent of the order."""
    if split != "train" or not holdout:
        return {split: images}
    count = len(images.paths)
    kept_back = min(count - 1, max(1, round(count * holdout)))
    keys = random_bits(seed, 0, images.columns.image_ids, Draw.HOLD_OUT)
    chosen = np.zeros(count, np.bool_)
    chosen[np.argsort(keys, kind="stable")[:kept_back]] = True
    return {"train": images.select(np.flatnonzero(~chosen)), "val": images.select(np.flatnonzero(chosen))}
