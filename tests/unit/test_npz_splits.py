"""Splits of .npz files: two files of one split, a holdout beside given splits, and arrays that are not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.npz_arrays import read_npz
from spikefleet_pipelines.sources.npz_arrays_config import NpzOptions

IMAGES = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((2, 2), np.uint8)
CLASSES = np.arange(40) % 2


def write(root: Path, **splits: slice) -> Path:
    """A file for each split; the pixels of an image are its number."""
    root.mkdir()
    for name, part in splits.items():
        np.savez(root / f"{name}.npz", images=IMAGES[part], labels=CLASSES[part])
    return root


def numbers(root: Path, **options: Any) -> dict[str, set[int]]:
    """The images of each split."""
    splits = read_npz(root, NpzOptions(**options), 0).splits
    return {split: set(images[:, 0, 0, 0].tolist()) for split, (images, _) in splits.items()}


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "root", train=slice(0, 20), val=slice(20, 30), valid=slice(30, 40))
    with pytest.raises(SourceError, match=r"has val.npz and valid.npz, which are both val; keep one of them"):
        numbers(root)
    (root / "valid.npz").unlink()
    assert numbers(root) == {"train": set(range(20)), "val": set(range(20, 30))}


def test_a_holdout_beside_given_splits(tmp_path: Path) -> None:
    root = write(tmp_path / "root", train=slice(0, 20), val=slice(20, 30))
    found = numbers(root, holdout=0.2)
    assert found["test"] == set(range(20, 30)), "the given val is reported"
    assert len(found["val"]) == 4
    assert found["train"] | found["val"] == set(range(20))
    np.savez(root / "test.npz", images=IMAGES[30:], labels=CLASSES[30:])
    assert set(numbers(root)) == {"train", "val", "test"}
    with pytest.raises(SourceError, match=r"option holdout=0.2, but the data set has val and test splits; remove"):
        numbers(root, holdout=0.2)
    (root / "val.npz").unlink()
    assert numbers(root) == numbers(root, holdout=0.1)
    assert set(numbers(root, holdout=0)) == {"train", "test"}


def test_arrays_that_are_not_used_are_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "root", train=slice(0, 20))
    assert read_npz(root, NpzOptions(), 0).unused == {}
    arrays = {"x_train": IMAGES, "y_train": CLASSES, "x_test": IMAGES, "y_test": CLASSES}
    np.savez(root / "train.npz", **arrays)
    unused = read_npz(root, NpzOptions(), 0).unused
    assert unused == {"arrays of train.npz that are not of train ('x_test', 'y_test')": 2}
