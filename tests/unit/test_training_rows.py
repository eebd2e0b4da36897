"""Which images a detector trains on, and which share a batch: every one once, in slices of one shape, padded less."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan, TrainingRows
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.shards import write_shard
from spikefleet_pipelines.store.writer import StoreWriter, content_digests
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig

KEEP_RATIO: dict[str, Any] = {"resize": "keep_ratio", "size": 64, "longest": 128}


@st.composite
def grouped(draw: st.DrawFn) -> tuple[dict[str, int], TrainingRows]:
    world, share = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    samples = draw(st.integers(2 * world * share, 200))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    groups = (rng.random(samples) < draw(st.floats(0, 1))).astype(np.int64)
    rows = np.flatnonzero(rng.random(samples) < 0.8) if draw(st.booleans()) else None
    if rows is not None and len(rows) < world * share:
        rows = None
    return {"samples": samples, "global_batch": world * share, "world_size": world}, TrainingRows(rows, groups)


def slices(fields: dict[str, int], training: TrainingRows, epoch: int, **more: Any) -> list[list[NDArray[np.int64]]]:
    """By step and rank."""
    plans = [EpochPlan(**fields, rank=r, training=training, **more) for r in range(fields["world_size"])]
    return [[part.indices for part in parts] for parts in zip(*(plan.batches(epoch) for plan in plans), strict=True)]


@settings(max_examples=150, deadline=None)
@given(grouped(), st.integers(0, 2**32), st.integers(0, 20))
def test_every_row_once_and_slices_of_one_group(
    shape: tuple[dict[str, int], TrainingRows], seed: int, epoch: int
) -> None:
    fields, training = shape
    assert training.groups is not None
    steps = slices(fields, training, epoch, seed=seed)
    seen = np.concatenate([part for step in steps for part in step])
    wanted = np.arange(fields["samples"]) if training.rows is None else training.rows
    assert np.array_equal(np.sort(seen), wanted)
    share = fields["global_batch"] // fields["world_size"]
    mixed = [part for step in steps for part in step if len(set(training.groups[part].tolist())) > 1]
    assert sum(len(part) for part in mixed) <= 2 * (share - 1) + 2 * fields["global_batch"]
    assert not [part for step in steps[:-3] for part in step if len(set(training.groups[part].tolist())) > 1]
    # A resumed epoch has the same tail.
    start = len(steps) // 2
    plan = EpochPlan(**fields, rank=0, training=training, seed=seed)
    assert [part.indices.tolist() for part in plan.batches(epoch, start)] == [s[0].tolist() for s in steps[start:]]


def test_groups_alternate_at_random_and_change_with_the_epoch() -> None:
    groups = (np.arange(4000) % 4 == 0).astype(np.int64)
    fields = {"samples": 4000, "global_batch": 8, "world_size": 4}
    first, second = (
        [int(groups[part[0]]) for step in slices(fields, TrainingRows(None, groups), epoch) for part in step]
        for epoch in (0, 1)
    )
    assert first != second
    assert np.mean(first) == pytest.approx(0.25, abs=0.01)
    quarters = [np.mean(part) for part in np.array_split(first, 4)]
    assert max(quarters) - min(quarters) < 0.1, "not all of one group first"
    # Without groups most pairs are of two shapes now and then.
    mixed = [part for step in slices(fields, TrainingRows(), 0) for part in step if groups[part[0]] != groups[part[1]]]
    assert len(mixed) > 500


def make_split(out: Path, sizes: list[tuple[int, int]], boxes: list[list[list[float]]], crowd: list[bool]) -> Split:
    """Encoded images of sizes (height, width) with boxes x y width height; `crowd` of all boxes in a row."""
    encoded = []
    for height, width in sizes:
        stream = io.BytesIO()
        PIL.Image.new("RGB", (width, height), (9, 99, 199)).save(stream, "PNG")
        encoded.append(stream.getvalue())
    flat = np.array([box for own in boxes for box in own], np.float64).reshape(-1, 4)
    columns = AnnotationColumns(
        np.arange(len(sizes)),
        np.array([height for height, _ in sizes], np.int32),
        np.array([width for _, width in sizes], np.int32),
        np.cumsum([0, *map(len, boxes)]).astype(np.int32),
        flat,
        np.ones(len(flat), np.int64),
        np.array(crowd, np.bool_),
        flat[:, 2] * flat[:, 3],
        np.arange(len(flat)),
    )
    image = ImageFormat(encoding="encoded")
    with StoreWriter(out, source="test", class_names=("thing",), image=image, options={}, category_ids=(1,)) as writer:
        half = len(sizes) // 2
        for number, rows in enumerate((range(half), range(half, len(sizes)))):  # two shards
            chosen, part = columns.select(np.array(rows)), [encoded[row] for row in rows]
            shard = write_shard(writer.directory / writer.shard_name("train", number), part, chosen, image)
            writer.add_shard("train", shard, chosen, content_digests(part))
        writer.commit()
    return Store.open(out).split("train")


@pytest.fixture
def odd(tmp_path: Path) -> Split:
    """An object, none, a crowd, no area, outside, partly outside, an object beside a crowd, an object."""
    box = [4.0, 4.0, 20.0, 20.0]
    boxes = [[box], [], [box], [[4.0, 4, 0, 9]], [[90.0, 4, 9, 9]], [[-5.0, 4, 20, 9]], [box, box], [box]]
    crowd = [False, True, False, False, False, True, False, False]
    sizes = [(40, 60), (60, 40), (40, 60), (60, 40), (50, 80), (80, 50), (48, 48), (41, 60)]
    return make_split(tmp_path / "store", sizes, boxes, crowd)


def test_images_without_an_object_for_the_loss_are_left_out(odd: Split) -> None:
    config = DetectionTransformConfig(**KEEP_RATIO, skip_empty=True)
    training = config.training_rows(odd)
    assert training.rows is not None
    assert training.rows.tolist() == [0, 5, 6, 7]
    assert training.groups is None
    # It is what the batches say: exactly the others have no target.
    loader = BatchLoader(odd, config, train=True)
    targets = {
        int(row): len(target.labels)
        for batch in loader.epoch(EpochPlan(samples=8, global_batch=2, shuffle=False), epoch=0)
        for row, target in zip(batch.indices, batch.targets, strict=True)
    }
    assert [row for row, count in targets.items() if count] == training.rows.tolist()
    plan = EpochPlan(samples=8, global_batch=2, training=training)
    assert (plan.steps_per_epoch, plan.samples_per_epoch) == (2, 4)
    shown = [int(row) for batch in loader.epoch(plan, epoch=0) for row in batch.indices]
    assert sorted(shown) == [0, 5, 6, 7]
    assert DetectionTransformConfig(**KEEP_RATIO).training_rows(odd) == TrainingRows()


def test_wide_and_tall_images_are_groups(odd: Split) -> None:
    config = DetectionTransformConfig(**KEEP_RATIO, group_by_aspect=True)
    training = config.training_rows(odd)
    assert training.rows is None
    assert training.groups is not None
    assert training.groups.tolist() == [1, 0, 1, 0, 1, 0, 0, 1]

    def padded(training: TrainingRows) -> float:
        """Share of the pixels of the batches that are no image's."""
        loader, plan = BatchLoader(odd, config, train=True), EpochPlan(samples=8, global_batch=2, training=training)
        batches = [batch for epoch in range(8) for batch in loader.epoch(plan, epoch)]
        pixels = sum(batch.images[:, 0].numel() for batch in batches)
        placements = [target.placement for batch in batches for target in batch.targets]
        return 1 - sum(p.scale_x * p.width * p.scale_y * p.height for p in placements) / pixels

    assert padded(training) < 0.75 * padded(TrainingRows())


def test_what_leaves_nothing_or_has_no_effect_is_refused(tmp_path: Path) -> None:
    empty = make_split(tmp_path / "store", [(40, 60)] * 2, [[], [[4.0, 4, 9, 9]]], [True])
    with pytest.raises(ValueError, match=r"has no image with an object to train on; set data\.transform\.skip_empty"):
        DetectionTransformConfig(skip_empty=True).training_rows(empty)
    with pytest.raises(ValidationError, match="group_by_aspect has no effect with resize=letterbox"):
        DetectionTransformConfig(group_by_aspect=True)


def test_other_kinds_train_on_all_rows(tmp_path: Path) -> None:
    split = prepare("digits", None, tmp_path / "digits").split("train")
    assert TransformConfig().training_rows(split) == TrainingRows()
    with pytest.raises(ValueError, match="it has no annotations"):
        DetectionTransformConfig(skip_empty=True).training_rows(split)
