"""What the evaluation of a detector holds beside COCO's metrics, where its images are label times of recordings.

* The metrics by each protocol that the sensor has (`event_metrics`), with classes by name.
* The metrics of each recording by itself.
* The metrics by how long no object has moved: an event camera sees nothing then, so this is what memory is needed for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from spikefleet.tasks.coco_metrics import FoundBoxes, evaluate_boxes, ground_truth, results
from spikefleet.tasks.event_metrics import (
    ProtocolMetrics,
    RecordingDetections,
    RecordingLabels,
    Sensor,
    evaluate_each_recording,
    evaluate_recordings,
    protocol,
    reported_protocols,
)
from spikefleet_pipelines.store.annotations import Annotations, Moment


def are_label_times(targets: Sequence[Annotations]) -> bool:
    """Whether images are label times of recordings; a split has either."""
    return bool(targets) and all(target.moment is not None for target in targets)


def protocol_metrics(
    predictions: Sequence[FoundBoxes],
    targets: Sequence[Annotations],
    class_names: Sequence[str],
    max_detections: int,
) -> dict[str, float]:
    """Return the main metrics by each protocol, by name.

    Args:
        predictions: detections at each label time.
        targets: objects of each label time.
        class_names: of the K classes.
        max_detections: the best detections of a class at a label time that count.
    """
    found = _by_protocol(predictions, targets, class_names, max_detections)
    return {name: value for one in found for name, value in one.named.items()}


def stillness_metrics(
    predictions: Sequence[FoundBoxes],
    targets: Sequence[Annotations],
    class_names: Sequence[str],
    max_detections: int,
) -> dict[str, float]:
    """Return map50_95 and map50 of label times since whose predecessor no object has moved, and of the others, by name.

    Empty unless there are both; arguments as of `protocol_metrics`.
    """
    still = [place for place, target in enumerate(targets) if _moment(target).still_us > 0]
    moving = [place for place, target in enumerate(targets) if _moment(target).still_us == 0]
    if not still or not moving:
        return {}
    return {
        f"{name}_{group}": value
        for group, places in (("still", still), ("moving", moving))
        for name, value in _main(predictions, targets, places, class_names, max_detections).items()
        if value is not None
    }


def event_details(
    predictions: Sequence[FoundBoxes],
    targets: Sequence[Annotations],
    class_names: Sequence[str],
    max_detections: int,
) -> dict[str, Any]:
    """Return `protocols`, `recordings`, `still` and `protocol_remark`; arguments as of `protocol_metrics`.

    Returns:
        `protocols`: by name, the protocol's limits, images, objects, COCO's metrics and classes. `recordings`: for each
        one its row, images, objects, ap50_95 and ap50 by the first protocol. `still`: for each time since an object has
        moved still_us, images, objects, map50_95 and map50; empty unless something stands still. `protocol_remark`: in
        words, which protocols the values are of.
    """
    found = _by_protocol(predictions, targets, class_names, max_detections)
    truth, detected, sensor = _recordings(predictions, targets)
    first = protocol(reported_protocols(sensor)[0], sensor)
    alone = evaluate_each_recording(
        list(truth.values()), list(detected.values()), class_names, first, sensor, max_detections
    )
    return {
        "protocols": {one.protocol.name: _protocol_details(one) for one in found},
        "recordings": [{"recording": row, **vars(one)} for row, one in zip(truth, alone, strict=True)],
        "still": _by_stillness(predictions, targets, class_names, max_detections),
        "protocol_remark": _remark(found, sensor),
    }


def _by_protocol(
    predictions: Sequence[FoundBoxes],
    targets: Sequence[Annotations],
    class_names: Sequence[str],
    max_detections: int,
) -> list[ProtocolMetrics]:
    truth, found, sensor = _recordings(predictions, targets)
    return [
        evaluate_recordings(
            list(truth.values()), list(found.values()), class_names, protocol(name, sensor), sensor, max_detections
        )
        for name in reported_protocols(sensor)
    ]


def _recordings(
    predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]
) -> tuple[dict[int, RecordingLabels], dict[int, RecordingDetections], Sensor]:
    """Labels and detections by the row of their recording, and the sensor."""
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for place, target in enumerate(targets):
        rows[_moment(target).recording].append(place)
    truth: dict[int, RecordingLabels] = {}
    found: dict[int, RecordingDetections] = {}
    for row, places in sorted(rows.items()):
        here = [targets[place] for place in places]
        boxes = [predictions[place] for place in places]
        times = np.array([_moment(target).time_us for target in here], np.int64)
        truth[row] = RecordingLabels(
            np.repeat(times, [len(target.labels) for target in here]),
            np.concatenate([target.boxes for target in here]),
            np.concatenate([target.labels for target in here]),
        )
        corners = np.concatenate([one.boxes for one in boxes]).reshape(-1, 4)
        found[row] = RecordingDetections(
            np.repeat(times, [len(one.labels) for one in boxes]),
            np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]),
            np.concatenate([one.labels for one in boxes]),
            np.concatenate([one.scores for one in boxes]),
        )
    return truth, found, (targets[0].height, targets[0].width)


def _moment(target: Annotations) -> Moment:
    assert target.moment is not None, "the caller asks are_label_times first"
    return target.moment


def _protocol_details(found: ProtocolMetrics) -> dict[str, Any]:
    limits = found.protocol
    return {
        "skip_us": limits.skip_us,
        "diagonal": limits.diagonal,
        "side": limits.side,
        "tolerance_us": limits.tolerance_us,
        "images": found.images,
        "objects": found.objects,
        "metrics": {} if found.coco is None else found.coco.twelve,
        "classes": []
        if found.coco is None
        else [
            {"name": one.name, "objects": one.objects, "ap50_95": one.ap50_95, "ap50": one.ap50}
            for one in found.coco.classes
        ],
    }


def _by_stillness(
    predictions: Sequence[FoundBoxes],
    targets: Sequence[Annotations],
    class_names: Sequence[str],
    max_detections: int,
) -> list[dict[str, Any]]:
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for place, target in enumerate(targets):
        groups[_moment(target).still_us].append(place)
    if groups.keys() == {0}:
        return []
    rows = []
    for still_us, places in sorted(groups.items()):
        rows.append(
            {
                "still_us": still_us,
                "images": len(places),
                "objects": sum(len(targets[place].labels) for place in places),
                **_main(predictions, targets, places, class_names, max_detections),
            }
        )
    return rows


def _main(
    predictions: Sequence[FoundBoxes],
    targets: Sequence[Annotations],
    places: Sequence[int],
    class_names: Sequence[str],
    max_detections: int,
) -> dict[str, float | None]:
    """map50_95 and map50 of some label times; None where they have no objects."""
    ids = range(1, len(class_names) + 1)
    numbered = [
        targets[place]._replace(image_id=number, category_ids=targets[place].labels + 1)
        for number, place in enumerate(places)
    ]
    found = results([predictions[place] for place in places], numbered, ids)
    twelve = evaluate_boxes(ground_truth(numbered, class_names, ids), found, max_detections).twelve
    return {name: twelve.get(name) for name in ("map50_95", "map50")}


def _remark(found: Sequence[ProtocolMetrics], sensor: Sensor) -> str:
    names = " and ".join(repr(one.protocol.name) for one in found)
    if len(found) == 1:
        return (
            f"metrics by protocol {names} alone: the others have limits for the sensors of Gen1 and 1Mpx, not for "
            f"{sensor[1]}x{sensor[0]} pixels"
        )
    empty = [one.protocol.name for one in found if one.coco is None]
    return f"metrics by protocols {names}" + (f"; by {empty[0]!r} no box counts" if empty else "")
