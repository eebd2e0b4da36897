"""Detection metrics of event cameras' recordings, by the protocols with which Gen1 and 1Mpx results are published.

A protocol says which boxes count, and which detections belong to a label time; pycocotools does the rest. AP values of
different protocols are not comparable: ten points lie between them on Gen1 for one detector that is weak on small
boxes. So metrics carry the name of their protocol, as `map50_95_prophesee`.

* `prophesee`: Perot, de Tournemire, Nitti, Masci and Sironi, "Learning to detect objects with a 1 megapixel event
  camera", NeurIPS 2020, supplement; RVT and S5-ViT report it.
* `toolbox_cli`: what the command of Prophesee's toolbox computes; it has the least sides of the two cameras exchanged.
* `cordone`: Cordone, Miramond and Thierion, "Object detection with spiking neural networks on automotive event data",
  IJCNN 2022; SFOD too.
* `none`: every label time is an image with all of its boxes; SpikeYOLO and EMS-YOLO.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikefleet.errors import UserError
from spikefleet.tasks.coco_metrics import (
    COCO_MAX_DETECTIONS,
    CocoMetrics,
    FoundBoxes,
    evaluate_boxes,
    ground_truth,
    results,
)
from spikefleet_pipelines.store.annotations import Annotations

Sensor = tuple[int, int]
"""Height and width in pixels."""

GEN1: Sensor = (240, 304)
MEGAPIXEL: Sensor = (720, 1280)
HALVED_MEGAPIXEL: Sensor = (360, 640)

DEFAULT_PROTOCOL = "prophesee"
"""The protocol of reports, where the sensor has it."""

HEADLINES = ("map50_95", "map50", "map75")
"""COCO metrics that are reported for each protocol; the others are in the details."""

_TOLERANCE_US = 50_000


@dataclass(frozen=True)
class Protocol:
    """Which boxes count, of the labels and of the detections alike."""

    name: str
    skip_us: int | None
    """Boxes up to this time of a recording do not count, that one included; None: all times count."""
    diagonal: float
    """Least diagonal of a box that counts, in pixels."""
    side: float
    """Least width and height of a box that counts, in pixels."""
    tolerance_us: int
    """Detections up to so much before or after a label time belong to it."""

    def counts(self, times: NDArray[np.int64], boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which boxes count, [n].

        Args:
            times: in us from the start of the recording, [n].
            boxes: x y width height in pixels, [n, 4].
        """
        width, height = boxes[:, 2], boxes[:, 3]
        late = np.ones(len(times), np.bool_) if self.skip_us is None else times > self.skip_us
        large = width**2 + height**2 >= self.diagonal**2
        return late & large & (width >= self.side) & (height >= self.side)


# Skip in us, diagonal and side in pixels. A 1Mpx recording of halved size has half of its limits.
_LIMITS: Mapping[str, Mapping[Sensor, tuple[int | None, float, float]]] = {
    "prophesee": {
        GEN1: (500_000, 30, 10),
        MEGAPIXEL: (500_000, 60, 20),
        HALVED_MEGAPIXEL: (500_000, 30, 10),
    },
    "toolbox_cli": {
        GEN1: (100_000, 30, 20),
        MEGAPIXEL: (100_000, 60, 10),
        HALVED_MEGAPIXEL: (100_000, 30, 5),
    },
    "cordone": {GEN1: (None, 30, 20)},
}

PROTOCOLS = ("prophesee", "none", "cordone", "toolbox_cli")
"""Names of the protocols."""


def protocol(name: str, sensor: Sensor) -> Protocol:
    """Return a protocol with its limits for a sensor.

    Raises:
        UserError: the protocol is unknown, or not defined for the sensor.
    """
    if name == "none":  # without a window: label times of a set may be closer than it
        return Protocol(name, None, 0, 0, 0)
    if name not in _LIMITS:
        raise UserError(f"evaluation protocol {name!r} does not exist; use one of {', '.join(PROTOCOLS)}")
    if sensor not in _LIMITS[name]:
        known = ", ".join(f"{width}x{height}" for height, width in _LIMITS[name])
        raise UserError(
            f"evaluation protocol {name!r} is not defined for a sensor of {sensor[1]}x{sensor[0]} pixels, only for "
            f"{known}; use 'none'"
        )
    return Protocol(name, *_LIMITS[name][sensor], _TOLERANCE_US)


def reported_protocols(sensor: Sensor) -> tuple[str, ...]:
    """Names of the protocols that a report on recordings of a sensor has, the default first."""
    return (DEFAULT_PROTOCOL, "none") if sensor in _LIMITS[DEFAULT_PROTOCOL] else ("none",)


@dataclass(frozen=True)
class RecordingLabels:
    """The labelled boxes of one recording, in any order."""

    times: NDArray[np.int64]
    """In us from the start of the recording, [n]."""
    boxes: NDArray[np.float64]
    """x y width height in pixels, [n, 4]."""
    labels: NDArray[np.int64]
    """Class of each, 0 to K - 1, [n]; boxes of other classes do not count."""


@dataclass(frozen=True)
class RecordingDetections:
    """The detections in one recording, in any order."""

    times: NDArray[np.int64]
    """In us from the start of the recording, [n]."""
    boxes: NDArray[np.float64]
    """x y width height in pixels, [n, 4]."""
    labels: NDArray[np.int64]
    """Class of each, 0 to K - 1, [n]; boxes of other classes do not count."""
    scores: NDArray[np.float64]
    """In [0, 1], [n]."""


@dataclass(frozen=True)
class RecordingMetrics:
    """One recording: label times and objects that count, and average precision; None where nothing counts."""

    images: int
    objects: int
    ap50_95: float | None
    ap50: float | None


@dataclass(frozen=True)
class ProtocolMetrics:
    """All metrics by one protocol."""

    protocol: Protocol
    images: int
    """Label times with at least one box that counts."""
    objects: int
    """Boxes that count."""
    coco: CocoMetrics | None
    """COCO's metrics; None where no box counts."""

    @property
    def named(self) -> dict[str, float]:
        """The main metrics, with the protocol in the name."""
        found = {} if self.coco is None else self.coco.twelve
        return {f"{name}_{self.protocol.name}": found[name] for name in HEADLINES if name in found}


LabelImage = tuple[Annotations, FoundBoxes]
"""The objects and the detections of one label time."""


def evaluate_recordings(
    truth: Sequence[RecordingLabels],
    found: Sequence[RecordingDetections],
    class_names: Sequence[str],
    by: Protocol,
    sensor: Sensor,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> ProtocolMetrics:
    """Compute the metrics of a data set.

    Args:
        truth: labels of each recording.
        found: detections of each recording.
        class_names: of the K classes.
        by: the protocol.
        sensor: height and width.
        max_detections: the best detections of a class at a label time that count.
    """
    return _measured(label_images(truth, found, len(class_names), by, sensor), class_names, by, max_detections)


def evaluate_each_recording(
    truth: Sequence[RecordingLabels],
    found: Sequence[RecordingDetections],
    class_names: Sequence[str],
    by: Protocol,
    sensor: Sensor,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> list[RecordingMetrics]:
    """Compute the metrics of each recording by itself; arguments as of `evaluate_recordings`."""
    alone = []
    for labels, detections in zip(truth, found, strict=True):
        one = evaluate_recordings([labels], [detections], class_names, by, sensor, max_detections)
        twelve: Mapping[str, float] = {} if one.coco is None else one.coco.twelve
        alone.append(RecordingMetrics(one.images, one.objects, twelve.get("map50_95"), twelve.get("map50")))
    return alone


def label_images(
    truth: Sequence[RecordingLabels],
    found: Sequence[RecordingDetections],
    classes: int,
    by: Protocol,
    sensor: Sensor,
) -> list[LabelImage]:
    """Return what counts as images: one for each different time of a recording at which a label counts.

    A time whose boxes are all left out is no image. Detections count in every image whose time is near enough, so that
    several sets of detections around one label time are false positives but for one.

    Args:
        truth: labels of each recording.
        found: detections of each recording.
        classes: number K of classes.
        by: the protocol.
        sensor: height and width.
    """
    ids = itertools.count()
    return [
        image
        for labels, detections in zip(truth, found, strict=True)
        for image in _images_of(labels, detections, classes, by, sensor, ids)
    ]


def _images_of(
    labels: RecordingLabels,
    detections: RecordingDetections,
    classes: int,
    by: Protocol,
    sensor: Sensor,
    ids: Iterator[int],
) -> Iterator[LabelImage]:
    objects = np.flatnonzero(by.counts(labels.times, labels.boxes) & _known(labels.labels, classes))
    objects = objects[np.argsort(labels.times[objects], kind="stable")]
    boxes = np.flatnonzero(by.counts(detections.times, detections.boxes) & _known(detections.labels, classes))
    boxes = boxes[np.argsort(detections.times[boxes], kind="stable")]
    label_times, box_times = labels.times[objects], detections.times[boxes]
    times = np.unique(label_times)
    starts = np.searchsorted(label_times, times)
    ends = np.searchsorted(label_times, times, side="right")
    firsts = np.searchsorted(box_times, times - by.tolerance_us)
    lasts = np.searchsorted(box_times, times + by.tolerance_us, side="right")
    for start, end, first, last in zip(starts, ends, firsts, lasts, strict=True):
        near = boxes[first:last]
        best_first = near[np.argsort(-detections.scores[near], kind="stable")]
        yield _annotations(next(ids), labels, objects[start:end], sensor), _detected(detections, best_first)


def _known(labels: NDArray[np.int64], classes: int) -> NDArray[np.bool_]:
    return (labels >= 0) & (labels < classes)


def _annotations(number: int, labels: RecordingLabels, rows: NDArray[np.int64], sensor: Sensor) -> Annotations:
    boxes, classes = labels.boxes[rows], labels.labels[rows]
    return Annotations(
        number,
        *sensor,
        boxes,
        classes + 1,
        classes,
        np.zeros(len(rows), np.bool_),
        boxes[:, 2] * boxes[:, 3],
        np.arange(len(rows), dtype=np.int64),
    )


def _detected(detections: RecordingDetections, rows: NDArray[np.int64]) -> FoundBoxes:
    boxes = detections.boxes[rows]
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    return FoundBoxes(corners, detections.scores[rows], detections.labels[rows])


def _measured(
    images: Sequence[LabelImage], class_names: Sequence[str], by: Protocol, max_detections: int
) -> ProtocolMetrics:
    targets, predictions = [image[0] for image in images], [image[1] for image in images]
    objects = sum(len(target.labels) for target in targets)
    if not images:
        return ProtocolMetrics(by, 0, 0, None)
    ids = range(1, len(class_names) + 1)
    annotations = ground_truth(targets, class_names, ids)
    coco = evaluate_boxes(annotations, results(predictions, targets, ids), max_detections)
    return ProtocolMetrics(by, len(images), objects, coco)
