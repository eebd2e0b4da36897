"""Objects in stores: what is written is read back without a copy, damage is refused, ids map through their gaps."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.annotations import AnnotationColumns, Placement, class_indices
from spikefleet_pipelines.store.manifest import ImageFormat, Shard
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.remote import file_sha256
from spikefleet_pipelines.store.shards import open_shard, row_schema, write_shard
from spikefleet_pipelines.store.writer import StoreWriter

TABLE = (1, 3, 90)
RAW = ImageFormat(encoding="raw", shape=(3, 8, 10))


def columns(pictures: int, seed: int = 0) -> AnnotationColumns:
    """Random objects: 0 to 4 in a picture, one in five a crowd."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, pictures)
    objects = int(counts.sum())
    return AnnotationColumns(
        image_ids=rng.permutation(pictures) * 7 + 3,
        heights=np.full(pictures, 8, np.int32),
        widths=np.full(pictures, 10, np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        boxes=rng.uniform(0, 5, (objects, 4)),
        category_ids=rng.choice(TABLE, objects),
        crowd=rng.random(objects) < 0.2,
        areas=rng.uniform(0, 25, objects),
        ids=rng.permutation(objects) + 2**40,
    )


def pixels(pictures: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (pictures, 3, 8, 10), np.uint8)


def writer(out: Path, **changes: object) -> StoreWriter:
    fields = {
        "source": "test", "class_names": "abc", "image": RAW, "options": {}, "category_ids": TABLE, "shard_bytes": 2400
    }  # fmt: skip
    return StoreWriter(out, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with writer(tmp_path / "store") as open_writer:
        open_writer.write_images("train", pixels(25), columns(25))
        open_writer.commit()
    return Store.open(tmp_path / "store")


def assert_rows(store: Store, expected: AnnotationColumns) -> None:
    split = store.split("train")
    for row in range(len(expected)):
        found = split.annotations(row)
        objects = slice(expected.offsets[row], expected.offsets[row + 1])
        assert found.image_id == expected.image_ids[row]
        assert (found.height, found.width) == (8, 10)
        for name, values in (
            ("boxes", expected.boxes), ("category_ids", expected.category_ids), ("crowd", expected.crowd),
            ("areas", expected.areas), ("ids", expected.ids),
        ):  # fmt: skip
            assert np.array_equal(getattr(found, name), values[objects]), name
            assert getattr(found, name).dtype == values.dtype
        assert [TABLE[label] for label in found.labels] == found.category_ids.tolist()


def test_reads_back_what_was_written_over_many_shards(store: Store) -> None:
    assert len(store.manifest.shards["train"]) == 3
    assert store.manifest.task == "detection"
    assert store.manifest.category_ids == TABLE
    assert_rows(store, columns(25))
    assert np.array_equal(store.split("train").gather(np.arange(25)), pixels(25))
    again = pickle.loads(pickle.dumps(store.split("train")))
    assert again.annotations(24).ids.tolist() == store.split("train").annotations(24).ids.tolist()


def test_objects_are_views_into_the_mapped_shard(store: Store) -> None:
    row = int(np.argmax(np.diff(columns(25).offsets)))
    found = store.split("train").annotations(row)
    for values in (found.boxes, found.areas, found.ids, found.category_ids):
        assert not values.flags.owndata
        assert not values.flags.writeable


def test_one_kind_of_split_has_no_other_kind_of_targets(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is for detection: it has annotations and no labels"):
        _ = store.split("train").labels
    with writer(tmp_path / "other", category_ids=None) as open_writer:
        with pytest.raises(StoreError, match="either labels or annotations"):
            open_writer.write_images("train", pixels(3), columns(3))
        open_writer.write_images("train", pixels(3), np.arange(3))
        open_writer.commit()
    with pytest.raises(StoreError, match="is for classification: it has no annotations"):
        Store.open(tmp_path / "other").split("train").annotations(0)


def test_audit_counts_what_is_unusual(tmp_path: Path) -> None:
    boxes = [[0, 0, 4, 4], [1, 1, 0, 3], [6, 2, 8, 2], [9, 7, 1.5, 1.5], [20, 0, 2, 2], [0, 0, 10, 8]]
    given = AnnotationColumns(
        np.array([5, 6, 7]),
        np.full(3, 8, np.int32),
        np.full(3, 10, np.int32),
        np.array([0, 4, 4, 6], np.int32),
        np.array(boxes, np.float64),
        np.array([1, 1, 3, 3, 90, 1]),
        np.array([False] * 5 + [True]),
        np.ones(6),
        np.arange(6),
    )
    with writer(tmp_path / "store", stand_ins={"test": "train"}) as open_writer:
        open_writer.write_images("train", pixels(3), given)
        audit = open_writer.commit().audit
    assert audit.boxes is not None
    found = audit.boxes["train"]
    assert (found.objects, found.crowds, found.empty_images) == (6, 1, 1)
    assert (found.no_area, found.beyond_border, found.outside) == (1, 1, 1)  # half a pixel over the border is none
    assert found.objects_per_class == (2, 2, 1)
    assert audit.images_per_class == {"train": (1, 1, 1)}
    assert audit.same_as == {"test": "train"}
    assert len(Store.open(tmp_path / "store").split("test")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_ids": 2}, r"image \d+, annotation \d+: category id is 2, expected one of the category ids"),
        ({"boxes": np.nan}, r"annotation \d+: box is \[nan, .*, expected finite"),
        ({"boxes": [1, 1, -1, 1]}, r"box is \[1.0, 1.0, -1.0, 1.0\], expected finite values with width"),
        ({"areas": -1}, r"area is -1.0"),
        ({"heights": 0}, r"image \d+: size is 10 x 0, expected at least 1 x 1"),
    ],
)
def test_wrong_objects_are_refused_when_written_and_when_opened(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    wrong = columns(6)
    for name, value in change.items():
        values = getattr(wrong, name).copy()
        values[1] = value
        wrong = replace(wrong, **{name: values})  # type: ignore[arg-type]
    with writer(tmp_path / "store") as open_writer, pytest.raises(StoreError, match=message):
        open_writer.write_images("train", pixels(6), wrong)
    shard = write_shard(tmp_path / "train-00000.arrow", pixels(6), wrong, RAW)
    with pytest.raises(StoreError, match=message):
        open_shard(tmp_path / "train-00000.arrow", shard, RAW, 3, TABLE)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("iscrowd", lambda lists: [[], *lists[1:]], "the numbers of boxes|with gaps"),
        ("area", lambda lists: [lists[0] + lists[1], [], *lists[2:]], r"row 0: the numbers of boxes and area differ"),
        ("image_id", lambda values: [None, *values[1:]], "without image or label"),
        ("category_id", lambda lists: [[None for _ in ids] for ids in lists], "object with a missing value"),
    ],
)
def test_damaged_columns_are_refused(tmp_path: Path, column: str, change: object, message: str) -> None:
    path = tmp_path / "shard.arrow"
    write_shard(path, pixels(6), columns(40).select(np.flatnonzero(np.diff(columns(40).offsets) > 0)[:6]), RAW)
    with pa.ipc.open_file(path) as reader:
        table = reader.get_batch(0)
    place = table.schema.get_field_index(column)
    field = table.schema.field(place)
    values = pa.array(change(table.column(place).to_pylist()), _nullable(field.type))  # type: ignore[operator]
    arrays = [*table.columns[:place], _unchecked(values, field.type), *table.columns[place + 1 :]]
    batch = pa.RecordBatch.from_arrays(arrays, schema=row_schema(RAW, detection=True))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as stream:
        stream.write_batch(batch)
    shard = Shard(file=path.name, rows=6, bytes=path.stat().st_size, sha256=file_sha256(path))
    with pytest.raises(StoreError, match=message):
        open_shard(path, shard, RAW, 3, TABLE)


def _nullable(kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


def _unchecked(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array under the store's type, which says that nothing is missing, whether that is true or not."""
    if pa.types.is_list(kind):
        return pa.ListArray.from_arrays(values.offsets, values.values, type=kind)
    return values


def test_other_columns_are_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.arrow", pixels(3), np.arange(3), RAW)
    with pytest.raises(
        StoreError, match=r"holds 3 rows of \(.*label: int64.*expected 3 rows of \(.*boxes: list<item: "
    ):
        open_shard(tmp_path / "a.arrow", shard, RAW, 3, TABLE)


def test_manifest_needs_one_id_for_each_class(tmp_path: Path) -> None:
    for ids, message in (((1, 3), "2 different ids, expected one for each of 3"), ((1, 3, 3), "2 different ids")):
        with writer(tmp_path / "store", category_ids=ids) as open_writer, pytest.raises(ValueError, match=message):
            open_writer.manifest()


def test_ids_map_through_gaps_whatever_their_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        table = rng.choice(200, rng.integers(1, 90), replace=False).tolist()
        ids = rng.integers(0, 200, 300)
        labels, known = class_indices(ids, table)
        for number, label, is_known in zip(ids.tolist(), labels.tolist(), known.tolist(), strict=True):
            assert is_known == (number in table)
            if is_known:
                assert table[label] == number


def test_select_is_the_same_as_row_by_row() -> None:
    given = columns(30)
    rows = np.random.default_rng(3).permutation(30)[:17]
    chosen = given.select(rows)
    labels = np.zeros(len(given.ids), np.int64)
    for place, row in enumerate(rows.tolist()):
        one, other = chosen.image(place, labels[: len(chosen.ids)]), given.image(row, labels)
        assert one.image_id == other.image_id
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.boxes, other.boxes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_placement_round_trips(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        height, width = torch.randint(1, 6000, (2,), generator=generator).tolist()
        side = int(torch.randint(32, 1400, (1,), generator=generator))
        shown_height = max(1, round(height * side / max(height, width)))
        shown_width = max(1, round(width * side / max(height, width)))
        placement = Placement(
            shown_width / width, shown_height / height, (side - shown_width) // 2, (side - shown_height) // 2,
            height, width,
        )  # fmt: skip
        stored = torch.rand(20, 4, generator=generator, dtype=torch.float64) * torch.tensor([width, height] * 2)
        scale = torch.tensor([placement.scale_x, placement.scale_y] * 2, dtype=torch.float64)
        shift = torch.tensor([placement.left, placement.top] * 2, dtype=torch.float64)
        shown = (stored * scale + shift).to(dtype)
        found = placement.to_stored_image(shown)
        assert found.dtype == dtype
        # What is left is the rounding of the boxes themselves to 32 bits.
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3 + 1e-7 * side / float(scale.min())
        assert torch.allclose(found.double(), stored, rtol=1e-7, atol=tolerance)


def test_placement_clips_to_the_picture() -> None:
    placement = Placement(2.0, 2.0, 10, 0, height=20, width=30)
    found = placement.to_stored_image(torch.tensor([[0.0, -5.0, 1000.0, 1000.0], [20.0, 10.0, 30.0, 20.0]]))
    assert found.tolist() == [[0, 0, 30, 20], [5, 5, 10, 10]]
