"""Data sets in ImageNet's layout: train/<class>/*.jpg, val/<class>/*.jpg and, maybe, test/<class>/*.jpg.

The folder of val may be named `valid` (as Roboflow's exports have it) or `validation`. Class folders alone are training
images, of which a part is held out for val.

Files that are not used, such as images in sub-folders of a class, are counted by reason. The bytes of the files are
stored unchanged, after each was decoded once to find broken ones.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.box_rows import path_below
from spikefleet_pipelines.sources.contents import held_out
from spikefleet_pipelines.sources.image_folder_config import HELD_OUT_WITH_TEST, IMAGE_FOLDER, ImageFolderOptions
from spikefleet_pipelines.sources.labelled_images import LabelledContents, LabelledImages
from spikefleet_pipelines.sources.own_splits_config import DEFAULT_HOLDOUT, SPLIT_FOLDERS, OwnSplits, only_place
from spikefleet_pipelines.sources.split_rules import STAND_INS, divide_splits, group_names
from spikefleet_pipelines.store.image_files import images_below, is_named_as_image, list_images, reason_unused
from spikefleet_pipelines.store.image_header import IMAGE_SUFFIXES
from spikefleet_pipelines.store.manifest import is_text

_NO_SPLIT = "image files in folders beside train, val and test"
_NO_CLASS = "image files in no class folder"
_HIDDEN_CLASS = "image files in hidden folders"


def read_image_folder(root: Path, options: ImageFolderOptions, seed: int) -> LabelledContents:
    """List the files of a directory with the folders train and val, test, or both, or with class folders alone.

    With a val and a test folder, the splits are the folders. Where there is one of them, it becomes the test split, and
    a part of the training images of each class, by default 2 % and at least one, becomes val. With `holdout=0` it is
    val, and "test" an alias of it. Where there is neither, a part of each class, by default 10 %, becomes val, and
    "test" is an alias of it.

    Raises:
        SourceError: a folder is missing, a file cannot be read, or the classes of the folders differ; the message names
            them.
    """
    given = _split_folders(root)
    unused = Counter(_beside(root, given))
    classes = {name: _classes(folder) for name, folder in given.items()}
    if not classes["train"]:
        raise IMAGE_FOLDER.missing(root / "train" / "<class>")
    for name, folder in given.items():
        _check_same_classes(given["train"], folder, classes["train"], classes[name])
    found = {name: _list(folder, classes["train"], unused) for name, folder in given.items()}
    holdout = options.holdout
    if holdout is None:
        holdout = HELD_OUT_WITH_TEST if len(found) > 1 else DEFAULT_HOLDOUT
    splits = _divided(root, found, 0.0 if len(found) == 3 else holdout, options.group, seed)
    return LabelledContents(classes["train"], splits, stand_ins=STAND_INS, unused=dict(sorted(unused.items())))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits; the root itself where it has class folders alone.

    Raises:
        SourceError: there is no folder of training images, or there are two of one split.
    """
    given: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        if (place := only_place(root, split, [root / name for name in names if (root / name).is_dir()])) is not None:
            given[split] = place
    if "test" in given and not _classes(given["test"]):
        del given["test"]  # ImageNet's test images have no classes
    if given and "train" not in given:
        raise IMAGE_FOLDER.missing(root / "train")
    if not given and any(next(images_below(root / name), None) for name in _classes(root)):
        return {"train": root}
    if not given:
        raise IMAGE_FOLDER.missing(root / "train")
    return given


def _divided(
    root: Path, found: dict[str, LabelledImages], holdout: float, group: str | None, seed: int
) -> dict[str, LabelledImages]:
    train, reported = found["train"], found.get("test", found.get("val"))
    if group is not None:
        names = {split: [path_below(root, path) for path in part.paths] for split, part in found.items()}
        groups = {split: group_names(IMAGE_FOLDER.name, of_split, group) for split, of_split in names.items()}
        own = OwnSplits(holdout=holdout, group=group)
        return divide_splits(IMAGE_FOLDER.name, found, train.labels, groups, own, seed)
    if not holdout:
        return found if reported is None or len(found) == 3 else {"train": train, "val": reported}
    val = held_out(train.labels, lambda n: min(n - 1, max(1, round(n * holdout))), seed)
    divided = {"train": train.where(~val), "val": train.where(val)}
    return divided if reported is None else {**divided, "test": reported}


def _beside(root: Path, splits: Mapping[str, Path]) -> Iterator[str]:
    """Why each file beside the class folders is not used."""
    alone = splits["train"] == root
    for path in [] if alone else root.iterdir():
        if path.is_dir() and path not in splits.values():
            yield from [_NO_SPLIT] * sum(1 for _ in images_below(path))
    for folder in {root, *splits.values()}:
        files = [path for path in folder.iterdir() if not path.is_dir()]
        yield from (_NO_CLASS if is_named_as_image(path) else reason_unused(path) for path in files)
    for folder in splits.values():
        for path in folder.iterdir():
            if path.is_dir() and path.name.startswith("."):
                yield from [_HIDDEN_CLASS] * sum(1 for _ in images_below(path))


def _check_same_classes(train: Path, other: Path, of_train: Sequence[str], of_other: Sequence[str]) -> None:
    only = [
        f"only in {folder.name}: {', '.join(sorted(extra)[:5])}{' ...' if len(extra) > 5 else ''}"
        for folder, extra in ((train, {*of_train} - {*of_other}), (other, {*of_other} - {*of_train}))
        if extra
    ]
    if only:
        forms = [{unicodedata.normalize("NFC", name) for name in names} for names in (of_train, of_other)]
        why = " (their names are in two forms of Unicode; rename those of one)" if forms[0] == forms[1] else ""
        raise SourceError(
            f"class folders of {train} and {other} differ ({'; '.join(only)}); give both the same classes{why}"
        )


def _classes(folder: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    for name in names:
        if not is_text(name):
            raise SourceError(f"class folder {name!r} of {folder} has a name that is not UTF-8; rename it")
    return tuple(names)


def _list(folder: Path, classes: Sequence[str], unused: Counter[str]) -> LabelledImages:
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
    return LabelledImages(tuple(paths), np.array(labels, np.int64))
