"""Reading a store: memory-mapped Arrow IPC shards with random access.

A store is a directory with `manifest.json` and the shards that it lists for every split (`shards.py` has their
columns). A directory without a manifest is not a store.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.annotations import AnnotationColumns, Annotations
from spikefleet_pipelines.store.data_set_name import name_after, published_name, without_digests
from spikefleet_pipelines.store.event_reader import EventSplit
from spikefleet_pipelines.store.event_samples import EventSamples
from spikefleet_pipelines.store.manifest import MANIFEST_NAME, Manifest, parse_manifest
from spikefleet_pipelines.store.origin import Origin
from spikefleet_pipelines.store.remote import RemoteStore, default_cache_dir, locate
from spikefleet_pipelines.store.shards import check_shard, open_shard


def _named(manifest: Manifest, store: Path | str) -> Manifest:
    """The manifest of a store of an earlier version, with the name that its data set would have been given.

    Args:
        manifest: of the store.
        store: its directory or URI; it names anybody's data for which no record tells the folder.
    """
    if manifest.name is not None:
        return manifest
    name = published_name(manifest.source, manifest.class_names, manifest.category_ids, manifest.own_images)
    if name is None:
        record = Origin.read(store) if isinstance(store, Path) else None
        folder = without_digests(Path(store).absolute().name) if record is None else record.root
        name = name_after(Path(folder), manifest.source)
    return manifest.model_copy(update={"name": name})


def _what_to_prepare(folder: Path) -> str:
    """What a folder lacks to be a store, and how to make one: of the raw files in it, or there."""
    if not folder.is_dir():
        return f"there is no such directory; run `spikefleet data prepare SOURCE --out {folder}`"
    lacks = f"it has no {MANIFEST_NAME}"
    if next(folder.iterdir(), None) is None:
        return f"{lacks}; run `spikefleet data prepare SOURCE --out {folder}`"
    return f"{lacks}; if it holds raw images or recordings, run `spikefleet data prepare auto {folder} --out STORE`"


class Store:
    """An opened data set; see `Store.open`."""

    def __init__(self, location: str, manifest: Manifest, files: dict[str, tuple[Path, ...]]) -> None:
        self.location = location
        self.manifest = manifest
        self._files = files
        self._splits: dict[str, Split] = {}
        self._recordings: dict[str, EventSplit] = {}
        self._samples: dict[str, EventSamples] = {}

    @classmethod
    def open(
        cls,
        store: str | os.PathLike[str],
        cache_dir: Path | None = None,
        verify: bool = True,
        filesystem: Any = None,
    ) -> "Store":
        """Open a store at a local path, or at any `pyarrow.fs` URI (s3://, gs://, file://).

        Args:
            store: path or URI of the directory; a path inside `filesystem` when that is given.
            cache_dir: directory for the shards of a remote store; default `$XDG_CACHE_HOME/spikefleet/shards`.
            verify: check the SHA-256 of every shard, at 0.5 to 2 GB/s. One process of a job suffices; its workers can
                compare `manifest.content_hash`. Sizes and row counts are always checked.
            filesystem: a `pyarrow.fs.FileSystem`, for endpoints that no URI describes.

        Raises:
            StoreError: there is no store, or a part of it is missing or corrupt; the message names the file.
        """
        where = locate(store, filesystem)
        if isinstance(where, RemoteStore):
            manifest = _named(parse_manifest(where.read_manifest(), f"{where.uri}/{MANIFEST_NAME}"), where.uri)
            cache = cache_dir or default_cache_dir()
            files = {
                name: tuple(where.fetch(shard, cache, verify) for shard in shards)
                for name, shards in manifest.shards.items()
            }
            return cls(where.uri, manifest, files)
        manifest_file = where / MANIFEST_NAME
        if not manifest_file.is_file():
            raise StoreError(f"{where} is not a store: {_what_to_prepare(where)}")
        manifest = _named(parse_manifest(manifest_file.read_bytes(), str(manifest_file)), where)
        for shards in manifest.shards.values():
            for shard in shards:
                check_shard(where / shard.file, shard, verify)
        files = {name: tuple(where / shard.file for shard in shards) for name, shards in manifest.shards.items()}
        return cls(str(where), manifest, files)

    @property
    def absolute_location(self) -> str:
        """Absolute path of the store, for processes with other working directories; a URI is returned unchanged."""
        return self.location if "://" in self.location else str(Path(self.location).absolute())

    @staticmethod
    def is_store(path: str | os.PathLike[str]) -> bool:
        """Whether a local directory holds a manifest."""
        return (Path(path) / MANIFEST_NAME).is_file()

    def split(self, name: str) -> "Split":
        """Return the images of a split, for example "train", "val" or "test".

        Raises:
            StoreError: the store has no such split or holds events, or a shard does not match the manifest.
        """
        self._check_split(name)
        if self.manifest.events is not None:
            raise StoreError(
                f"{self.location} holds recordings of events, not images; choose a store of images, or read it with "
                f"Store.samples({name!r}) or Store.recordings({name!r})"
            )
        if name not in self._splits:
            self._splits[name] = Split(name, self.location, self.manifest, self._files[name])
        return self._splits[name]

    def samples(self, name: str) -> "Samples":
        """Return the samples of a split, images or recordings of events: what loaders read.

        Raises:
            StoreError: the store has no such split, or a shard does not match the manifest.
        """
        if self.manifest.events is None:
            return self.split(name)
        if name not in self._samples:
            self._samples[name] = EventSamples(self.recordings(name))
        return self._samples[name]

    def recordings(self, name: str) -> EventSplit:
        """Return the recordings of a split of a store of events.

        Raises:
            StoreError: the store has no such split or holds images, or a shard does not match the manifest.
        """
        self._check_split(name)
        if name not in self._recordings:
            self._recordings[name] = EventSplit(name, self.location, self.manifest, self._files[name])
        return self._recordings[name]

    def _check_split(self, name: str) -> None:
        if name not in self._files:
            raise StoreError(
                f"{self.location} has no split {name!r}, expected one of {', '.join(map(repr, self._files))}"
            )


class Split:
    """Random access to the rows of one split.

    It pickles as its paths, so that spawned loader processes map the files again.

    Attributes:
        image_shape: [C, H, W] of raw images; None for encoded ones, whose sizes vary.
    """

    def __init__(self, name: str, location: str, manifest: Manifest, files: Sequence[Path]) -> None:
        self.name = name
        self.location = location
        self.manifest = manifest
        self.image_shape = manifest.image_shape
        self._files = tuple(files)
        if self.image_shape is None:
            # Late, because torchvision takes seconds to import; early enough for loader processes.
            from spikefleet_pipelines.store.decode import decode_rgb

            self._decode = decode_rgb
        shards = manifest.shards[name]
        self._shards = [
            open_shard(file, shard, manifest.image_format, len(manifest.class_names), manifest.category_ids)
            for file, shard in zip(files, shards, strict=True)
        ]
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._labels: NDArray[np.int64] | None = None
        if not self.is_detection:
            self._labels = np.concatenate([np.empty(0, np.int64), *(columns.labels for columns in self._shards)])

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self.name, self.location, self.manifest, self._files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        return self.manifest.class_names

    @property
    def is_detection(self) -> bool:
        """Whether rows have `annotations`; otherwise they have `labels`."""
        return self.manifest.task == "detection"

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, [n].

        Raises:
            StoreError: this is a detection store.
        """
        if self._labels is None:
            raise StoreError(
                f"split {self.name!r} of {self.location} is for detection: it has annotations and no labels"
            )
        return self._labels

    def label(self, row: int) -> int:
        """Class of one image."""
        return int(self.labels[self._check(row)])

    def annotations(self, row: int) -> Annotations:
        """Return the objects of one image, as views into the mapped shard.

        Raises:
            StoreError: this is a classification store.
        """
        number = int(np.searchsorted(self._starts, self._check(row), side="right")) - 1
        columns = self._shards[number]
        if columns.annotations is None:
            raise StoreError(f"split {self.name!r} of {self.location} is for classification: it has no annotations")
        return columns.annotations.image(row - int(self._starts[number]), columns.labels)

    @property
    def annotation_columns(self) -> list[AnnotationColumns]:
        """The objects of all images, shard by shard, as views into the mapped shards.

        Raises:
            StoreError: this is a classification store.
        """
        found = [columns.annotations for columns in self._shards if columns.annotations is not None]
        if not self.is_detection:
            raise StoreError(f"split {self.name!r} of {self.location} is for classification: it has no annotations")
        return found

    def image(self, row: int) -> Tensor:
        """Read one image, uint8 [C, H, W]; an encoded one is decoded to RGB.

        Raises:
            StoreError: it cannot be decoded; the message names the row.
        """
        if self.image_shape is not None:
            return torch.from_numpy(self.gather(np.array([self._check(row)]))[0])
        try:
            return self._decode(self.encoded_image(row))
        except ValueError as error:
            raise StoreError(f"row {row} of split {self.name!r} in {self.location}: {error}") from error

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copy raw images into a batch [B, C, H, W], with one vectorised operation per shard.

        Raises:
            StoreError: the images are encoded.
        """
        if self.image_shape is None:
            raise StoreError(self._varying)
        if len(self._shards) == 1:
            pixels = self._shards[0].data.take(rows, axis=0)
        else:
            pixels = np.empty((len(rows), int(np.prod(self.image_shape))), np.uint8)
            shard_of = np.searchsorted(self._starts, rows, side="right") - 1
            for number in np.unique(shard_of):
                inside = shard_of == number
                pixels[inside] = self._shards[number].data.take(rows[inside] - self._starts[number], axis=0)
        return pixels.reshape(-1, *self.image_shape)

    def views(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return raw images [C, H, W], as views into the mapped shards.

        Raises:
            StoreError: the images are encoded.
        """
        if self.image_shape is None:
            raise StoreError(self._varying)
        whole = [shard.data.reshape(-1, *self.image_shape) for shard in self._shards]
        if len(whole) == 1:
            return [whole[0][row] for row in rows.tolist()]
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        inside = rows - self._starts[numbers]
        return [whole[number][row] for number, row in zip(numbers.tolist(), inside.tolist(), strict=True)]

    def encoded_image(self, row: int) -> NDArray[np.uint8]:
        """Return the bytes of an image file, as a view into the mapped shard."""
        number = int(np.searchsorted(self._starts, self._check(row), side="right")) - 1
        return self._shards[number].encoded_image(row - int(self._starts[number]))

    @property
    def _varying(self) -> str:
        return f"split {self.name!r} of {self.location} holds encoded images of varying size; read them with image()"

    def _check(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside split {self.name!r}, expected 0 to {len(self) - 1}")
        return row


Samples = Split | EventSamples
"""What loaders, evaluations and reports read of a split, whatever its samples are."""
