"""Data sets in memory in the place of a store, for a machine without pyarrow."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.sources.contents import ArrayContents
from spikefleet_pipelines.store.manifest import Audit, Manifest, Shard


class MemorySplit:
    """What loaders read of a split."""

    is_detection = False
    location = "memory"

    def __init__(self, name: str, manifest: Manifest, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.name, self.manifest, self.labels = name, manifest, labels
        self.class_names, self.image_shape = manifest.class_names, manifest.image_shape
        self._images = images

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, row: int) -> int:
        return int(self.labels[row])

    def image(self, row: int) -> Tensor:
        return torch.from_numpy(self._images[row].copy())

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._images[rows]

    def views(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self._images[row] for row in rows.tolist()]


class MemoryStore:
    """What a training reads of a store."""

    location = "memory"

    def __init__(self, source: str, contents: ArrayContents) -> None:
        shards, per_class = {}, {}
        for name, (images, labels) in contents.splits.items():
            digest = hashlib.sha256(images.tobytes()).hexdigest()
            shards[name] = (Shard(file=f"{name}.memory", rows=len(labels), bytes=images.nbytes, sha256=digest),)
            per_class[name] = tuple(np.bincount(labels, minlength=len(contents.class_names)).tolist())
        audit = Audit(duplicates=0, cross_split_duplicates=0, images_per_class=per_class, empty_classes={})
        self.manifest = Manifest(
            source=source,
            class_names=contents.class_names,
            image=contents.image,
            options={},
            shards=shards,
            audit=audit,
        )
        self._splits = {
            name: MemorySplit(name, self.manifest, images, labels) for name, (images, labels) in contents.splits.items()
        }

    def split(self, name: str) -> MemorySplit:
        return self._splits[name]

    samples = split


def as_store(source: str, contents: ArrayContents) -> Any:
    """A store for `train`, which asks only for what is here."""
    return cast("Any", MemoryStore(source, contents))
