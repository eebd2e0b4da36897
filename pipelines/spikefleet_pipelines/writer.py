"""Writing a store: into a temporary directory beside it, which is renamed when everything is there."""

import hashlib
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from spikefleet_pipelines.manifest import MANIFEST_NAME, Audit, ImageFormat, Manifest, Shard, StoreError, parse_manifest
from spikefleet_pipelines.shards import write_shard

SHARD_BYTES = 256 << 20


def content_digests(images: NDArray[np.uint8] | Iterable[bytes]) -> list[bytes]:
    """A 16-byte BLAKE2b digest of each stored image, by which duplicates are found."""
    return [hashlib.blake2b(image, digest_size=16).digest() for image in images]


class StoreWriter:
    """Collects the splits of one data set; a context manager that leaves nothing behind unless `commit` was called.

    Args:
        out: the directory to become the store. Another writer may win the race for it; see `commit`.
        overwrite: replace a store that is already there.
        shard_bytes: about how large a shard of raw images may become.
    """

    def __init__(
        self,
        out: Path,
        *,
        source: str,
        class_names: Sequence[str],
        image: ImageFormat,
        options: dict[str, JsonValue],
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.out = out
        self.source = source
        self.class_names = tuple(class_names)
        self.image = image
        self.options = options
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self.directory = out.parent / f".{out.name}.{secrets.token_hex(8)}.part"
        self._shards: dict[str, list[Shard]] = {}
        self._digests: dict[str, list[bytes]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def write_images(self, split: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Add raw images [n, C, H, W] and labels [n] to a split, in as many shards as they need."""
        if images.dtype != np.uint8 or images.shape[1:] != self.image.shape or len(images) != len(labels):
            raise StoreError(
                f"images of split {split!r} are {images.dtype} {list(images.shape)} with {len(labels)} labels; "
                f"uint8 [n, C, H, W] with [C, H, W] = {self.image.shape} and n labels are wanted."
            )
        rows = max(1, self.shard_bytes // max(1, images[:1].nbytes))
        for start in range(0, len(images), rows):
            part, part_labels = np.ascontiguousarray(images[start : start + rows]), labels[start : start + rows]
            path = self.directory / shard_name(split, len(self._shards.get(split, ())))
            self.add_shard(split, write_shard(path, part, part_labels, self.image), part_labels, content_digests(part))

    def add_shard(self, split: str, shard: Shard, labels: NDArray[np.int64], digests: list[bytes]) -> None:
        """Add a shard that was written, perhaps by another process, to `directory`.

        Raises:
            StoreError: the file is not there, or a label is out of range.
        """
        path = self.directory / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise StoreError(
                f"shard {path} is not here as it was written; all workers must see directory {self.directory.parent}."
            )
        classes = len(self.class_names)
        outside = (labels < 0) | (labels >= classes)
        if outside.any():
            row = int(outside.argmax())
            raise StoreError(
                f"source {self.source!r}, split {split!r}: label {labels[row]} (image {row} of shard {shard.file}) is "
                f"outside 0 to {classes - 1}."
            )
        self._shards.setdefault(split, []).append(shard)
        self._digests.setdefault(split, []).extend(digests)
        counts = np.bincount(labels, minlength=classes)
        self._counts[split] = self._counts.get(split, np.zeros(classes, np.int64)) + counts

    def commit(self) -> Manifest:
        """Write the manifest and rename the directory to `out`.

        If another process has put an equal store there in the meantime, that one stays.

        Raises:
            StoreError: `out` holds something else, or a class has no training image.
        """
        manifest = Manifest(
            source=self.source,
            class_names=self.class_names,
            image=self.image,
            options=self.options,
            shards={split: tuple(shards) for split, shards in self._shards.items()},
            audit=self._audit(),
        )
        (self.directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        try:
            self.directory.replace(self.out)  # works where `out` is missing or an empty directory
        except OSError as error:
            if not (self.out / MANIFEST_NAME).is_file():
                raise StoreError(
                    f"{self.out} cannot be written: {error.strerror}; choose another directory."
                ) from error
            self._replace_store(manifest)
        return manifest

    def _replace_store(self, manifest: Manifest) -> None:
        if not self.overwrite:
            there = self.out / MANIFEST_NAME
            if parse_manifest(there.read_bytes(), str(there)) == manifest:
                return
            raise StoreError(f"{self.out} already holds another store; choose another directory or overwrite it.")
        old = self.directory.with_suffix(".old")
        self.out.replace(old)
        self.directory.replace(self.out)
        shutil.rmtree(old)

    def _audit(self) -> Audit:
        empty = {
            split: tuple(name for name, count in zip(self.class_names, counts, strict=True) if count == 0)
            for split, counts in self._counts.items()
        }
        if empty.get("train"):
            raise StoreError(
                f"source {self.source!r}: no training image of class {', '.join(map(repr, empty['train']))}."
            )
        unique = {split: set(digests) for split, digests in self._digests.items()}
        occurrences = Counter(digest for digests in unique.values() for digest in digests)
        return Audit(
            duplicates=sum(map(len, self._digests.values())) - len(occurrences),
            cross_split_duplicates=sum(1 for count in occurrences.values() if count > 1),
            images_per_class={split: tuple(map(int, counts)) for split, counts in self._counts.items()},
            empty_classes={split: names for split, names in empty.items() if names},
        )


def shard_name(split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{split}-{number:05d}.arrow"
