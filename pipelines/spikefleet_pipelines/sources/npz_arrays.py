"""Images and classes as arrays of .npz files (numpy.lib.format; Keras' and MedMNIST's names, CIFAR-like arrays).

Images are uint8 [n, H, W], [n, H, W, C] or [n, C, H, W] with C = 1 or 3; labels are whole numbers [n] or [n, 1], from
0. Names of classes may be in an array `class_names` or `label_names` of text; else they are the numbers. Nothing is
unpickled.
"""

import lzma
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.contents import MAX_CLASSES, ArrayContents, held_out
from spikefleet_pipelines.sources.npz_arrays_config import NPZ, NpzOptions
from spikefleet_pipelines.sources.own_splits_config import DEFAULT_HOLDOUT, SPLIT_FOLDERS, only_place
from spikefleet_pipelines.sources.split_rules import STAND_INS
from spikefleet_pipelines.sources.text_files import short
from spikefleet_pipelines.store.manifest import is_text

MAX_BYTES = 1 << 35
"""Most bytes of an array: the images of this source are in memory."""

_PAIRS = (
    ("x_{}", "y_{}"),
    ("{}_images", "{}_labels"),
    ("{}_data", "{}_labels"),
    ("X_{}", "y_{}"),
    ("images_{}", "labels_{}"),
)
"""Names of the images and the labels of a split."""
_UNSPLIT = (("images", "labels"), ("data", "labels"), ("x", "y"), ("X", "y"), ("image", "label"))
_NAMES = ("class_names", "label_names", "classes", "fine_label_names")
_ORDER = ("train", "val", "test")
_ADVICE = "write the array anew with numpy.savez"
_DAMAGED = (zlib.error, lzma.LZMAError)

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read_npz(root: Path, options: NpzOptions, seed: int) -> ArrayContents:
    """Read the arrays.

    With a val split and no holdout, the splits are those of the files; else a part of the training images of each class
    becomes val. Without a test split, "test" is an alias of val; with a holdout it is the given val.

    Raises:
        SourceError: a file is missing or damaged, arrays do not fit together, or a holdout is asked for although val
            and test are given; the message names file and array.
    """
    given: dict[str, Part] = {}
    names: tuple[str, ...] | None = None
    unused: Counter[str] = Counter()
    files = _files(root, options.file)
    for of_file, path in files.items():
        parts, found = _read_file(path, of_file, unused)
        given |= parts
        if found is not None and names not in (None, found):
            raise SourceError(f"{path}: the names of the classes are not those of {next(iter(files.values()))}")
        names = found or names
    if "train" not in given:
        raise SourceError(f"{root}: the .npz files have no training images, only {', '.join(given)}; add train")
    shapes = {split: images.shape[1:] for split, (images, _) in given.items()}
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{split} {list(shape)}" for split, shape in shapes.items())
        raise SourceError(f"{root}: the images of the splits have other shapes: {sizes}; make them equal")
    classes = _class_names(root, names, max(int(labels.max()) for _, labels in given.values()) + 1)
    given = _divided(given, options.holdout, seed)
    splits = {split: part for split, part in given.items() if len(part[1])}
    ordered = dict(sorted(splits.items(), key=lambda item: _ORDER.index(item[0])))
    return ArrayContents(classes, ordered, stand_ins=STAND_INS, unused=unused)


def _divided(given: dict[str, Part], holdout: float | None, seed: int) -> dict[str, Part]:
    """Hold out a part of train, by the rule of `split_rules.divide_splits`; arrays have no groups."""
    if holdout is None:
        holdout = 0.0 if "val" in given else DEFAULT_HOLDOUT
    if not holdout:
        return given
    if {"val", "test"} <= set(given):
        raise SourceError(
            f"source {NPZ.name!r}: option holdout={holdout:g}, but the data set has val and test splits; remove "
            "holdout, or one of the two"
        )
    reported = given.get("test", given.get("val"))
    divided = _held_out(given["train"], holdout, seed)
    return divided if reported is None else {**divided, "test": reported}


def _held_out(train: Part, holdout: float, seed: int) -> dict[str, Part]:
    images, labels = train
    val = held_out(labels, lambda n: min(n - 1, max(1, round(n * holdout))), seed)
    return {"train": (images[~val], labels[~val]), "val": (images[val], labels[val])}


def _files(root: Path, name: str | None) -> dict[str, Path]:
    """The files by their split; "" for one with several splits, or with none."""
    if name is not None:
        path = root / name
        if not path.is_file():
            raise NPZ.missing(path)
        return {"": path}
    of_split: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        there = [path for path in (root / f"{one}.npz" for one in names) if path.is_file()]
        if (place := only_place(root, split, there)) is not None:
            of_split[split] = place
    if of_split:
        return of_split
    found = sorted(path for path in root.glob("*.npz") if not path.name.startswith("."))  # macOS writes ._NAME beside
    if not found:
        raise NPZ.missing(root)
    if len(found) > 1:
        listed = ", ".join(path.name for path in found[:5])
        raise SourceError(f"{root} has {len(found)} .npz files ({listed}); choose one with option file=NAME")
    return {"": found[0]}


def _read_file(path: Path, of_file: str, unused: Counter[str]) -> tuple[dict[str, Part], tuple[str, ...] | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            held = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if not info.is_dir()}
            pairs = _pairs(path, held, of_file)
            parts = {
                split: _part(path, _array(path, archive, held[one]), _array(path, archive, held[other]), (one, other))
                for split, (one, other) in pairs.items()
            }
            named = next((name for name in _NAMES if name in held), None)
            used = {named, *(name for pair in pairs.values() for name in pair)}
            if others := [name for name in held if name not in used]:
                listed = ", ".join(map(short, others[:5]))
                unused[f"arrays of {path.name} that are not of {of_file or 'a split'} ({listed})"] += len(others)
            return parts, None if named is None else _texts(path, named, _array(path, archive, held[named]))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, *_DAMAGED) as error:
        raise SourceError(f"{path} is damaged or no .npz file: {error}; {_ADVICE}") from error


def _pairs(path: Path, held: Mapping[str, zipfile.ZipInfo], of_file: str) -> dict[str, tuple[str, str]]:
    """The names of images and labels of each split."""
    found: dict[str, tuple[str, str]] = {}
    for split, folders in SPLIT_FOLDERS.items():
        for images, labels in _PAIRS:
            for folder in folders:
                if images.format(folder) in held and labels.format(folder) in held:
                    found.setdefault(split, (images.format(folder), labels.format(folder)))
    whole = next((pair for pair in _UNSPLIT if set(pair) <= set(held)), None)
    if of_file:
        pair = whole or found.get(of_file)
        found = {} if pair is None else {of_file: pair}
    elif not found and whole is not None:
        found = {"train": whole}
    if not found:
        raise SourceError(
            f"{path} holds {', '.join(map(short, held)) or 'nothing'}; name the arrays x_train, y_train, x_test and "
            "y_test, or images and labels"
        )
    return found


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[np.generic]:
    """One array, whose header is checked before memory is asked for."""
    where = f"{path}: array {short(info.filename.removesuffix('.npy'))}"
    try:
        with archive.open(info) as stream:
            shape, dtype = _header(stream)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject:
            raise SourceError(f"{where} holds Python objects, which only pickle reads; {_ADVICE} of numbers")
        if size > (most := min(MAX_BYTES, _memory(), info.file_size)):
            raise SourceError(
                f"{where} would take {size:,} bytes, expected at most {most:,}; {_ADVICE} of fewer images"
            )
        with archive.open(info) as stream:
            found: NDArray[np.generic] = np.lib.format.read_array(stream, allow_pickle=False)
            return found
    except SourceError:
        raise
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, *_DAMAGED) as error:
        raise SourceError(f"{where} is damaged: {error}; {_ADVICE}") from error


def _memory() -> int:
    """Bytes of this machine's memory, where the images are held."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"its format is version {version}, expected 1.0 or 2.0")
    return shape, dtype


def _part(path: Path, images: NDArray[np.generic], labels: NDArray[np.generic], keys: tuple[str, str]) -> Part:
    where = f"{path}: array {short(keys[0])}"
    if images.dtype != np.uint8:
        raise SourceError(f"{where} is {images.dtype}, expected uint8 pixels from 0 to 255; convert it with your scale")
    channels_last = images.ndim == 4 and images.shape[3] in (1, 3)
    if not (images.ndim == 3 or channels_last or (images.ndim == 4 and images.shape[1] in (1, 3))) or not images.size:
        raise SourceError(
            f"{where} has shape {list(images.shape)}, expected [n, H, W], [n, H, W, C] or [n, C, H, W] with C = 1 or 3"
        )
    pixels = images.view(np.uint8)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2) if channels_last else pixels
    return np.ascontiguousarray(pixels), _labels(f"{path}: array {short(keys[1])}", labels, len(images))


def _labels(where: str, labels: NDArray[np.generic], images: int) -> NDArray[np.int64]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != (images,):
        raise SourceError(
            f"{where} is {labels.dtype} {list(labels.shape)}, expected a whole number for each of the {images:,} "
            "images, [n] or [n, 1]"
        )
    found = labels.astype(np.int64)
    wrong = np.flatnonzero((found < 0) | (found >= MAX_CLASSES))
    if len(wrong):
        raise SourceError(
            f"{where}: label of image {wrong[0]} is {found[wrong[0]]}, expected 0 to {MAX_CLASSES - 1:,}; correct it"
        )
    return found


def _texts(path: Path, name: str, values: NDArray[np.generic]) -> tuple[str, ...]:
    if values.dtype.kind not in "US" or values.ndim != 1 or not len(values):
        raise SourceError(f"{path}: array {name!r} is {values.dtype} {list(values.shape)}, expected text, [K]")
    try:
        names = tuple(one.decode() if isinstance(one, bytes) else str(one) for one in values.tolist())
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: array {name!r} is no UTF-8: {error}") from None
    if len(set(names)) < len(names) or not all(one and is_text(one) for one in names):
        raise SourceError(f"{path}: array {name!r} has empty or repeated names; name each class once")
    return names


def _class_names(root: Path, names: tuple[str, ...] | None, classes: int) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(classes)))
    if classes > len(names):
        raise SourceError(
            f"{root}: a label is {classes - 1}, but there are names of {len(names)} classes; add the rest"
        )
    return names
