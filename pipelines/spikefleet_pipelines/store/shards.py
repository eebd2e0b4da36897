"""One shard: an Arrow IPC file with one record batch, written once and read by memory mapping.

Columns: `image` (fixed-size binary: uint8 pixels [C, H, W]; or large binary: an encoded image file) and, for
classification, `label` (int64). For detection instead: `image_id`, `height`, `width` of each image, and of its
objects the lists `boxes` (x y width height), `category_id`, `iscrowd`, `area`, `annotation_id`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.annotations import AnnotationColumns, class_indices
from spikefleet_pipelines.store.manifest import ImageFormat, Shard
from spikefleet_pipelines.store.remote import check_hash, file_sha256

Targets = NDArray[np.int64] | AnnotationColumns
"""Targets of the images of a shard: their classes [n], or their objects."""


def _list(values: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", values, nullable=False))


_OBJECT_COLUMNS = {
    "boxes": _list(pa.list_(pa.field("item", pa.float64(), nullable=False), 4)),
    "category_id": _list(pa.int64()),
    "iscrowd": _list(pa.bool_()),
    "area": _list(pa.float64()),
    "annotation_id": _list(pa.int64()),
}


def row_schema(image: ImageFormat, detection: bool = False) -> pa.Schema:
    """Return the Arrow schema of a shard."""
    columns = {"image": pa.large_binary() if image.shape is None else pa.binary(int(np.prod(image.shape)))}
    if detection:
        columns |= {"image_id": pa.int64(), "height": pa.int32(), "width": pa.int32(), **_OBJECT_COLUMNS}
    else:
        columns["label"] = pa.int64()
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


@dataclass(frozen=True)
class ShardColumns:
    """Views into a mapped shard; nothing is copied until a row is read."""

    labels: NDArray[np.int64]
    """Class of each image [n]; in a detection shard of each object [m]."""
    data: NDArray[np.uint8]
    """Pixels [n, C * H * W], or the concatenated bytes of all encoded images."""
    offsets: NDArray[np.int64] | None
    """Start of each encoded image, and the end of the last one, [n + 1]; None for pixels."""
    annotations: AnnotationColumns | None = None
    """The objects of a detection shard."""

    def encoded_image(self, row: int) -> NDArray[np.uint8]:
        """Return the bytes of an image file.

        Raises:
            StoreError: the shard holds pixels.
        """
        if self.offsets is None:
            raise StoreError("the images are stored as pixels, not as image files; read them with gather()")
        return self.data[self.offsets[row] : self.offsets[row + 1]]


def write_shard(path: Path, images: NDArray[np.uint8] | Sequence[bytes], targets: Targets, image: ImageFormat) -> Shard:
    """Write one shard.

    Args:
        path: of the file.
        images: contiguous pixels, uint8 [n, C, H, W], or n encoded images.
        targets: labels [n], or the objects of the n images.
        image: format of the images.

    Returns:
        The entry of the shard for the manifest.
    """
    schema = row_schema(image, isinstance(targets, AnnotationColumns))
    if isinstance(images, np.ndarray):
        pixels = pa.py_buffer(images)
        column = pa.Array.from_buffers(schema.field("image").type, len(images), [None, pixels])
    else:
        column = pa.array(images, pa.large_binary())
    others = _annotation_arrays(targets) if isinstance(targets, AnnotationColumns) else [pa.array(targets, pa.int64())]
    batch = pa.record_batch([column, *others], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    return Shard(file=path.name, rows=len(targets), bytes=path.stat().st_size, sha256=file_sha256(path))


def check_shard(path: Path, shard: Shard, verify: bool) -> None:
    """Compare the size of a local shard, and with `verify` its hash, with its entry in the manifest.

    Raises:
        StoreError: they differ; the message names the file, the expected and the found value.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StoreError(f"shard {path} cannot be read: {error.strerror}; prepare the store again") from error
    if size != shard.bytes:
        raise StoreError(
            f"shard {path} is corrupt: it has {size:,} bytes, expected {shard.bytes:,}; copy it again, or prepare the "
            "store again with --overwrite"
        )
    if verify:
        check_hash(str(path), shard.sha256, file_sha256(path))


def open_shard(
    path: Path, shard: Shard, image: ImageFormat, classes: int, category_ids: Sequence[int] | None = None
) -> ShardColumns:
    """Map a shard into memory.

    Args:
        path: of the file.
        shard: its entry in the manifest.
        image: format of the images.
        classes: number of classes.
        category_ids: the manifest's category id of each class; None for classification.

    Raises:
        StoreError: its columns, rows, offsets, labels or objects do not match the manifest.
    """
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            schema, batches = reader.schema, reader.num_record_batches
            batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, IndexError) as error:
        raise StoreError(f"shard {path} cannot be read: {error}; prepare the store again") from error
    expected = row_schema(image, category_ids is not None)
    if not schema.equals(expected) or batches != 1 or batch.num_rows != shard.rows:
        raise StoreError(
            f"shard {path} holds {batch.num_rows} rows of ({_columns(schema)}) in {batches} record batches, expected "
            f"{shard.rows} rows of ({_columns(expected)}) in one; prepare the store again"
        )
    column = batch.columns[0]
    if any(each.null_count for each in batch.columns):
        raise StoreError(f"shard {path} has rows without image or label; prepare the store again")
    annotations = None
    if category_ids is None:
        labels = batch.column("label").to_numpy()
        outside = (labels < 0) | (labels >= classes)
        if outside.any():
            row = int(outside.argmax())
            raise StoreError(
                f"shard {path} row {row}: label is {labels[row]}, expected 0 to {classes - 1}; prepare the store again"
            )
    else:
        annotations = _read_annotations(path, batch)
        labels = check_annotations(f"shard {path}", annotations, category_ids)
    buffers = column.buffers()
    if image.shape is not None:
        values = np.frombuffer(buffers[1], np.uint8).reshape(-1)
        pixels = values[: shard.rows * column.type.byte_width].reshape(shard.rows, -1)
        return ShardColumns(labels, pixels, None, annotations)
    offsets = np.frombuffer(buffers[1], np.int64)[: shard.rows + 1]
    return ShardColumns(labels, np.frombuffer(buffers[2], np.uint8), offsets, annotations)


def check_annotations(where: str, columns: AnnotationColumns, category_ids: Sequence[int]) -> NDArray[np.int64]:
    """Check annotations and return the class index of each object, [m].

    Args:
        where: the shard or split, for error messages.
        columns: the annotations.
        category_ids: the category id of each class.

    Raises:
        StoreError: a category id is not in the table, a box is not finite or has a negative size, or an image has no
            size; the message names the image and the annotation.
    """
    sizeless = (columns.heights < 1) | (columns.widths < 1)
    if sizeless.any():
        row = int(sizeless.argmax())
        raise StoreError(
            f"{where}, image {columns.image_ids[row]}: size is {columns.widths[row]} x {columns.heights[row]}, "
            "expected at least 1 x 1"
        )
    labels, known = class_indices(columns.category_ids, category_ids)
    sound = np.isfinite(columns.boxes).all(1) & (columns.boxes[:, 2:] >= 0).all(1)
    for good, what, values, expected in (
        (known, "category id", columns.category_ids, "one of the category ids of the classes"),
        (sound, "box", columns.boxes, "finite values with width and height of at least 0"),
        (np.isfinite(columns.areas) & (columns.areas >= 0), "area", columns.areas, "a finite number of at least 0"),
    ):
        if not good.all():
            wrong = int(good.argmin())
            image_id = columns.image_ids[np.searchsorted(columns.offsets, wrong, side="right") - 1]
            raise StoreError(
                f"{where}, image {image_id}, annotation {columns.ids[wrong]}: {what} is {values[wrong].tolist()}, "
                f"expected {expected}"
            )
    return labels


def _annotation_arrays(columns: AnnotationColumns) -> list[Any]:
    offsets = pa.array(columns.offsets, pa.int32())
    boxes = pa.FixedSizeListArray.from_arrays(
        pa.array(columns.boxes.reshape(-1), pa.float64()), type=_OBJECT_COLUMNS["boxes"].value_type
    )
    values = (
        boxes,
        pa.array(columns.category_ids, pa.int64()),
        pa.array(columns.crowd, pa.bool_()),
        pa.array(columns.areas, pa.float64()),
        pa.array(columns.ids, pa.int64()),
    )
    lists = [
        pa.ListArray.from_arrays(offsets, each, type=kind)
        for each, kind in zip(values, _OBJECT_COLUMNS.values(), strict=True)
    ]
    sizes = [pa.array(columns.heights, pa.int32()), pa.array(columns.widths, pa.int32())]
    return [pa.array(columns.image_ids, pa.int64()), *sizes, *lists]


def _read_annotations(path: Path, batch: Any) -> AnnotationColumns:
    lists = [batch.column(name) for name in _OBJECT_COLUMNS]
    offsets = lists[0].offsets.to_numpy()
    if any(each.values.null_count for each in lists) or lists[0].values.values.null_count:
        raise StoreError(f"shard {path} has an object with a missing value; prepare the store again")
    lengths = {len(each.values) for each in lists}
    if offsets[0] != 0 or lengths != {int(offsets[-1])}:
        raise StoreError(f"shard {path} has lists of objects with gaps; prepare the store again")
    for name, column in zip(_OBJECT_COLUMNS, lists, strict=True):
        differs = column.offsets.to_numpy() != offsets
        if differs.any():
            row = max(0, int(differs.argmax()) - 1)
            raise StoreError(f"shard {path} row {row}: the numbers of boxes and {name} differ; prepare the store again")
    boxes, category_ids, crowd, areas, ids = (column.values for column in lists)
    return AnnotationColumns(
        batch.column("image_id").to_numpy(),
        batch.column("height").to_numpy(),
        batch.column("width").to_numpy(),
        offsets,
        boxes.values.to_numpy().reshape(-1, 4),
        category_ids.to_numpy(),
        crowd.to_numpy(zero_copy_only=False),
        areas.to_numpy(),
        ids.to_numpy(),
    )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
