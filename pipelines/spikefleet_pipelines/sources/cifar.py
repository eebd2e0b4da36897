"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 60,000 colour images of 32x32 pixels, in the official Python batches."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.cifar_config import (
    CIFAR10,
    CIFAR10_LAYOUT,
    CIFAR100,
    CIFAR100_LAYOUT,
    CifarLayout,
    CifarOptions,
)
from spikefleet_pipelines.sources.contents import ArrayContents, hold_out_validation
from spikefleet_pipelines.sources.python2_pickle import read_plain_pickle
from spikefleet_pipelines.sources.source import Source

_PIXELS = 3 * 32 * 32
_TEST_IMAGES = 10_000


def read_cifar10(root: Path, options: CifarOptions, seed: int) -> ArrayContents:
    """Read CIFAR-10; by default a tenth of the training images of each class (5,000 in all) is held out for val.

    Raises:
        SourceError: a file is missing or damaged.
    """
    return _read(CIFAR10, CIFAR10_LAYOUT, root, options, seed)


def read_cifar100(root: Path, options: CifarOptions, seed: int) -> ArrayContents:
    """Read the 100 fine classes of CIFAR-100; by default a tenth of the training images of each is held out for val.

    Raises:
        SourceError: a file is missing or damaged.
    """
    return _read(CIFAR100, CIFAR100_LAYOUT, root, options, seed)


def _read(source: Source, layout: CifarLayout, root: Path, options: CifarOptions, seed: int) -> ArrayContents:
    inside = root / layout.folder
    folder = inside if inside.is_dir() else root
    for name in layout.files:
        if not (folder / name).is_file():
            raise source.missing(folder / name)
    class_names = _class_names(folder / layout.meta_file, layout)
    classes = len(class_names)
    batches = [_read_batch(folder / name, layout, classes, layout.train_images) for name in layout.train_files]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    splits = hold_out_validation(images, labels, options.holdout, seed, options.train_images)
    test = _read_batch(folder / layout.test_file, layout, classes, _TEST_IMAGES)
    return ArrayContents(class_names, {**splits, "test": test})


def _class_names(path: Path, layout: CifarLayout) -> tuple[str, ...]:
    names = _field(path, read_plain_pickle(path), layout.names_key)
    if not all(isinstance(name, str | bytes) and name for name in names) or len(set(names)) != len(names):
        raise SourceError(f"{path}: {layout.names_key} are not different, non-empty names; download it again")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)


def _read_batch(
    path: Path, layout: CifarLayout, classes: int, official: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    expected = f", expected {official:,} images in more than {official * _PIXELS:,} bytes"
    content = read_plain_pickle(path, expected)
    images = content.get("data") if isinstance(content, dict) else None
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _PIXELS:
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise SourceError(f"{path}: data is {found}, expected uint8 [n, {_PIXELS}]; download it again")
    labels = _field(path, content, layout.labels_key)
    if len(labels) != len(images):
        raise SourceError(
            f"{path} has {len(images)} images and {len(labels)} {layout.labels_key}, expected equal numbers; download "
            "it again"
        )
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise SourceError(
                f"{path}: label of image {row} is {label!r}, expected an integer from 0 to {classes - 1}; download it "
                "again"
            )
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _field(path: Path, content: Any, key: str) -> list[Any]:
    value = content.get(key) if isinstance(content, dict) else None
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list) or not value:
        raise SourceError(f"{path} has no list {key!r}, so it is not an official batch; download it again")
    return value
