"""COCO's figures: the same as pycocotools gives when it is run by hand on the files of a report."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spikefleet.config.recipes import load_config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json
from spikefleet.tasks import build_task
from spikefleet.tasks.coco_metrics import COCO_METRICS, FoundBoxes, box_confusion, evaluate_boxes, ground_truth, results
from spikefleet.tasks.detection import Detection
from spikefleet_models.families import model_config
from spikefleet_pipelines.store.annotations import Annotations

NAMES = ("cat", "dog", "never seen")
IDS = (3, 17, 90)
SIDE = 200


def annotations(image_id: int, boxes: list[list[float]], labels: list[int], crowd: list[bool]) -> Annotations:  # type: ignore[no-redef]
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    return Annotations(
        image_id=image_id,
        height=SIDE,
        width=SIDE,
        boxes=corners,
        category_ids=np.array([IDS[label] for label in labels], np.int64),
        labels=np.array(labels, np.int64),
        crowd=np.array(crowd, bool),
        areas=corners[:, 2] * corners[:, 3],
        ids=np.arange(len(labels), dtype=np.int64) + 100 * image_id + 1,
    )


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> FoundBoxes:
    return FoundBoxes(np.array(boxes, np.float64).reshape(-1, 4), np.array(scores), np.array(labels, np.int64))


def random_case(seed: int, pictures: int = 12) -> tuple[list[FoundBoxes], list[Annotations]]:
    """Objects of all sizes with crowds, and detections near them with tied scores, wrong classes and strays."""
    draw = np.random.default_rng(seed)
    predictions, truths = [], []
    for image_id in range(pictures):
        number = int(draw.integers(0, 6))
        corner, size = draw.uniform(0, 100, (number, 2)), draw.choice([8, 40, 99], (number, 2))
        labels = draw.integers(0, 2, number)  # the third class never occurs
        crowd = draw.random(number) < 0.2
        truths.append(annotations(image_id, np.hstack([corner, size]).tolist(), labels.tolist(), crowd.tolist()))
        moved = np.hstack([corner, corner + size]) + draw.normal(0, 3, (number, 4))
        strays = np.sort(draw.uniform(0, SIDE, (3, 4)), axis=1)
        boxes = np.vstack([moved, moved + 1, strays])
        scores = draw.choice([0.3, 0.5, 0.9], len(boxes))
        order = np.argsort(-scores, kind="stable")
        predicted = np.concatenate([labels, draw.integers(0, 3, number), draw.integers(0, 3, 3)])
        predictions.append(FoundBoxes(boxes[order], scores[order], predicted[order].astype(np.int64)))
    return predictions, truths


def by_hand(folder: Path) -> list[float]:
    """The twelve numbers as somebody with pycocotools and the two files gets them."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "ground_truth.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "predictions.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)


@pytest.fixture(scope="module")
def task() -> Detection:
    return Detection(model_config("spike_yolo_tiny", num_classes=3).build_criterion(), NAMES, IDS)


@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_pycocotools_run_by_hand_on_the_report(task: Detection, seed: int, tmp_path: Path) -> None:
    predictions, truths = random_case(seed)
    details = task.details(predictions, truths)
    task.report.write(details, predictions, truths, tmp_path)
    expected = {name: value for name, value in zip(COCO_METRICS, by_hand(tmp_path), strict=True) if value > -1}
    assert details["metrics"] == expected
    assert len(expected) >= 9
    assert read_json(tmp_path / "evaluation.json")["metrics"] == expected
    assert (tmp_path / "precision_recall.png").stat().st_size > 1000


def test_ids_with_gaps_reach_the_files(task: Detection, tmp_path: Path) -> None:
    predictions, truths = random_case(0)
    task.report.write(task.details(predictions, truths), predictions, truths, tmp_path)
    assert [one["id"] for one in read_json(tmp_path / "ground_truth.json")["categories"]] == list(IDS)
    assert {one["category_id"] for one in read_json(tmp_path / "predictions.json")} == set(IDS)


def test_perfect_boxes_are_perfect_and_shifted_ones_are_not() -> None:
    truths = [annotations(1, [[10, 10, 50, 50], [100, 100, 20, 60]], [0, 1], [False, False])]
    boxes = [[10, 10, 60, 60], [100, 100, 120, 160]]
    truth = ground_truth(truths, NAMES, IDS)

    def figures(predicted: list[list[float]], labels: list[int]) -> dict[str, float]:
        entries = results([found(predicted, [0.9, 0.8], labels)], truths, IDS)
        return evaluate_boxes(truth, entries).twelve

    assert figures(boxes, [0, 1])["map50_95"] == pytest.approx(1.0)
    assert figures(boxes, [1, 0])["map50"] == 0.0
    shifted = figures([[20, 10, 70, 60], [110, 100, 130, 160]], [0, 1])
    assert 0 < shifted["map50_95"] < shifted["map50"] < 1


def test_an_annotation_with_the_id_0_counts() -> None:
    """pycocotools takes 0 for "not matched", and COCO's format allows it."""
    truth = annotations(0, [[10, 10, 50, 50], [100, 100, 20, 60]], [0, 1], [False, False])
    truths = [truth._replace(ids=truth.ids - truth.ids[0])]
    entries = results([found([[10, 10, 60, 60], [100, 100, 120, 160]], [0.9, 0.8], [0, 1])], truths, IDS)
    assert evaluate_boxes(ground_truth(truths, NAMES, IDS), entries).twelve["map50_95"] == pytest.approx(1.0)


def test_no_detections_are_zeros_and_no_objects_of_a_class_is_no_figure(task: Detection) -> None:
    _, truths = random_case(1)
    nothing = [found([], [], []) for _ in truths]
    details = task.details(nothing, truths)
    assert details["metrics"]["map50_95"] == 0.0
    assert details["metrics"]["ar100"] == 0.0
    assert [one["ap50"] for one in details["classes"]] == [0.0, 0.0, None]
    assert details["classes"][2]["objects"] == 0


def test_boxes_on_a_crowd_are_neither_right_nor_wrong(task: Detection) -> None:
    alone = [annotations(1, [[10, 10, 50, 50]], [0], [False])]
    crowded = [annotations(1, [[10, 10, 50, 50], [100, 100, 80, 80]], [0, 0], [False, True])]
    predictions = [found([[100, 100, 180, 180], [10, 10, 60, 60]], [0.95, 0.9], [0, 0])]
    assert task.metrics(predictions, alone)["map50"] == pytest.approx(0.5)
    assert task.metrics(predictions, crowded)["map50"] == pytest.approx(1.0)
    assert task.details(predictions, crowded)["classes"][0]["objects"] == 1


def test_confusion_counts_wrong_classes_misses_and_strays() -> None:
    truths = [
        annotations(1, [[10, 10, 50, 50], [100, 100, 40, 40], [0, 150, 30, 30]], [0, 1, 1], [False, False, False])
    ]
    boxes = [[10, 10, 60, 60], [12, 12, 60, 60], [100, 100, 140, 141], [150, 0, 190, 40]]
    counts = box_confusion([found(boxes, [0.9, 0.8, 0.7, 0.6], [0, 0, 2, 1])], truths, 3)
    expected = np.zeros((4, 4), np.int64)
    expected[0, 0] = 1
    expected[1, 2] = 1  # found as another class
    expected[1, 3] = 1  # missed
    expected[3, 0] = 1  # the second box on the same object
    expected[3, 1] = 1  # where nothing is
    assert counts.tolist() == expected.tolist()
    crowd = [annotations(1, [[90, 90, 90, 90]], [1], [True])]
    inside = [found([[100, 100, 140, 141]], [0.9], [1])]
    assert box_confusion(inside, crowd, 3).sum() == 0


def test_pictures_without_any_object_cannot_be_measured(task: Detection) -> None:
    with pytest.raises(UserError, match="found none in 1 image"):
        task.metrics([found([], [], [])], [annotations(1, [], [], [])])


def crowded(count: int) -> tuple[FoundBoxes, Annotations]:
    """An image with so many objects of one class in a grid, and perfect boxes."""
    corners = [[12.0 * (k % 30), 12.0 * (k // 30)] for k in range(count)]
    truth = annotations(1, [[x, y, 10, 10] for x, y in corners], [0] * count, [False] * count)
    boxes = [[x, y, x + 10, y + 10] for x, y in corners]
    return found(boxes, list(np.linspace(0.9, 0.1, count)), [0] * count), truth


def with_most(most: int) -> Detection:
    criterion = model_config("spike_yolo_tiny", num_classes=3).build_criterion()
    return Detection(criterion, NAMES, IDS, max_detections=most)


def test_more_objects_than_detections_count_are_remarked(task: Detection) -> None:
    prediction, truth = crowded(300)
    details = task.details([prediction], [truth])
    assert details["metrics"]["map50"] == pytest.approx(0.337, abs=0.005)
    assert "1 image of 1 has more than 100 objects of a class" in details["remark"]
    assert "at most 100 detections of a class in an image (evaluation.max_detections)" in details["description"]
    few, their = crowded(100)
    assert "remark" not in task.details([few], [their])


def test_max_detections_lets_all_of_them_count() -> None:
    task = with_most(300)
    prediction, truth = crowded(300)
    details = task.details([prediction], [truth])
    assert details["metrics"]["map50_95"] == details["metrics"]["map50"] == pytest.approx(1.0)
    assert details["metrics"]["ar300"] == pytest.approx(1.0)
    assert "ar100" not in details["metrics"]
    assert "at most 300 detections" in details["description"]
    assert "remark" not in details
    assert set(details["metrics"]) <= set(task.metric_names)


@pytest.mark.parametrize("seed", range(3))
def test_where_no_image_has_so_many_the_number_changes_nothing(task: Detection, seed: int) -> None:
    predictions, truths = random_case(seed)
    usual = task.details(predictions, truths)["metrics"]
    more = with_most(300).details(predictions, truths)["metrics"]
    assert list(more.values()) == pytest.approx(list(usual.values()), abs=1e-12)


def test_the_option_is_checked_against_task_and_network() -> None:
    config = load_config("scenes_spike_yolo", {"evaluation.max_detections": 200})
    assert config.evaluation.max_detections == 200
    assert build_task(config, DataSummary("scenes", "", tuple(map(str, range(10))), tuple(range(10)))).metric_names[
        8
    ] == ("ar200")
    with pytest.raises(
        UserError, match=r"max_detections=999, but the network gives at most .*criterion.max_detections"
    ):
        load_config("scenes_spike_yolo", {"evaluation.max_detections": 999})
    with pytest.raises(UserError, match=r"evaluation.max_detections=200 has no effect for task=classification"):
        load_config("digits", {"evaluation.max_detections": 200})
