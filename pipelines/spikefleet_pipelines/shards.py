"""One shard: an Arrow IPC file with one record batch, written once and read by memory mapping.

Columns: `image` (fixed-size binary: uint8 pixels [C, H, W]; or large binary: an encoded image file) and `label`
    (int64).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spikefleet_pipelines.manifest import ImageFormat, Shard, StoreError
from spikefleet_pipelines.shard_cache import check_hash, file_sha256


def row_schema(image: ImageFormat) -> pa.Schema:
    """The columns of a classification shard."""
    image_type = pa.large_binary() if image.shape is None else pa.binary(int(np.prod(image.shape)))
    return pa.schema([pa.field("image", image_type, nullable=False), pa.field("label", pa.int64(), nullable=False)])


@dataclass(frozen=True)
class ShardColumns:
    """Views into a mapped shard: nothing is copied before a row is asked for."""

    labels: NDArray[np.int64]
    data: NDArray[np.uint8]
    """Pixels [n, C * H * W], or the bytes of all encoded images, one after another."""
    offsets: NDArray[np.int64] | None
    """Where each encoded image starts and the last ends, [n + 1]; None for pixels."""

    def encoded_image(self, row: int) -> NDArray[np.uint8]:
        if self.offsets is None:
            raise StoreError("these images are stored as pixels, not as image files.")
        return self.data[self.offsets[row] : self.offsets[row + 1]]


def write_shard(
    path: Path, images: NDArray[np.uint8] | Sequence[bytes], labels: NDArray[np.int64], image: ImageFormat
) -> Shard:
    """Write one shard: contiguous pixels [n, C, H, W] or n encoded images, and labels [n]."""
    schema = row_schema(image)
    if isinstance(images, np.ndarray):
        pixels = pa.py_buffer(images)
        column = pa.Array.from_buffers(schema.field("image").type, len(images), [None, pixels])
    else:
        column = pa.array(images, pa.large_binary())
    batch = pa.record_batch([column, pa.array(labels, pa.int64())], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    return Shard(file=path.name, rows=len(labels), bytes=path.stat().st_size, sha256=file_sha256(path))


def check_shard(path: Path, shard: Shard, verify: bool) -> None:
    """Compare a local shard with its entry in the manifest: its size, and with `verify` its hash.

    Raises:
        StoreError: naming the file with what was expected and what was found.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StoreError(f"shard {path} cannot be read: {error.strerror}; prepare the store again.") from error
    if size != shard.bytes:
        raise StoreError(
            f"shard {path} is corrupt: it should have {shard.bytes:,} bytes and has {size:,}; "
            "copy it again, or prepare the store again with overwriting."
        )
    if verify:
        check_hash(str(path), shard.sha256, file_sha256(path))


def open_shard(path: Path, shard: Shard, image: ImageFormat, classes: int) -> ShardColumns:
    """Map a shard.

    Raises:
        StoreError: its columns, rows, offsets or labels are not what the manifest says.
    """
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            schema, batches = reader.schema, reader.num_record_batches
            batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, IndexError) as error:
        raise StoreError(f"shard {path} cannot be read: {error}; prepare the store again.") from error
    expected = row_schema(image)
    if not schema.equals(expected) or batches != 1 or batch.num_rows != shard.rows:
        raise StoreError(
            f"shard {path} should hold {shard.rows} rows of ({_columns(expected)}) in one record batch and holds "
            f"{batch.num_rows} rows of ({_columns(schema)}) in {batches}; prepare the store again."
        )
    column, label_column = batch.columns
    if column.null_count or label_column.null_count:
        raise StoreError(f"shard {path} has rows without image or label; prepare the store again.")
    labels = label_column.to_numpy()
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.argmax())
        raise StoreError(f"shard {path} row {row}: label {labels[row]} is outside 0 to {classes - 1}.")
    buffers = column.buffers()
    if image.shape is not None:
        pixels = np.frombuffer(buffers[1], np.uint8).reshape(-1)
        return ShardColumns(labels, pixels[: shard.rows * column.type.byte_width].reshape(shard.rows, -1), None)
    offsets = np.frombuffer(buffers[1], np.int64)[: shard.rows + 1]
    return ShardColumns(labels, np.frombuffer(buffers[2], np.uint8), offsets)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
