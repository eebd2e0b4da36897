"""Taking a split out of the training samples of a store: images or recordings of events that nobody trains on.

Networks are judged by them. event_splitting.py holds what is special to recordings.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.event_samples import EventSamples
from spikefleet_pipelines.store.event_splitting import (
    copy_recordings,
    recording_classes,
    recording_digests,
    timeless_digests,
)
from spikefleet_pipelines.store.event_writer import EVENT_SHARD_BYTES, EventStoreWriter
from spikefleet_pipelines.store.manifest import Manifest
from spikefleet_pipelines.store.reader import Samples, Split, Store
from spikefleet_pipelines.store.shards import Targets, write_shard
from spikefleet_pipelines.store.writer import SHARD_BYTES, StoreWriter, content_digests

_TRAIN = "train"
_NO_OBJECT = -1


def take_split(
    store: Store,
    out: Path,
    name: str,
    fraction: float,
    seed: int = 0,
    *,
    overwrite: bool = False,
    shard_bytes: int | None = None,
    groups: Sequence[bytes] | None = None,
) -> Manifest:
    """Write a store whose split `name` is a part of the training images of another one, and `train` is the rest.

    Equal images stay together. The part is the same fraction of each class, rounded, and leaves at least one image of
    it in `train`; an image with several objects counts for the rarest of its classes. Which images are chosen depends
    on their bytes and the seed, not on their order.

    Of a store of events, recordings are chosen, with all of their label times. Recordings that differ in the times of
    their events alone stay together: one in which the same is seen in another order is no new sample.

    Args:
        store: with a split "train"; it stays as it is.
        out: directory of the new store.
        name: of the new split.
        fraction: of the training images or recordings, in (0, 1).
        seed: of the choice.
        overwrite: replace a store at `out`.
        shard_bytes: approximate size of a shard; None: the default of images or of events.
        groups: of each training image; images of a group stay together. None: of equal images.

    Returns:
        The manifest of the new store, whose options record the store that it was taken from.

    Raises:
        StoreError: the fraction is no image of any class, the split exists already, or `out` is the store itself or
            contains something else.
    """
    manifest = store.manifest
    if name in manifest.shards:
        raise StoreError(
            f"{store.location} already has a split {name!r}; use it as it is, or divide the store it was taken from"
        )
    if "://" not in store.location and out.resolve() == Path(store.location).resolve():
        raise StoreError(f"{out} is the store that the split is taken from; choose another directory")
    if not 0.0 < fraction < 1.0:
        raise StoreError(f"the fraction of split {name!r} is {fraction}, expected more than 0 and less than 1")
    chosen = _chosen(store, fraction, seed, groups)
    if not chosen.any():
        what = "image" if manifest.events is None else "recording"
        raise StoreError(
            f"{fraction:g} of the {len(chosen):,} training {what}s of {store.location} is no {what} of any class; set "
            "a larger fraction"
        )
    recorded: JsonValue = {"split": name, "fraction": fraction, "seed": seed, "of": manifest.content_hash}
    options = {**manifest.options, f"taken_{name}": recorded}
    kept = [other for other in manifest.shards if other != _TRAIN and manifest.original(other) == other]
    with _writer(store, out, options, overwrite, shard_bytes) as writer:
        _copy(store, _TRAIN, _TRAIN, np.flatnonzero(~chosen), writer)
        _copy(store, _TRAIN, name, np.flatnonzero(chosen), writer)
        for other in kept:
            _copy(store, other, other, None, writer)
        return writer.commit()


def _writer(
    store: Store, out: Path, options: dict[str, JsonValue], overwrite: bool, shard_bytes: int | None
) -> StoreWriter:
    """A writer of a store like another one."""
    manifest = store.manifest
    if manifest.events is None:
        return StoreWriter(
            out,
            source=manifest.source,
            class_names=manifest.class_names,
            image=manifest.image_format,
            options=options,
            overwrite=overwrite,
            shard_bytes=SHARD_BYTES if shard_bytes is None else shard_bytes,
            category_ids=manifest.category_ids,
            stand_ins=manifest.audit.same_as,
            name=manifest.name,
        )
    return EventStoreWriter(
        out,
        source=manifest.source,
        class_names=manifest.class_names,
        events=manifest.events,
        options=options,
        overwrite=overwrite,
        shard_bytes=EVENT_SHARD_BYTES if shard_bytes is None else shard_bytes,
        category_ids=manifest.category_ids,
        stand_ins=manifest.audit.same_as,
        name=manifest.name,
    )


def _chosen(store: Store, fraction: float, seed: int, groups: Sequence[bytes] | None) -> NDArray[np.bool_]:
    """Which training images or recordings become the new split, [n]."""
    if store.manifest.events is None:
        train = store.split(_TRAIN)
        return choose_part(image_digests(train), _strata(train), fraction, seed, groups=groups)
    recordings = store.recordings(_TRAIN)
    strata = rarest_classes(recording_classes(recordings), len(store.manifest.class_names))
    together = timeless_digests(recordings) if groups is None else groups
    return choose_part(recording_digests(recordings), strata, fraction, seed, groups=together)


def sample_digests(samples: Samples) -> list[bytes]:
    """A hash of the stored content of each image, or of each recording of events."""
    return recording_digests(samples.recordings) if isinstance(samples, EventSamples) else image_digests(samples)


def image_digests(split: Split) -> list[bytes]:
    """A hash of the stored bytes of each image: those of equal images are equal, where both are stored alike."""
    if split.image_shape is None:
        return content_digests(split.encoded_image(row) for row in range(len(split)))
    return [digest for rows in _pieces(np.arange(len(split)), 1024) for digest in content_digests(split.gather(rows))]


def _strata(split: Split) -> NDArray[np.int64]:
    """The class of each image, [n]; for detection the rarest one of its objects, or `_NO_OBJECT`."""
    if not split.is_detection:
        return split.labels
    objects = [split.annotations(row).labels for row in range(len(split))]
    return rarest_classes(objects, len(split.class_names))


def rarest_classes(objects: Sequence[NDArray[np.int64]], classes: int) -> NDArray[np.int64]:
    """Return for each image the class of its objects that is rarest in all images, [n]; -1 without an object.

    Args:
        objects: class indices of the objects of each image.
        classes: number of classes.
    """
    counts = np.bincount(np.concatenate([np.empty(0, np.int64), *objects]), minlength=classes)
    return np.array(
        [min(labels, key=lambda k: (counts[k], k)) if len(labels) else _NO_OBJECT for labels in objects], np.int64
    )


def choose_part(
    digests: Sequence[bytes],
    strata: NDArray[np.int64],
    fraction: float,
    seed: int,
    least: int = 0,
    groups: Sequence[bytes] | None = None,
) -> NDArray[np.bool_]:
    """Choose a fraction of each stratum, but not all of it, as a mask [n].

    Args:
        digests: of each image. Images of equal digests stay together, in the stratum of the first one.
        strata: of each image, [n].
        fraction: of each stratum; rounded.
        seed: of the choice, which depends on the digests and not on their order.
        least: images to choose of a stratum where the fraction is fewer and it has more.
        groups: of each image; images of a group stay together too, under the least of their digests.
    """
    members: dict[bytes, list[int]] = defaultdict(list)
    for row, digest in enumerate(digests if groups is None else _least_together(digests, groups)):
        members[digest].append(row)
    by_stratum: dict[int, list[bytes]] = defaultdict(list)
    for digest, rows in members.items():
        by_stratum[int(strata[rows[0]])].append(digest)
    chosen = np.zeros(len(digests), np.bool_)
    salt = seed.to_bytes(8, "little", signed=True)
    for of_stratum in by_stratum.values():
        size = sum(len(members[digest]) for digest in of_stratum)
        wanted = min(max(round(fraction * size), least), size - 1)
        for digest in sorted(of_stratum, key=lambda digest: hashlib.blake2b(digest, key=salt, digest_size=8).digest()):
            if len(members[digest]) <= wanted:
                chosen[members[digest]] = True
                wanted -= len(members[digest])
    return chosen


def _least_together(digests: Sequence[bytes], groups: Sequence[bytes]) -> list[bytes]:
    """For each image, the least digest of all that stay together with it: through its group, through equal images."""
    above: dict[bytes, bytes] = {}

    def top(digest: bytes) -> bytes:
        while (over := above.setdefault(digest, digest)) != digest:
            above[digest] = above[over]
            digest = over
        return digest

    first: dict[bytes, bytes] = {}
    for digest, group in zip(digests, groups, strict=True):
        one, other = top(digest), top(first.setdefault(group, digest))
        above[max(one, other)] = min(one, other)
    return [top(digest) for digest in digests]


def _copy(store: Store, split: str, name: str, rows: NDArray[np.int64] | None, writer: StoreWriter) -> None:
    """Write rows of a split, in their order, into a split of another name; None: all rows."""
    if isinstance(writer, EventStoreWriter):
        recordings = store.recordings(split)
        copy_recordings(recordings, name, np.arange(len(recordings)) if rows is None else rows, writer)
    else:
        images = store.split(split)
        _copy_images(images, name, np.arange(len(images)) if rows is None else rows, writer)


def _copy_images(source: Split, name: str, rows: NDArray[np.int64], writer: StoreWriter) -> None:
    size = source.gather(rows[:1]).nbytes if source.image_shape is not None else None
    if size is not None:
        for part in _pieces(rows, max(1, writer.shard_bytes // max(1, size))):
            writer.write_images(name, source.gather(part), _targets(source, part))
        return
    for number, part in enumerate(_by_bytes(source, rows, writer.shard_bytes)):
        images = [source.encoded_image(int(row)).tobytes() for row in part]
        targets = _targets(source, part)
        shard = write_shard(
            writer.directory / writer.shard_name(name, number), images, targets, source.manifest.image_format
        )
        writer.add_shard(name, shard, targets, content_digests(images))


def _targets(source: Split, rows: NDArray[np.int64]) -> Targets:
    if not source.is_detection:
        return source.labels[rows]
    columns, start, parts = source.annotation_columns, 0, []
    for shard in columns:
        inside = rows[(rows >= start) & (rows < start + len(shard))] - start
        parts.append(shard.select(inside))
        start += len(shard)
    return AnnotationColumns.joined(parts)


def _pieces(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _by_bytes(source: Split, rows: NDArray[np.int64], most: int) -> Iterator[NDArray[np.int64]]:
    """Divide rows of encoded images where their bytes pass `most`."""
    first, filled = 0, 0
    for position, row in enumerate(rows):
        size = len(source.encoded_image(int(row)))
        if position > first and filled + size > most:
            yield rows[first:position]
            first, filled = position, 0
        filled += size
    if first < len(rows):
        yield rows[first:]
