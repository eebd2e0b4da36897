"""Protocols of event detection: what counts, and metrics equal to those of an implementation from the definition.

Prophesee's toolbox is in no package registry: PROPHESEE_TOOLBOX is the folder of its sources, of which `src/io` and
`src/metrics` compute the reference.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from spikefleet.errors import UserError
from spikefleet.tasks.event_metrics import (
    GEN1,
    HALVED_MEGAPIXEL,
    MEGAPIXEL,
    PROTOCOLS,
    Protocol,
    ProtocolMetrics,
    RecordingDetections,
    RecordingLabels,
    evaluate_each_recording,
    evaluate_recordings,
    label_images,
    protocol,
    reported_protocols,
)
from support.plain_detection_metrics import Box, average_precision, protocol_images

NAMES = ("car", "pedestrian")
LARGE, SMALL = [50.0, 60.0, 40.0, 30.0], [200.0, 100.0, 12.0, 14.0]
LATE = 2_000_000
Boxes = TypeVar("Boxes", RecordingLabels, RecordingDetections)


def labels(*rows: tuple[int, Sequence[float], int]) -> RecordingLabels:
    """Labels from (time, x y width height, class)."""
    return RecordingLabels(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[2] for row in rows], np.int64),
    )


def detections(*rows: tuple[int, Sequence[float], int, float]) -> RecordingDetections:
    """Detections from (time, x y width height, class, score)."""
    plain = labels(*(row[:3] for row in rows))
    return RecordingDetections(plain.times, plain.boxes, plain.labels, np.array([row[3] for row in rows], np.float64))


def measured(truth: RecordingLabels, found: RecordingDetections, name: str = "prophesee") -> ProtocolMetrics:
    return evaluate_recordings([truth], [found], NAMES, protocol(name, GEN1), GEN1)


def random_recording(seed: int) -> tuple[RecordingLabels, RecordingDetections]:
    """Objects of all sizes, many near the limits, and detections near and far from them in place and time."""
    draw = np.random.default_rng(seed)
    times = np.sort(draw.choice([0, 90_000, 100_000, 100_001, 499_000, 500_000, 500_001, 900_000, 1_400_000], 40))
    sizes = np.where(draw.random((40, 1)) < 0.4, draw.choice([10, 20, 24, 30], (40, 2)), draw.uniform(4, 60, (40, 2)))
    boxes = np.hstack([draw.uniform(0, 200, (40, 2)), sizes])
    classes = draw.integers(0, 3, 40)  # the third class does not count
    truth = RecordingLabels(times, boxes, classes)
    rows = draw.integers(0, 40, 90)
    shift = draw.choice([0, 0, 20_000, -50_000, 50_000, 50_001, -50_001], 90)
    moved = boxes[rows] + draw.normal(0, 2, (90, 4)) * (draw.random((90, 1)) < 0.6)
    found = RecordingDetections(
        np.maximum(times[rows] + shift, 0),
        moved,
        np.where(draw.random(90) < 0.9, classes[rows], draw.integers(0, 3, 90)),
        draw.permutation(90) / 100,  # no ties within a recording, which either order would resolve
    )
    return truth, found


def together(cases: Sequence[tuple[RecordingLabels, RecordingDetections]], name: str = "prophesee") -> ProtocolMetrics:
    truth, found = [case[0] for case in cases], [case[1] for case in cases]
    return evaluate_recordings(truth, found, NAMES, protocol(name, GEN1), GEN1)


def map50_95(metrics: ProtocolMetrics) -> float:
    assert metrics.coco is not None
    return metrics.coco.twelve["map50_95"]


def plain(truth: RecordingLabels | RecordingDetections) -> list[Box]:
    scores = truth.scores if isinstance(truth, RecordingDetections) else np.ones(len(truth.times))
    columns = zip(truth.times.tolist(), truth.boxes.tolist(), truth.labels.tolist(), scores.tolist(), strict=True)
    return [Box(*column) for column in columns]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_metrics_are_those_of_a_plain_implementation(name: str) -> None:
    cases = [random_recording(seed) for seed in range(4)]
    plain_cases = [(plain(truth), plain(found)) for truth, found in cases]
    images = protocol_images(plain_cases, protocol(name, GEN1), len(NAMES))
    result = together(cases, name)
    assert result.images == len(images) > 4
    assert result.objects == sum(len(image[0]) for image in images)
    assert result.coco is not None
    expected = [
        float(np.mean([average_precision(images, of, iou / 100) for of in range(2) for iou in ious]))
        for ious in (range(50, 100, 5), [50], [75])
    ]
    found = [result.coco.twelve[key] for key in ("map50_95", "map50", "map75")]
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0.05 < found[0] < 0.9
    assert result.named == {f"{key}_{name}": result.coco.twelve[key] for key in ("map50_95", "map50", "map75")}


def of_toolbox(name: str) -> ModuleType:
    """A module of Prophesee's toolbox."""
    folder = os.environ.get("PROPHESEE_TOOLBOX", "")
    if not folder:
        pytest.skip("set PROPHESEE_TOOLBOX to the folder of prophesee-automotive-dataset-toolbox")
    found = importlib.util.spec_from_file_location(Path(name).stem, Path(folder) / "src" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def in_float32(boxes: Boxes) -> Boxes:
    """The same with coordinates that float32 has, as the toolbox's."""
    return replace(boxes, boxes=boxes.boxes.astype(np.float32).astype(np.float64))


def toolbox_boxes(of: RecordingLabels | RecordingDetections) -> NDArray[Any]:
    """Boxes of the classes that count as the toolbox has them, by time."""
    scores = of.scores if isinstance(of, RecordingDetections) else np.ones(len(of.times))
    kinds = [("t", "i8"), *((name, "f4") for name in "xywh"), ("class_id", "u4"), ("class_confidence", "f8")]
    rows = [
        (time, *box, label, score)
        for time, box, label, score in zip(of.times, of.boxes, of.labels, scores, strict=True)
    ]
    boxes = np.array(rows, kinds)
    return np.sort(boxes[boxes["class_id"] < len(NAMES)], order="t", kind="stable")


@pytest.mark.parametrize("name", ["prophesee", "toolbox_cli"])
def test_metrics_are_those_of_prophesees_toolbox(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filtering, evaluation = of_toolbox("io/box_filtering"), of_toolbox("metrics/coco_eval")
    stats: list[NDArray[np.float64]] = []

    class Kept(evaluation.COCOeval):  # type: ignore[misc, name-defined]  # it prints its metrics, and returns nothing
        def summarize(self) -> None:
            super().summarize()
            stats.append(self.stats[self.stats > -1])  # without those that are undefined

    monkeypatch.setattr(evaluation, "COCOeval", Kept)
    cases = [(in_float32(truth), in_float32(found)) for truth, found in map(random_recording, range(6))]
    by = protocol(name, GEN1)
    theirs = [
        [filtering.filter_boxes(toolbox_boxes(part), by.skip_us, by.diagonal, by.side) for part in parts]
        for parts in zip(*cases, strict=True)
    ]
    evaluation.evaluate_detection(*theirs, classes=NAMES, height=GEN1[0], width=GEN1[1])
    ours = together(cases, name).coco
    assert ours is not None
    assert list(ours.twelve.values()) == pytest.approx(stats[0].tolist(), abs=1e-9)
    # The detections of one recording less sure, and they differ.
    less = replace(cases[0][1], scores=cases[0][1].scores * 0.1)
    changed = together([(cases[0][0], less), *cases[1:]], name).coco
    assert changed is not None
    assert list(changed.twelve.values()) != pytest.approx(stats[0].tolist(), abs=1e-9)


def test_protocols_differ() -> None:
    """Of the same boxes, every protocol has another value: a name cannot stand for another one."""
    cases = [random_recording(seed) for seed in range(4)]
    values = [map50_95(together(cases, name)) for name in PROTOCOLS]
    assert min(abs(one - other) for one, other in pairwise(sorted(values))) > 1e-3


def test_a_detector_of_large_boxes_is_perfect_by_prophesee_and_not_by_none() -> None:
    truth = labels((LATE, LARGE, 0), (LATE, SMALL, 0), (LATE, LARGE, 1), (3_000_000, SMALL, 1))
    found = detections((LATE, LARGE, 0, 0.9), (LATE, LARGE, 1, 0.8))
    assert measured(truth, found).named == pytest.approx(
        {"map50_95_prophesee": 1, "map50_prophesee": 1, "map75_prophesee": 1}
    )
    none = measured(truth, found, "none").named
    assert none["map50_none"] == pytest.approx(51 / 101)  # of each class one of two is found: recall up to 0.50
    missed = measured(truth, detections((LATE, LARGE, 0, 0.9)))
    assert missed.named["map50_prophesee"] == pytest.approx(0.5)


def of_diagonal(diagonal: float) -> list[float]:
    return [50.0, 60.0, 0.6 * diagonal, 0.8 * diagonal]


def test_a_box_of_29_pixels_of_diagonal_counts_nowhere() -> None:
    small, enough = of_diagonal(29), of_diagonal(30)
    assert measured(labels((LATE, small, 0)), detections()).coco is None
    truth = labels((LATE, LARGE, 0))
    # Among the detections it would be a false positive before the true one.
    assert measured(truth, detections((LATE, small, 0, 0.9), (LATE, LARGE, 0, 0.5))).named[
        "map50_prophesee"
    ] == pytest.approx(1.0)
    assert measured(labels((LATE, enough, 0)), detections()).objects == 1
    assert measured(truth, detections((LATE, enough, 0, 0.9), (LATE, LARGE, 0, 0.5))).named[
        "map50_prophesee"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "side"), [("prophesee", 10), ("toolbox_cli", 20), ("cordone", 20)])
def test_a_narrow_box_counts_from_its_side_on(name: str, side: int) -> None:
    for box in ([0.0, 0.0, side - 0.01, 90.0], [0.0, 0.0, 90.0, side - 0.01]):
        assert measured(labels((LATE, box, 0)), detections(), name).objects == 0
        assert measured(labels((LATE, box, 0)), detections(), "none").objects == 1
    assert measured(labels((LATE, [0.0, 0.0, side, 90.0], 0)), detections(), name).objects == 1


@pytest.mark.parametrize(("name", "skip"), [("prophesee", 500_000), ("toolbox_cli", 100_000)])
def test_the_start_of_a_recording_is_left_out(name: str, skip: int) -> None:
    assert measured(labels((skip, LARGE, 0)), detections(), name).images == 0
    assert measured(labels((skip + 1, LARGE, 0)), detections(), name).images == 1
    early = detections((skip, LARGE, 0, 0.9))  # near enough in time, but not after the skip
    assert measured(labels((skip + 1, LARGE, 0)), early, name).named[f"map50_{name}"] == 0.0
    for other in ("none", "cordone"):
        assert measured(labels((0, LARGE, 0)), detections((0, LARGE, 0, 0.9)), other).named[
            f"map50_{other}"
        ] == pytest.approx(1.0)


@pytest.mark.parametrize("off", [-50_001, 50_001])
def test_a_detection_too_far_in_time_is_none(off: int) -> None:
    truth = labels((LATE, LARGE, 0))
    nearest = off - int(np.sign(off))
    assert measured(truth, detections((LATE + nearest, LARGE, 0, 0.9))).named["map50_prophesee"] == pytest.approx(1.0)
    assert measured(truth, detections((LATE + off, LARGE, 0, 0.9))).named["map50_prophesee"] == 0.0
    # Without a window, only the label time itself.
    assert measured(truth, detections((LATE + 1, LARGE, 0, 0.9)), "none").named["map50_none"] == 0.0


def test_every_set_of_detections_in_the_window_counts() -> None:
    truth = labels((LATE, LARGE, 0))
    sets = [(LATE + off, LARGE, 0, 0.9) for off in (-40_000, 0, 40_000)]
    images = label_images([truth], [detections(*sets)], 2, protocol("prophesee", GEN1), GEN1)
    assert [len(found.scores) for _, found in images] == [3]
    precise = measured(labels(*((LATE + k * 10**6, LARGE, 0) for k in range(4))), detections(*sets))
    assert precise.named["map50_prophesee"] < 0.26  # one of four objects is found


def test_an_image_without_boxes_that_count_vanishes() -> None:
    truth = labels((LATE, LARGE, 0), (3_000_000, SMALL, 0))
    stray = [150.0, 10.0, 50.0, 50.0]
    found = detections((LATE, LARGE, 0, 0.5), (3_000_000, stray, 0, 0.9))
    assert (measured(truth, found).images, measured(truth, found, "none").images) == (1, 2)
    assert measured(truth, found).named["map50_prophesee"] == pytest.approx(1)  # the stray box has no image
    assert measured(truth, found, "none").named["map50_none"] < 0.6


def test_crowded_images_count_the_best_detections() -> None:
    truth = labels((LATE, LARGE, 0))
    strays = [(LATE, [5.0 + k, 150.0, 40.0, 40.0], 0, 0.9) for k in range(100)]
    found = detections(*strays, (LATE, LARGE, 0, 0.5))
    assert measured(truth, found).named["map50_prophesee"] == 0.0
    assert measured(truth, detections(*strays[1:], (LATE, LARGE, 0, 0.5))).named["map50_prophesee"] > 0


def test_order_does_not_matter_and_recordings_do_not_mix() -> None:
    cases = [random_recording(seed) for seed in (5, 6)]
    both = together(cases)
    shuffled = [(_taken(truth, 1), _taken(found, 2)) for truth, found in cases[::-1]]
    assert map50_95(together(shuffled)) == pytest.approx(map50_95(both))
    exchanged = together([(cases[0][0], cases[1][1]), (cases[1][0], cases[0][1])])
    assert exchanged.named["map50_prophesee"] < 0.5 * both.named["map50_prophesee"]


def _taken(boxes: Boxes, seed: int) -> Boxes:
    order: NDArray[np.int64] = np.random.default_rng(seed).permutation(len(boxes.times))
    return replace(boxes, **{name: column[order] for name, column in vars(boxes).items()})


def test_each_recording_by_itself() -> None:
    cases = [random_recording(5), (labels((0, SMALL, 0)), detections()), random_recording(6)]
    truth, found = [case[0] for case in cases], [case[1] for case in cases]
    first, none, last = evaluate_each_recording(truth, found, NAMES, protocol("prophesee", GEN1), GEN1)
    assert (none.images, none.objects, none.ap50_95, none.ap50) == (0, 0, None, None)
    both = together(cases)
    assert (first.images + last.images, first.objects + last.objects) == (both.images, both.objects)
    assert first.ap50_95 != last.ap50_95
    alone = together(cases[:1])
    assert (first.ap50_95, first.ap50) == tuple(alone.named[f"{key}_prophesee"] for key in ("map50_95", "map50"))


def test_limits_belong_to_the_sensor() -> None:
    assert protocol("prophesee", GEN1) == Protocol("prophesee", 500_000, 30, 10, 50_000)
    assert protocol("prophesee", MEGAPIXEL) == Protocol("prophesee", 500_000, 60, 20, 50_000)
    assert protocol("prophesee", HALVED_MEGAPIXEL) == Protocol("prophesee", 500_000, 30, 10, 50_000)
    assert protocol("toolbox_cli", MEGAPIXEL) == Protocol("toolbox_cli", 100_000, 60, 10, 50_000)
    assert protocol("cordone", GEN1) == Protocol("cordone", None, 30, 20, 50_000)
    assert reported_protocols(GEN1) == ("prophesee", "none")
    assert reported_protocols((96, 96)) == ("none",)
    with pytest.raises(UserError, match=r"'prophesee' is not defined for a sensor of 96x90 pixels, only for 304x240"):
        protocol("prophesee", (90, 96))
    with pytest.raises(UserError, match=r"'profesee' does not exist; use one of prophesee, none, cordone, toolbox_cli"):
        protocol("profesee", GEN1)
