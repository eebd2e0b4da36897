"""The evaluation of detectors on recordings of events: protocols side by side, recordings, and what stands still."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spikefleet.config.recipes import load_config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json
from spikefleet.tasks import build_task
from spikefleet.tasks.coco_metrics import FoundBoxes
from spikefleet.tasks.detection import Detection
from spikefleet.tasks.event_metrics import GEN1, HEADLINES
from spikefleet_models.families import model_config
from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan
from spikefleet_pipelines.store.annotations import Annotations, Moment
from spikefleet_pipelines.transforms.event_detection_config import EventDetectionTransformConfig
from support.event_stores import CATEGORY_IDS, boxed_store

NAMES, IDS = ("car", "pedestrian"), (0, 1)
LARGE, SMALL = [50.0, 60.0, 40.0, 30.0], [200.0, 100.0, 12.0, 14.0]


@pytest.fixture(scope="module")
def task() -> Detection:
    criterion = model_config("spike_yolo_n", num_classes=2).build_criterion()
    return Detection(criterion, NAMES, IDS)


def label_time(
    number: int, recording: int, time: int, *boxes: list[float], sensor: tuple[int, int] = GEN1, still: int = 0
) -> Annotations:
    """Cars at one time of a recording."""
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    zeros = np.zeros(len(corners), np.int64)
    moment = Moment(recording, time, still)
    areas = corners[:, 2] * corners[:, 3]
    return Annotations(number, *sensor, corners, zeros, zeros, zeros.astype(bool), areas, zeros, moment)


def of(target: Annotations, *rows: int) -> FoundBoxes:
    """Detections that are the objects at these rows."""
    boxes = target.boxes[list(rows)].reshape(-1, 4)
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    return FoundBoxes(corners, np.linspace(0.9, 0.8, len(rows)), np.zeros(len(rows), np.int64))


@pytest.fixture
def scene() -> tuple[list[FoundBoxes], list[Annotations]]:
    """Two recordings, whose large boxes are found: all of the first, after 0.5 s, and one of two of the second."""
    targets = [
        label_time(0, 3, 500_000, LARGE),
        label_time(1, 3, 750_000, LARGE, SMALL),
        label_time(2, 7, 1_000_000, LARGE),
        label_time(3, 7, 2_000_000, LARGE),
    ]
    return [of(targets[0]), of(targets[1], 0), of(targets[2], 0), of(targets[3])], targets


def test_protocols_stand_side_by_side(task: Detection, scene: tuple[list[FoundBoxes], list[Annotations]]) -> None:
    details = task.details(*scene)
    metrics = details["metrics"]
    recall = {"prophesee": 2 / 3, "none": 2 / 5}
    for name, share in recall.items():
        assert metrics[f"map50_{name}"] == pytest.approx((int(share * 100) + 1) / 101, abs=1e-6)
        assert details["protocols"][name]["metrics"]["map50"] == metrics[f"map50_{name}"]
    assert {key: metrics[f"{key}_none"] for key in ("map50_95", "map50", "map75")} == {
        key: pytest.approx(metrics[key]) for key in ("map50_95", "map50", "map75")
    }
    assert task.metrics(*scene) == metrics
    prophesee, none = (details["protocols"][name] for name in ("prophesee", "none"))
    assert [(one["images"], one["objects"]) for one in (prophesee, none)] == [(3, 3), (4, 5)]
    assert (prophesee["skip_us"], prophesee["diagonal"], prophesee["side"]) == (500_000, 30, 10)
    assert [one["name"] for one in prophesee["classes"]] == list(NAMES)
    assert [one["objects"] for one in prophesee["classes"]] == [3, 0]
    assert details["protocol_remark"] == "metrics by protocols 'prophesee' and 'none'"


def test_each_recording_has_metrics(task: Detection, scene: tuple[list[FoundBoxes], list[Annotations]]) -> None:
    first, second = task.details(*scene)["recordings"]
    assert (first["recording"], first["images"], first["objects"]) == (3, 1, 1)
    assert first["ap50"] == pytest.approx(1)
    assert (second["recording"], second["images"], second["objects"]) == (7, 2, 2)
    assert second["ap50"] == pytest.approx(51 / 101)


def test_the_report_has_them(
    task: Detection, scene: tuple[list[FoundBoxes], list[Annotations]], tmp_path: Path
) -> None:
    details = task.details(*scene)
    header, car, pedestrian = task.report.table(details)
    assert header == ("class", "objects", "AP50-95", "AP50", "AP50-95 prophesee", "AP50 prophesee")
    assert car[:2] == ("car", "5")
    assert car[3] != car[5]
    assert pedestrian == ("pedestrian", "0", "-", "-", "-", "-")
    task.report.write(details, *scene, tmp_path)
    assert read_json(tmp_path / "evaluation.json") == json.loads(json.dumps(details))


def test_other_sensors_have_no_filter(task: Detection) -> None:
    target = label_time(0, 0, 50_000, SMALL, sensor=(96, 96))
    details = task.details([of(target, 0)], [target])
    assert list(details["protocols"]) == ["none"]
    assert "96x96 pixels" in details["protocol_remark"]
    assert not [name for name in details["metrics"] if name.endswith("prophesee")]
    assert task.report.table(details)[0] == ("class", "objects", "AP50-95", "AP50")


def test_metrics_of_protocols_choose_checkpoints_of_runs_on_events() -> None:
    config = load_config("gen1_spike_yolo_n", {"checkpoint.metric": "map50_95_prophesee"})
    gen1 = DataSummary("gen1", "0" * 64, NAMES, IDS, sensor=GEN1)
    names = build_task(config, gen1).metric_names
    assert {f"{name}_{by}" for name in HEADLINES for by in ("prophesee", "none")} < set(names)
    with pytest.raises(UserError, match="map50_95_prophesee' must be a metric of the task"):
        build_task(config, replace(gen1, sensor=None))


def test_no_box_may_count(task: Detection) -> None:
    target = label_time(0, 0, 400_000, LARGE)
    details = task.details([of(target, 0)], [target])
    assert details["metrics"]["map50_none"] == pytest.approx(1)
    assert "map50_prophesee" not in details["metrics"]
    assert details["protocol_remark"].endswith("; by 'prophesee' no box counts")
    assert details["recordings"] == [{"recording": 0, "images": 0, "objects": 0, "ap50_95": None, "ap50": None}]


def test_what_stands_still_is_told_apart(task: Detection) -> None:
    targets = [label_time(k, 0, 10**6 + k, LARGE, still=still) for k, still in enumerate((0, 0, 50_000, 100_000))]
    details = task.details([of(targets[0], 0), of(targets[1]), of(targets[2], 0), of(targets[3])], targets)
    assert [(one["still_us"], one["images"], one["objects"]) for one in details["still"]] == [
        (0, 2, 2),
        (50_000, 1, 1),
        (100_000, 1, 1),
    ]
    assert [one["map50"] for one in details["still"]] == pytest.approx([51 / 101, 1, 0])
    metrics = details["metrics"]
    assert [metrics[f"map50_{group}"] for group in ("moving", "still")] == pytest.approx([51 / 101, 51 / 101])
    assert "map50_still" not in task.metrics([of(targets[0], 0)], targets[:1])
    assert task.details([of(targets[0], 0)], targets[:1])["still"] == []


def test_label_times_come_from_the_store_through_the_loader(tmp_path: Path) -> None:
    store = boxed_store(tmp_path / "store", "saccade_scenes", (56, 60), 3)
    config = EventDetectionTransformConfig(window="50ms").for_timesteps(2)
    loader = BatchLoader(store.samples("test"), config, train=False)
    (batch,) = loader.epoch(EvaluationPlan(samples=6, global_batch=6), 0)
    task = Detection(model_config("spike_yolo_n", num_classes=2).build_criterion(), ("small", "large"), CATEGORY_IDS)
    targets = task.targets(batch)
    assert [target.moment for target in targets] == [
        Moment(row, time, 0) for row in range(3) for time in (50_000, 100_000)
    ]
    details = task.details([of(target, 0) for target in targets], targets)
    wrong = sum(int(target.labels[0]) for target in targets)  # all detections are of the first class
    assert details["metrics"]["map50_none"] == pytest.approx(details["metrics"]["map50"])
    assert (len(details["recordings"]), wrong) == (3, 3)
    assert details["protocols"]["none"]["objects"] == 6


def test_images_have_none_of_it(task: Detection) -> None:
    target = label_time(0, 0, 10**6, LARGE)._replace(moment=None)
    details = task.details([of(target, 0)], [target])
    assert not {"protocols", "recordings", "still", "protocol_remark"} & details.keys()
    assert not [name for name in details["metrics"] if name.endswith(("none", "prophesee"))]


def frames(boxes: list[list[list[float]]], tracks: list[list[int]]) -> LabelFrames:
    """Label times every 50 ms."""
    times = np.repeat(50_000 * np.arange(1, len(boxes) + 1), [len(one) for one in boxes])
    every = np.array([box for one in boxes for box in one], np.float64)
    return LabelFrames.of_objects(
        times, every, np.zeros(len(every), np.int64), np.array([t for one in tracks for t in one])
    )


def test_still_is_what_has_the_same_boxes_and_tracks() -> None:
    moved = [51.0, *LARGE[1:]]
    still = frames(
        [[LARGE], [LARGE], [LARGE, SMALL], [SMALL, LARGE], [SMALL, moved]], [[4], [4], [4, 2], [2, 4], [2, 4]]
    )
    assert [still.still_us(k) for k in range(5)] == [0, 50_000, 0, 50_000, 0]
    exchanged = frames([[LARGE], [LARGE], [LARGE]], [[4], [5], [5]])
    assert [exchanged.still_us(k) for k in range(3)] == [0, 0, 50_000]
    unknown = frames([[LARGE], [LARGE]], [[-1], [-1]])
    assert [unknown.still_us(k) for k in range(2)] == [0, 0]
