"""Two networks on the same images: the tests say what scipy says, and refuse what cannot be compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from spikefleet.audit.paired_results import PairedResult, compare_paired, unpaired
from spikefleet.data_summary import DataSummary
from spikefleet.tasks.per_image import Answers, Boxes, PerImage
from support.results import CATEGORIES, NAMES, detected, with_classes

DIGITS = DataSummary("digits", "d" * 64, tuple(f"digit{k}" for k in range(10)))
SCENES = DataSummary("scenes", "d" * 64, NAMES, CATEGORIES)


def compared(first: PerImage, second: PerImage, data: DataSummary = DIGITS) -> PairedResult:
    assert unpaired(first, second) is None
    return compare_paired(first, second, data, resamples=200)


@pytest.mark.parametrize(("right", "shift"), [(150, 40), (190, 30), (180, 0)])
def test_the_p_value_is_that_of_the_exact_test(right: int, shift: int) -> None:
    found = compared(with_classes(200, 180), with_classes(200, right, shift))
    assert found.gained is not None
    assert found.lost is not None
    different = found.gained + found.lost
    expected = binomtest(found.gained, different, 0.5).pvalue if different else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-12)
    assert found.gain == pytest.approx((right - 180) / 200)
    assert found.interval[0] <= found.gain <= found.interval[1]


def test_words_follow_the_numbers_in_either_order() -> None:
    good, bad, near = with_classes(400, 380), with_classes(400, 300), with_classes(400, 379)
    assert compared(bad, good).says.startswith("the second one is better by more than chance: test/top1 75.00% and 95.")
    assert compared(good, bad).says.startswith("the first one is better by more than chance")
    assert compared(near, good).says.startswith("the images do not show which one is better")
    assert compared(good, good).p_value == 1.0


def test_classes_that_differ_by_more_than_chance_are_named() -> None:
    first = with_classes(400, 400)
    assert isinstance(first.results, Answers)
    wrong = np.where(first.results.target == 3, 4, first.results.target).astype(np.int32)
    second = replace(first, results=replace(first.results, predicted=wrong))
    assert compared(first, second).worse == ("digit3",)
    assert compared(second, first).better == ("digit3",)
    assert compared(second, first).worse == ()


def test_a_detector_that_misses_more_is_worse_and_the_same_one_is_not() -> None:
    good, bad = detected(1, missed=0.1), detected(2, missed=0.6)
    worse = compared(good, bad, SCENES)
    assert worse.p_value <= 0.05
    assert worse.interval[1] < 0
    assert worse.says.startswith("the first one is better by more than chance: test/map50_95")
    assert compared(bad, good, SCENES).gain == pytest.approx(-worse.gain)
    same = compared(good, good, SCENES)
    assert (same.p_value, same.gain, same.interval) == (1.0, 0.0, (0.0, 0.0))
    assert same.says.startswith("the images do not show which one is better")


def test_what_cannot_be_compared_is_said() -> None:
    first = with_classes(20, 15)
    assert isinstance(first.results, Answers)
    other = replace(first.results, target=(first.results.target + 1) % 10)
    boxes = detected(1)
    assert isinstance(boxes.results, Boxes)
    fewer = replace(boxes, results=replace(boxes.results, max_detections=300))
    moved = boxes.results.targets[0]._replace(height=9)
    elsewhere = replace(boxes, results=replace(boxes.results, targets=[moved, *boxes.results.targets[1:]]))
    crowds = [one._replace(crowd=np.ones_like(one.crowd)) for one in boxes.results.targets]
    crowded = replace(boxes, results=replace(boxes.results, targets=crowds))
    for left, right, sentence in [
        (first, boxes, "one answers with classes, the other with boxes"),
        (first, replace(first, data_hash="e" * 64), "measured on different data (content hashes dddd"),
        (first, replace(first, split="val"), "measured on different splits, test and val"),
        (first, with_classes(19, 15), "measured on different images (20 and 19 of the split)"),
        (first, replace(first, rows=first.rows[::-1]), "measured on different images"),
        (first, replace(first, results=other), "disagree about the true classes"),
        (boxes, fewer, "counted up to 100 and 300 (evaluation.max_detections)"),
        (boxes, elsewhere, "disagree about the objects"),
        (crowded, crowded, "no image has an object"),
        (with_classes(0, 0), with_classes(0, 0), "on no image"),
    ]:
        assert sentence in (unpaired(left, right) or "they can be compared"), sentence
    assert unpaired(first, first) is None
    assert unpaired(boxes, boxes) is None
