"""Parquet files with images (parquet.apache.org; huggingface.co/docs/datasets: features Image, ClassLabel and List).

An image is a struct `{bytes, path}`, or bytes. Its class is a column of indices, whose names are in the schema's
metadata `huggingface` (a ClassLabel), or of names. Objects are a column of lists: `{bbox: [...], category: [...]}`, or
a list of `{bbox, category}`. The split is in the name of the file or of its folder. Pixels are read when the store is
written, a few rows at a time: values that are encoded by a dictionary are in the file once, and any number of times in
memory.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.boxed_images import BoxedContents
from spikefleet_pipelines.sources.image_records import Record, contents_of, label_of, objects_of
from spikefleet_pipelines.sources.labelled_images import LabelledContents
from spikefleet_pipelines.sources.parquet_images_config import PARQUET, PARQUET_ADVICE, ParquetOptions
from spikefleet_pipelines.sources.split_names import by_split
from spikefleet_pipelines.sources.text_files import short
from spikefleet_pipelines.store.image_files import MAX_FILE_BYTES

MAX_GROUP_BYTES = 1 << 31
"""Most bytes of a column in a row group, without compression: pages and dictionaries are read whole."""

MAX_GROUP_VALUES = 1 << 24
"""Most values of a column of classes or objects in a row group: equal values take next to no bytes in the file."""

MAX_BATCH_BYTES = 1 << 26
"""Most bytes of the rows that are decoded at once, but for a single row that is larger."""

_IMAGES = ("image", "img", "picture")
_LABELS = ("label", "labels", "class", "category", "fine_label")
_OBJECTS = ("objects", "annotations", "annotation")


@dataclass(frozen=True)
class ParquetImage:
    """An image in a row of a Parquet file."""

    file: Path
    column: str
    group: int
    row: int
    """In its row group."""
    number: int
    """In the file."""
    size: int
    """Bytes of an image of the row group on average."""

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"

    def below(self, root: Path) -> str:
        """Return its name for groups."""
        return f"{self.file.relative_to(root).as_posix()}/{self.number}"

    def read(self) -> bytes:
        """Read the encoded image. Raises ValueError with the reason if that is not possible."""
        try:
            there = self.file.stat()
            stamp = there.st_mtime_ns, there.st_size
            value = _rows(self.file, self.column, self.group, stamp).value(self.row)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"the row group cannot be read: {_first_line(error)}") from None
        if isinstance(value, Mapping):
            if value.get("bytes") is None and value.get("path"):
                raise ValueError(
                    f"it holds the path {short(value['path'])} and not the image; write the files with embedded images "
                    "(`Dataset.save_to_disk` or `push_to_hub` embed them)"
                )
            value = value.get("bytes")
        if not value:
            raise ValueError("the row has no image")
        if len(value) > MAX_FILE_BYTES:
            raise ValueError(f"the image has {len(value):,} bytes, expected 1 to {MAX_FILE_BYTES:,}")
        return bytes(value)


class _Rows:
    """The values of a column of a row group; quick where they are asked for in the order of the rows."""

    def __init__(self, file: Path, column: str, group: int) -> None:
        self._file, self._column, self._group = pq.ParquetFile(file), column, group
        self._restart()

    def _restart(self) -> None:
        self._batches = _batches(self._file, self._group, self._column)
        self._first, self._batch = 0, pa.nulls(0)
        self._failure: Exception | None = None

    def value(self, row: int) -> Any:
        """Return the value of a row. Raises OSError or pa.ArrowException if it cannot be read."""
        if row < self._first:
            self._restart()
        while row >= self._first + len(self._batch):
            self._advance()
        return self._batch[row - self._first].as_py()

    def _advance(self) -> None:
        if self._failure is not None:  # what is behind damage cannot be read, for the same reason
            raise self._failure
        try:
            following = next(self._batches, None)
        except (pa.ArrowException, OSError) as error:
            self._failure = error
            raise
        self._first += len(self._batch)
        if following is None:
            raise OSError(f"it has {self._first:,} rows")
        self._batch = following


def _batches(file: pq.ParquetFile, group: int, column: str) -> Iterator[pa.Array]:
    """The values of a column of a row group in batches of at most `MAX_BATCH_BYTES`.

    No value takes more bytes than its column has in the row group, also where a dictionary holds it once for many rows.
    """
    rows = max(1, min(1024, MAX_BATCH_BYTES // max(1, _column_bytes(file, group, column))))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
        yield batch.column(column)


@lru_cache(maxsize=1)
def _rows(file: Path, column: str, group: int, stamp: tuple[int, int]) -> _Rows:
    """The rows that were read last; `stamp` is the file's time and size, so that a corrected file is read anew."""
    return _Rows(file, column, group)


@dataclass(frozen=True)
class _Columns:
    """What the columns of a file are."""

    image: str
    target: str
    objects: bool
    names: tuple[str, ...] | None
    """Of the classes, where the schema has them."""


def read_parquet(root: Path, options: ParquetOptions, seed: int) -> LabelledContents | BoxedContents:
    """Read classes or objects of all rows.

    Raises:
        SourceError: there is no file, one is damaged, or its columns are not of images with classes; the message names
            file, row and value.
    """
    _rows.cache_clear()
    found = (path for path in root.rglob("*.parquet") if not path.is_dir())  # Spark has folders of that name
    paths = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not paths:
        raise PARQUET.missing(root)
    names: tuple[str, ...] | None = None
    first: Path | None = None
    splits: dict[str, list[Record]] = {}
    for split, files in by_split(root, paths).items():
        splits[split] = []
        for path in files:
            columns, records = _read_file(path, options)
            if first is not None and columns.names != names:
                raise SourceError(f"{path}: the names of the classes are not those of {first}; prepare one data set")
            names, first = columns.names, path
            splits[split] += records
    return contents_of(PARQUET.name, root, splits, names, options, seed, Counter(), PARQUET_ADVICE)


def _read_file(path: Path, options: ParquetOptions) -> tuple[_Columns, list[Record]]:
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow, options)
            records: list[Record] = []
            for group in range(file.num_row_groups):
                for column in (columns.image, columns.target):
                    _check_group(path, file, group, column)
                _check_values(path, file, group, columns.target)
                rows = file.metadata.row_group(group).num_rows
                size = max(1, _column_bytes(file, group, columns.image) // max(1, rows))
                targets = (value for batch in _batches(file, group, columns.target) for value in batch)
                for row, target in enumerate(targets):
                    image = ParquetImage(path, columns.image, group, row, len(records), size)
                    records.append(_record(image, target.as_py(), columns, options))
            return columns, records
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {_first_line(error)}; replace the file") from error


def _record(image: ParquetImage, target: Any, columns: _Columns, options: ParquetOptions) -> Record:
    where = str(image)
    if not columns.objects:
        return Record(image, label_of(where, target))
    boxes, labels = objects_of(where, [] if target is None else target, options.boxes == "xyxy")
    return Record(image, None, boxes, labels)


def _check_group(path: Path, file: pq.ParquetFile, group: int, column: str) -> None:
    size = _column_bytes(file, group, column)
    if size > MAX_GROUP_BYTES:
        raise SourceError(
            f"{path}: row group {group} of column {column!r} has {size:,} bytes, which are read at once, expected at "
            f"most {MAX_GROUP_BYTES:,}; write the file anew with smaller row groups (pyarrow: row_group_size=100)"
        )


def _check_values(path: Path, file: pq.ParquetFile, group: int, column: str) -> None:
    values = max((one.num_values for one in _chunks(file, group, column)), default=0)
    if values > MAX_GROUP_VALUES:
        raise SourceError(
            f"{path}: row group {group} of column {column!r} has {values:,} values, expected at most "
            f"{MAX_GROUP_VALUES:,}; write the file anew with smaller row groups (pyarrow: row_group_size=100)"
        )


def _column_bytes(file: pq.ParquetFile, group: int, column: str) -> int:
    return sum(one.total_uncompressed_size for one in _chunks(file, group, column))


def _chunks(file: pq.ParquetFile, group: int, column: str) -> Iterator[pq.ColumnChunkMetaData]:
    """What a row group has of a column: one chunk, or one for each field of a struct."""
    of_group = file.metadata.row_group(group)
    held = (of_group.column(number) for number in range(of_group.num_columns))
    return (one for one in held if one.path_in_schema == column or one.path_in_schema.startswith(f"{column}."))


def _columns(path: Path, schema: pa.Schema, options: ParquetOptions) -> _Columns:
    if twice := next((name for name in schema.names if schema.names.count(name) > 1), None):
        raise SourceError(f"{path} has several columns {twice!r}; write the file anew with other names")
    features = _features(path, schema)
    image = _named(path, schema, options.image, "image") or _image_column(path, schema, features)
    given = _named(path, schema, options.label, "label")
    target = given or _target_column(path, schema, features, image)
    nested = pa.types.is_nested(schema.field(target).type)
    return _Columns(image, target, nested, _class_names(path, features.get(target), target))


def _features(path: Path, schema: pa.Schema) -> Mapping[str, Any]:
    """The features that `datasets` wrote, by column; none where another program wrote the file."""
    held = (schema.metadata or {}).get(b"huggingface")
    if held is None:
        return {}
    try:
        features = json.loads(held)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        features = None
    if not isinstance(features, dict):
        raise SourceError(f"{path}: the schema's metadata 'huggingface' has no features; write the file anew")
    return features


def _named(path: Path, schema: pa.Schema, name: str | None, option: str) -> str | None:
    if name is not None and name not in schema.names:
        raise SourceError(f"{path}: option {option}={name!r}, but its columns are {', '.join(schema.names)}")
    return name


def _image_column(path: Path, schema: pa.Schema, features: Mapping[str, Any]) -> str:
    found = [name for name, feature in features.items() if _kind(feature) == "Image" and name in schema.names]
    found = found or [field.name for field in schema if _holds_bytes(field.type)]
    usual = [name for name in _IMAGES if name in found]
    if usual or len(found) == 1:
        return (usual or found)[0]
    what = f"the columns {', '.join(found)} are" if found else "none of its columns is"
    raise SourceError(
        f"{path}: {what} of images; its columns are {', '.join(schema.names)}; choose one with option image=NAME"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _target_column(path: Path, schema: pa.Schema, features: Mapping[str, Any], image: str) -> str:
    others = [name for name in schema.names if name != image]
    for name in _OBJECTS:
        if name in others and pa.types.is_nested(schema.field(name).type):
            return name
    found = [name for name in others if _kind(features.get(name)) == "ClassLabel"]
    usual = [name for name in _LABELS if name in (found or others)]
    if usual or len(found) == 1:
        return (usual or found)[0]
    raise SourceError(
        f"{path}: none of its columns ({', '.join(schema.names)}) is known as the classes; choose one with option "
        "label=NAME"
    )


def _kind(feature: Any) -> Any:
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(path: Path, feature: Any, column: str) -> tuple[str, ...] | None:
    """The names of the ClassLabel in a feature, at any depth (objects have it in a list)."""
    found: list[Sequence[Any]] = []
    waiting = [feature]
    while waiting:
        one = waiting.pop()
        if _kind(one) == "ClassLabel":
            found.append(one.get("names") or ())
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    if not found:
        return None
    names = found[0]
    if len(found) > 1 or not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise SourceError(
            f"{path}: the names of the classes of column {column!r} are not one list of text; correct them"
        )
    return tuple(names)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
