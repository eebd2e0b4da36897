"""Writing a store into a temporary directory next to it, which is renamed when complete."""

import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.data_set_name import published_name
from spikefleet_pipelines.store.event_format import EventAudit, EventFormat
from spikefleet_pipelines.store.manifest import (
    MANIFEST_NAME,
    Audit,
    BoxAudit,
    ImageFormat,
    Manifest,
    Shard,
    SkippedFile,
    is_text,
    parse_manifest,
)
from spikefleet_pipelines.store.origin import ORIGIN_NAME
from spikefleet_pipelines.store.shards import Targets, check_annotations, write_shard

SHARD_BYTES = 256 << 20

_PART = ".part"
_OLD = ".old"


def content_digests(images: Iterable[Any]) -> list[bytes]:
    """Compute a 16-byte BLAKE2b digest of each stored image (any buffer), to find duplicates."""
    return [hashlib.blake2b(image, digest_size=16).digest() for image in images]


class StoreWriter:
    """Collects the splits of one data set; a context manager that removes its files unless `commit` was called.

    Args:
        out: directory of the store. Concurrent writers may create it first; see `commit`.
        source: name of the source.
        class_names: in the order of the class indices.
        image: format of the images; None where `events` is given.
        options: recorded in the manifest.
        overwrite: replace an existing store.
        shard_bytes: approximate maximum size of a shard of raw images.
        category_ids: of a detection store, the id of each class in the annotations; None for classification.
        stand_ins: aliases of splits, used where the split itself is not written: {"test": "val"}.
        name: of the data set; None: that of its published set, see `data_set_name`.
        otherwise: its name where it is no published set; None: the source's.
        skip_bad: whether the source may leave out files that it cannot read; it adds them to `skipped`.
        events: format of the events, for `EventStoreWriter`.

    Attributes:
        unused: number of what the source has and does not use, by reason; set by the source.
        skipped: files that were left out; added by the source.
    """

    def __init__(
        self,
        out: Path,
        *,
        source: str,
        class_names: Sequence[str],
        image: ImageFormat | None,
        options: dict[str, JsonValue],
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        category_ids: Sequence[int] | None = None,
        stand_ins: Mapping[str, str] | None = None,
        name: str | None = None,
        otherwise: str | None = None,
        skip_bad: bool = False,
        events: EventFormat | None = None,
    ) -> None:
        self.out = out
        self.source = source
        self.name, self.otherwise = name, otherwise
        self.class_names = tuple(class_names)
        self.image, self.events = image, events
        self.options = options
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self.directory = out.parent / f".{out.name}.{secrets.token_hex(8)}{_PART}"
        self.category_ids = None if category_ids is None else tuple(category_ids)
        self.stand_ins = dict(stand_ins or {})
        self._lock: int | None = None
        for name in self.class_names:
            if not is_text(name):
                raise StoreError(
                    f"source {source!r}: class name {name!r} is empty or not Unicode text (UTF-8); rename the class"
                )
        _refuse_equal_names(source, self.class_names)
        self.skip_bad = skip_bad
        self.unused: dict[str, int] = {}
        self.skipped: list[SkippedFile] = []
        self._shards: dict[str, list[Shard]] = {}
        self._digests: dict[str, list[bytes]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._boxes: dict[str, list[BoxAudit]] = {}

    def __enter__(self) -> Self:
        if self.overwrite:
            self._refuse_foreign_files()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            remove_remains(self.out)
            self.directory.mkdir()
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            raise StoreError(
                f"store {self.out} cannot be created: {error.strerror}; choose another directory"
            ) from error
        self._lock = _locked_directory(self.directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def _refuse_foreign_files(self) -> None:
        """Raises StoreError if the store to replace holds what is not its own: raw data, or a user's file."""
        there = self.out / MANIFEST_NAME
        if not there.is_file():
            return
        shards = parse_manifest(there.read_bytes(), str(there)).shards.values()
        own = {MANIFEST_NAME, ORIGIN_NAME, *(shard.file for split in shards for shard in split)}
        # A killed extension of the store leaves a shard that no manifest names.
        names = (entry.name for entry in self.out.iterdir() if entry.suffix != ".arrow")
        foreign = sorted(name for name in names if name not in own)
        if foreign:
            raise StoreError(
                f"{self.out} holds {foreign[0]!r}, which is not a part of the store and would be removed with it; move "
                "it away, or choose another directory"
            )

    def shard_name(self, split: str, number: int) -> str:
        """Return the file name of a shard; `number` counts from 0."""
        return f"{split}-{number:05d}.arrow"

    def write_images(self, split: str, images: NDArray[np.uint8], targets: Targets) -> None:
        """Add raw images to a split, in as many shards as needed.

        Args:
            split: name of the split.
            images: uint8 [n, C, H, W].
            targets: labels [n], or the objects of the n images.

        Raises:
            StoreError: type, shape or number of the images is wrong, or a label, box or category is invalid.
        """
        if self.image is None:
            raise StoreError(f"source {self.source!r}: a store of events takes recordings, not images")
        if images.dtype != np.uint8 or images.shape[1:] != self.image.shape or len(images) != len(targets):
            raise StoreError(
                f"split {split!r}: images are {images.dtype} {list(images.shape)} with {len(targets)} labels, expected "
                f"uint8 [n, C, H, W] with [C, H, W] = {self.image.shape} and n labels"
            )
        rows = max(1, self.shard_bytes // max(1, images[:1].nbytes))
        for start in range(0, len(images), rows):
            part = np.ascontiguousarray(images[start : start + rows])
            stop = start + rows
            of_part = targets.rows(start, stop) if isinstance(targets, AnnotationColumns) else targets[start:stop]
            path = self.directory / self.shard_name(split, len(self._shards.get(split, ())))
            self.add_shard(split, write_shard(path, part, of_part, self.image), of_part, content_digests(part))

    def add_shard(
        self, split: str, shard: Shard, targets: Targets, digests: list[bytes], computed_areas: int = 0
    ) -> None:
        """Add a shard that this or another process wrote to `directory`.

        Args:
            split: name of the split.
            shard: entry of the file.
            targets: labels [n], or the objects of the n images.
            digests: of its images, see `content_digests`.
            computed_areas: number of its annotations without an area, for the audit.

        Raises:
            StoreError: the file is missing, or a label, box or category is invalid.
        """
        path = self.directory / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise StoreError(
                f"shard {path} is missing or incomplete; all workers must write to a shared directory "
                f"{self.directory.parent}"
            )
        if isinstance(targets, AnnotationColumns) != (self.category_ids is not None):
            raise StoreError(f"source {self.source!r}: a store holds either labels or annotations")
        if isinstance(targets, AnnotationColumns):
            counts = self._count_objects(split, targets, computed_areas)
        else:
            counts = self._count_labels(split, shard, targets)
        self._shards.setdefault(split, []).append(shard)
        self._digests.setdefault(split, []).extend(digests)
        self._counts[split] = self._counts.get(split, np.zeros_like(counts)) + counts

    def _count_labels(self, split: str, shard: Shard, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        classes = len(self.class_names)
        outside = (labels < 0) | (labels >= classes)
        if outside.any():
            row = int(outside.argmax())
            raise StoreError(
                f"source {self.source!r}, split {split!r}: label is {labels[row]} (image {row} of shard {shard.file}), "
                f"expected 0 to {classes - 1}"
            )
        return np.bincount(labels, minlength=classes)

    def _count_objects(self, split: str, columns: AnnotationColumns, computed_areas: int) -> NDArray[np.int64]:
        """Audit the boxes; return the number of images with each class, without crowds."""
        assert self.category_ids is not None
        labels = check_annotations(f"source {self.source!r}, split {split!r}", columns, self.category_ids)
        self._boxes.setdefault(split, []).append(
            audit_boxes(columns, labels, len(self.class_names), computed_areas),
        )
        shown = np.unique(np.stack([columns.image_of_objects(), labels])[:, ~columns.crowd], axis=1)
        return np.bincount(shown[1], minlength=len(self.class_names))

    def manifest(self) -> Manifest:
        """Build the manifest of the added splits.

        Raises:
            StoreError: a class has no training image (for detection the audit records this instead).
        """
        shards = {split: tuple(shards) for split, shards in self._shards.items()}
        stand_ins = {
            name: original for name, original in self.stand_ins.items() if name not in shards and original in shards
        }
        manifest = Manifest(
            source=self.source,
            name=self.name,
            task="classification" if self.category_ids is None else "detection",
            class_names=self.class_names,
            category_ids=self.category_ids,
            image=self.image,
            events=self.events,
            options=self.options,
            shards={**shards, **{name: shards[original] for name, original in stand_ins.items()}},
            audit=self._audit(stand_ins or None),
        )
        if manifest.name is not None:
            return manifest
        named = published_name(self.source, self.class_names, self.category_ids, manifest.own_images)
        return manifest.model_copy(update={"name": named or self.otherwise or self.source})

    def commit(self) -> Manifest:
        """Write the manifest and rename the directory to `out`.

        If another process created an equal store in the meantime, that one is kept.

        Raises:
            StoreError: `out` contains something else, or a class has no training image.
        """
        manifest = self.manifest()
        (self.directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        try:
            self.directory.replace(self.out)  # works where `out` is missing or an empty directory
        except OSError as error:
            if not (self.out / MANIFEST_NAME).is_file():
                raise StoreError(
                    f"store {self.out} cannot be written: {error.strerror}; choose another directory"
                ) from error
            self._replace_store(manifest)
        return manifest

    def _replace_store(self, manifest: Manifest) -> None:
        if not self.overwrite:
            there = self.out / MANIFEST_NAME
            same = parse_manifest(there.read_bytes(), str(there)).model_copy(update={"name": manifest.name})
            if same == manifest:
                return
            raise StoreError(f"{self.out} already contains another store; choose another directory or use --overwrite")
        old = self.directory.with_suffix(_OLD)
        lock = _locked_directory(self.out)
        try:
            self.out.replace(old)
            self.directory.replace(self.out)
            shutil.rmtree(old)
        finally:
            if lock is not None:
                os.close(lock)

    def _event_audit(self) -> dict[str, EventAudit] | None:
        """The audit of the events of each split; None for images."""
        return None

    def _audit(self, same_as: dict[str, str] | None) -> Audit:
        empty = {
            split: tuple(name for name, count in zip(self.class_names, counts, strict=True) if count == 0)
            for split, counts in self._counts.items()
        }
        if empty.get("train") and self.category_ids is None:
            what = "image" if self.events is None else "recording"
            lacking = empty["train"]
            more = f" and {len(lacking) - 10:,} more" if len(lacking) > 10 else ""
            raise StoreError(
                f"source {self.source!r}: no training {what} of class {', '.join(map(repr, lacking[:10]))}{more}; add "
                f"{what}s or remove the class"
            )
        unique = {split: set(digests) for split, digests in self._digests.items()}
        occurrences = Counter(digest for digests in unique.values() for digest in digests)
        return Audit(
            duplicates=sum(map(len, self._digests.values())) - len(occurrences),
            cross_split_duplicates=sum(1 for count in occurrences.values() if count > 1),
            images_per_class={split: tuple(map(int, counts)) for split, counts in self._counts.items()},
            empty_classes={split: names for split, names in empty.items() if names},
            boxes={split: _sum(parts) for split, parts in self._boxes.items()} or None,
            events=self._event_audit(),
            same_as=same_as,
            unused=self.unused or None,
            skipped=tuple(self.skipped) or None,
        )


def _refuse_equal_names(source: str, names: Sequence[str]) -> None:
    """Refuse classes that are one in what is read, such as a folder that macOS wrote beside one of Linux."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise StoreError(
                f"source {source!r}: the names of two classes are the same text in two forms of Unicode, {other!a} and "
                f"{name!a}; write both the same way, for example in the form NFC"
            )


def remove_remains(out: Path) -> None:
    """Remove what killed writers left beside a store; a store that one was about to replace is put back.

    Args:
        out: directory of the store.
    """
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        if path.suffix not in (_PART, _OLD) or not path.is_dir():
            continue
        lock = _locked_directory(path)
        if lock is None:  # its writer lives
            continue
        try:
            if path.suffix == _OLD and not out.exists() and (path / MANIFEST_NAME).is_file():
                path.replace(out)
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _locked_directory(path: Path) -> int | None:
    """Lock a directory until the descriptor is closed, or the process ends; None if another process has locked it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def audit_boxes(columns: AnnotationColumns, labels: NDArray[np.int64], classes: int, computed_areas: int) -> BoxAudit:
    """Count the unusual boxes of images.

    Args:
        columns: the annotations.
        labels: class index of each object, [m].
        classes: number of classes.
        computed_areas: number of annotations without an area.
    """
    image = columns.image_of_objects()
    limits = np.stack([columns.widths[image], columns.heights[image]], axis=1)
    start, size = columns.boxes[:, :2], columns.boxes[:, 2:]
    end = start + size
    no_area = (size <= 0).any(1)
    outside = ~no_area & ((end <= 0) | (start >= limits)).any(1)
    beyond = ~no_area & ~outside & ((start < -1) | (end > limits + 1)).any(1)
    return BoxAudit(
        objects=len(labels),
        objects_per_class=tuple(np.bincount(labels[~columns.crowd], minlength=classes).tolist()),
        crowds=int(columns.crowd.sum()),
        empty_images=int((np.diff(columns.offsets) == 0).sum()),
        no_area=int(no_area.sum()),
        beyond_border=int(beyond.sum()),
        outside=int(outside.sum()),
        computed_areas=computed_areas,
    )


def _sum(parts: Sequence[BoxAudit]) -> BoxAudit:
    per_class = np.sum([part.objects_per_class for part in parts], axis=0)
    names = [name for name in BoxAudit.model_fields if name != "objects_per_class"]
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    return BoxAudit(objects_per_class=tuple(per_class.tolist()), **sums)
