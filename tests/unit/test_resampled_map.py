"""mAP of resampled images equals pycocotools' on the images themselves, drawn and copied."""

import copy
from typing import Any

import numpy as np
import pytest

from spikefleet.tasks.coco_metrics import evaluate_boxes
from spikefleet.tasks.resampled_map import Matches, resampled_gain, resampled_gains

CLASSES = 3
IMAGES = 12


def scene(seed: int, missed: float = 0.3) -> tuple[Any, list[Any]]:
    """Annotations with a crowd and an image without objects; detections with misses and false ones.

    Scores of different images are often equal, those of one image never.
    """
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(0)
    annotations: list[Any] = []
    found: list[Any] = []
    for image in range(1, IMAGES + 1):
        for _ in range(0 if image == 3 else int(truth.integers(1, 6))):
            box = [*truth.uniform(0, 60, 2), *truth.uniform(8, 40, 2)]
            category = int(truth.integers(1, CLASSES + 1))
            key = len(annotations) + 1
            crowd = int(key % 9 == 0)
            annotations.append(
                {
                    "id": key,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                }
            )
            if rng.random() > missed:
                shifted = [value + float(rng.normal(0, 2)) for value in box]
                found.append(detection(image, category, shifted, round(float(rng.random()), 1) + 0.01 * (key % 7)))
        found.append(detection(image, int(rng.integers(1, CLASSES + 1)), [*rng.uniform(0, 60, 2), 12, 12], 0.508))
    images = [{"id": image, "height": 100, "width": 100} for image in range(1, IMAGES + 1)]
    categories = [{"id": key, "name": f"class{key}"} for key in range(1, CLASSES + 1)]
    return {"images": images, "categories": categories, "annotations": annotations}, found


def detection(image: int, category: int, box: list[float], score: float) -> Any:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def copied(annotations: Any, found: list[Any], weights: np.ndarray) -> tuple[Any, list[Any]]:
    """The drawn images themselves, each copy under an id of its own."""
    drawn = copy.deepcopy(annotations) | {"images": [], "annotations": []}
    boxes: list[Any] = []
    for position, times in enumerate(weights):
        for _ in range(times):
            key = len(drawn["images"]) + 1
            drawn["images"].append(annotations["images"][position] | {"id": key})
            for entry in annotations["annotations"]:
                if entry["image_id"] == position + 1:
                    number = len(drawn["annotations"]) + 1
                    drawn["annotations"].append(entry | {"image_id": key, "id": number})
            boxes += [one | {"image_id": key} for one in found if one["image_id"] == position + 1]
    return drawn, boxes


def test_every_image_once_is_the_evaluation_itself() -> None:
    annotations, found = scene(1)
    expected = evaluate_boxes(annotations, found).twelve["map50_95"]
    assert 0.1 < expected < 0.9
    assert Matches(annotations, found).mean_average_precision()[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_a_resample_is_the_evaluation_of_its_images(seed: int) -> None:
    annotations, found = scene(seed)
    weights = np.random.default_rng(seed).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), 4)
    values = Matches(annotations, found).mean_average_precision(weights)
    for drawn, value in zip(weights, values, strict=True):
        expected = evaluate_boxes(*copied(annotations, found, drawn)).twelve["map50_95"]
        assert value == pytest.approx(expected, abs=1e-12)


def test_without_detections_or_objects() -> None:
    annotations, found = scene(2)
    assert Matches(annotations, []).mean_average_precision()[0] == 0.0
    only_empty = np.zeros((1, IMAGES), np.int64)
    only_empty[0, 2] = IMAGES  # the image without objects
    assert np.isnan(Matches(annotations, found).mean_average_precision(only_empty)[0])


def test_a_better_detector_gains_on_nearly_every_resample() -> None:
    annotations, worse = scene(3, missed=0.6)
    _, better = scene(3, missed=0.05)
    champion, candidate = Matches(annotations, worse), Matches(annotations, better)
    gains = resampled_gain(candidate, champion, resamples=120)
    assert gains.shape == (120,)
    assert np.quantile(gains, 0.05) > 0
    assert np.array_equal(resampled_gain(champion, champion, resamples=60), np.zeros(60))
    assert np.array_equal(gains, resampled_gain(candidate, champion, resamples=120))


def test_label_times_of_a_recording_are_drawn_together() -> None:
    """Two copies of every image say no more than one; drawn by themselves they would seem to."""
    annotations, worse = scene(3, missed=0.6)
    _, better = scene(3, missed=0.3)
    twice = np.full(IMAGES, 2)
    champion, candidate = (Matches(*copied(annotations, found, twice)) for found in (worse, better))
    once = resampled_gain(Matches(annotations, better), Matches(annotations, worse), resamples=400)
    recordings = np.repeat(np.arange(IMAGES), 2)
    together, _ = resampled_gains(candidate, champion, 400, drawn_together=recordings)
    apart, _ = resampled_gains(candidate, champion, 400)
    assert together.std() == pytest.approx(once.std(), rel=0.15)
    assert apart.std() < 0.85 * together.std()
    by_number, _ = resampled_gains(candidate, champion, 50, drawn_together=np.arange(2 * IMAGES))
    assert np.array_equal(by_number, apart[:50])
