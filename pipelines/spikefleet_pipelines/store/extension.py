"""Adding splits to an existing store: new shards are written next to the old ones, then the manifest is replaced.

Replacing one file makes this atomic: a reader finds the store without the split or with it, and a killed writer leaves
at most a shard that no manifest names, which the next writer overwrites.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.data_set_name import check_data_set_name
from spikefleet_pipelines.store.manifest import MANIFEST_NAME, Manifest, Shard, parse_manifest
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.writer import SHARD_BYTES, StoreWriter, content_digests

_ORDER = ("train", "val", "test")


class StoreExtension(StoreWriter):
    """Writes splits into the store at `out`, replacing splits of the same names.

    Args:
        out: directory of the store.
        options: added to the options of the store.
        stand_ins: as for `StoreWriter`.
        shard_bytes: as for `StoreWriter`.
        skip_bad: as for `StoreWriter`.

    Raises:
        StoreError: there is no store, or it is corrupt.
    """

    def __init__(
        self,
        out: Path,
        *,
        options: Mapping[str, JsonValue],
        stand_ins: Mapping[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
        skip_bad: bool = False,
    ) -> None:
        there = Store.open(out).manifest
        super().__init__(
            out,
            source=there.source,
            class_names=there.class_names,
            image=there.image_format,
            options=dict(options),
            shard_bytes=shard_bytes,
            category_ids=there.category_ids,
            stand_ins=stand_ins,
            name=there.name,
            skip_bad=skip_bad,
        )
        self._there = there

    def shard_name(self, split: str, number: int) -> str:
        """Return the file name of a shard, numbered after the existing ones of the split."""
        # A replaced split must not touch the shards that readers have open.
        used = [int(shard.file.split("-")[-1].split(".")[0]) for shard in self._own_shards(self._there, split)]
        return super().shard_name(split, number + max(used, default=-1) + 1)

    def commit(self) -> Manifest:
        """Move the shards into the store and replace its manifest.

        Raises:
            StoreError: another process changed the same splits, or the store's classes, in the meantime.
        """
        with _locked(self.out):
            there = _read_manifest(self.out)
            added = tuple(self._shards)
            same_place = all(self._own_shards(there, split) == self._own_shards(self._there, split) for split in added)
            same_kind = (there.class_names, there.category_ids, there.image) == (
                self.class_names, self.category_ids, self.image
            )  # fmt: skip
            if not same_place or not same_kind:
                raise StoreError(
                    f"store {self.out}: another process changed it while splits were added; add them again"
                )
            self._keep(there)
            self.options = {**there.options, **self.options}
            self.name = there.name or self.name
            manifest = self.manifest()
            for split in added:
                for shard in self._shards[split]:
                    (self.directory / shard.file).replace(self.out / shard.file)
            (self.directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
            (self.directory / MANIFEST_NAME).replace(self.out / MANIFEST_NAME)
            named = {shard.file for shards in manifest.shards.values() for shard in shards}
            for shards in there.shards.values():
                for shard in shards:
                    if shard.file not in named:
                        (self.out / shard.file).unlink(missing_ok=True)
        return manifest

    def _own_shards(self, manifest: Manifest, split: str) -> tuple[Shard, ...]:
        """The shards of a split; none where it is an alias of another split."""
        return () if split in (manifest.audit.same_as or {}) else manifest.shards.get(split, ())

    def _keep(self, there: Manifest) -> None:
        """Copy the entries of the splits that are not replaced, and what the audit needs of them."""
        self.unused = {**(there.audit.unused or {}), **self.unused}
        self.skipped[:0] = [file for file in there.audit.skipped or () if file.split not in self._shards]
        for split, shards in there.shards.items():
            if split in self._shards or not self._own_shards(there, split):
                continue
            self._shards[split] = list(shards)
            counts = there.audit.images_per_class[split]
            if len(counts) != len(self.class_names):
                raise StoreError(
                    f"{self.out}/{MANIFEST_NAME}: audit.images_per_class has {len(counts)} numbers for split "
                    f"{split!r}, expected {len(self.class_names)}; prepare the store again"
                )
            self._counts[split] = np.array(counts, np.int64)
            if there.audit.boxes is not None:
                self._boxes[split] = [there.audit.boxes[split]]
            rows = Split(split, str(self.out), there, [self.out / shard.file for shard in shards])
            self._digests[split] = _digests(rows)
        names = sorted(self._shards, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
        self._shards = {name: self._shards[name] for name in names}
        self._counts = {name: self._counts[name] for name in names}
        self._boxes = {name: self._boxes[name] for name in names if name in self._boxes}


def rename_data_set(store: Path, name: str) -> None:
    """Give the data set of a local store another name; its content and its hash stay.

    Raises:
        StoreError: the name is not allowed, or there is no store.
        OSError: the store cannot be written.
    """
    check_data_set_name(name)
    with _locked(store):
        manifest = _read_manifest(store).model_copy(update={"name": name})
        path, part = store / MANIFEST_NAME, store / f".{MANIFEST_NAME}.{os.getpid()}.part"
        written = path.stat()
        try:
            part.write_text(manifest.to_json(), encoding="utf-8")
            os.utime(part, ns=(written.st_atime_ns, written.st_mtime_ns))  # since when it is compared with raw files
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _digests(split: Split) -> list[bytes]:
    if split.image_shape is None:
        return content_digests(split.encoded_image(row) for row in range(len(split)))
    return content_digests(split.gather(np.array([row]))[0] for row in range(len(split)))


def _read_manifest(store: Path) -> Manifest:
    path = store / MANIFEST_NAME
    return parse_manifest(path.read_bytes(), str(path))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory against other writers; the system releases the lock when the process ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
